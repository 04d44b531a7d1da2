"""A trial that takes no time, and sweeps made of it: what the driver sees of `fit`, without torch."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from commands.sweeping.driver import Driver
from commands.sweeping.settings import read_settings
from commands.sweeping.study import SweepStudy

# Writes metrics.csv like a run: (x - 3)^2 + step / 100 at steps 10, 20, ... 50. Options: --delay between
# steps, --fail_above x, --metric name of the column. Every start and every whole run is noted beside the
# sweep.
SCRIPT = """
import os, signal, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
folder = os.path.join(options["trainer.default_root_dir"], options["experiment"], "version_0")
os.makedirs(folder)
x = float(options["x"])
def note(name):
    with open(os.path.join(options["trainer.default_root_dir"], name), "a") as file:
        file.write(options["experiment"] + " " + repr(x) + " " + str(os.getpid()) + "\\n")
def stop(*_):
    note("stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
note("started")
if x > float(options.get("fail_above", "inf")):
    print("everything is fine", flush=True)
    raise RuntimeError("x is far too large")
with open(os.path.join(folder, "config.yaml"), "w") as file:
    file.write("x: " + repr(x) + "\\n")
with open(os.path.join(folder, "metrics.csv"), "w") as file:
    file.write("step,train/loss," + options.get("metric", "val/score") + "\\n")
    for step in range(10, 60, 10):
        file.write(f"{step},1.0,{(x - 3) ** 2 + step / 100!r}\\n")
        file.flush()
        time.sleep(float(options["delay"]))
note("ended")
"""


def number(low: float, high: float, **more: Any) -> dict[str, Any]:
    """What a YAML says of any number between two."""
    return {"class_path": "FloatDistribution", "init_args": {"low": low, "high": high, **more}}


def whole(low: int, high: int, **more: Any) -> dict[str, Any]:
    """What a YAML says of whole numbers between two."""
    return {"class_path": "IntDistribution", "init_args": {"low": low, "high": high, **more}}


def choice(*values: Any) -> dict[str, Any]:
    """What a YAML says of a list of values."""
    return {"class_path": "CategoricalDistribution", "init_args": {"choices": list(values)}}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """A sweep's YAML over x in [0, 10], beside an empty base config."""
    base = folder / "base.yaml"
    base.write_text("trainer: {max_steps: 50}\n")
    content = {
        "base": str(base), "space": {"x": number(0, 10)}, "metric": "val/score",
        "direction": "minimize", "trials": 8, "overrides": {"delay": 0}, "root": str(folder / "runs"),
        "name": "sweep",
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def write_script(folder: Path) -> Path:
    """The stand-in, unless it is there."""
    script = folder / "trial.py"
    if not script.exists():
        script.write_text(SCRIPT)
    return script


def driver(path: Path, workers: int = 1, **settings: Any) -> Driver:
    """A driver whose trials are stand-ins."""
    command = [sys.executable, "-S", "-E", str(write_script(path.parent))]
    return Driver(study(path), workers, command=command, poll=0.01, grace=5.0, **settings)


def study(path: Path) -> SweepStudy:
    """The trials as another process sees them."""
    return SweepStudy(read_settings(path))


def noted(path: Path, name: str) -> list[list[str]]:
    """Experiment, x and process of every trial that has `started`, `ended` or `stopped`."""
    file = read_settings(path).folder / name
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def in_background(work: Callable[[], None]) -> Any:
    """Run `work` in a forked process, which needs no imports."""

    def quiet() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()

    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process


def states(path: Path) -> list[str]:
    """How the trials that count have ended, in their order."""
    return [trial.state.name for trial in study(path).live()]


def content_of(path: Path) -> dict[str, Any]:
    """sweep.json."""
    read: dict[str, Any] = json.loads((read_settings(path).folder / "sweep.json").read_text())
    return read
