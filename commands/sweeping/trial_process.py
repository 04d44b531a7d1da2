"""One trial: an ordinary `fit` in a process of its own, watched by way of its metrics.csv."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_COMMAND_LINE = Path(__file__).resolve().parents[2] / "cli.py"
_LAST_LINES = 15
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def fit_command() -> list[str]:
    """The words that start `fit` with this interpreter."""
    return [sys.executable, str(_COMMAND_LINE), "fit"]


def threads_per_worker(workers: int) -> int:
    """A worker's share of the cores this process may use; fewer if OMP_NUM_THREADS says so."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    share = max(1, cores // workers)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdigit() and int(given) > 0 else share


def environment(workers: int, worker: int, gpus: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a worker's trials: its share of the cores, and of the GPUs if workers share them.

    Args:
        workers: how many run at once on this machine.
        worker: which of them this is, from 0.
        gpus: names of the visible GPUs. With one worker its trials see them all.
    """
    given = dict(os.environ)
    given.update(dict.fromkeys(_THREADS, str(threads_per_worker(workers))))
    given["PYTHONUNBUFFERED"] = "1"  # what a killed trial has printed is in its log
    if workers > 1 and gpus:
        share = gpus[worker::workers] or [gpus[worker % len(gpus)]]
        given["CUDA_VISIBLE_DEVICES"] = ",".join(share)
    return given


def visible_gpus() -> list[str]:
    """Names of the GPUs that trials would see, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return given[:count] if given else [str(i) for i in range(count)]


@dataclass
class TrialProcess:
    """A running trial.

    Attributes:
        folder: its run folder.
        log: file of all that it prints.
        command: the command line.
        metric: the column of metrics.csv that is watched.
        reported: steps whose value has been handed out by `new_values`.
    """

    folder: Path
    log: Path
    command: list[str]
    metric: str
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    reported: set[int] = field(default_factory=set)
    stopping: bool = False

    @classmethod
    def start(
        cls, command: Sequence[str], root: Path, experiment: str, metric: str, env: dict[str, str]
    ) -> TrialProcess:
        """Start `command` with the options that name its folder, ``<root>/<experiment>/version_0``."""
        parent = root / experiment
        parent.mkdir(parents=True, exist_ok=True)
        words = [*command, f"--trainer.default_root_dir={root}", f"--experiment={experiment}"]
        log = parent / "output.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env,
                start_new_session=True,  # Ctrl-C reaches the driver alone, which then stops its trials
            )  # fmt: skip
        return cls(parent / "version_0", log, words, metric, process)

    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self.process.poll()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def values(self) -> dict[int, float]:
        """Step to value of the metric so far."""
        return read_values(self.folder / "metrics.csv", self.metric)

    def new_values(self) -> list[tuple[int, float]]:
        """Those that have not been handed out yet, in order."""
        new = [(step, value) for step, value in sorted(self.values().items()) if step not in self.reported]
        self.reported.update(step for step, _ in new)
        return new

    def stop(self) -> None:
        """Ask for a graceful end: `fit` completes its step, writes a checkpoint and exits."""
        self.stopping = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process and those it has started, at once."""
        self._signal(signal.SIGKILL, group=True)
        self.process.wait()

    def _signal(self, number: signal.Signals, group: bool = False) -> None:
        try:
            if group:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)
        except ProcessLookupError:
            return  # it has ended by itself in this moment

    def error(self) -> str:
        """Why it failed: the exit status and the last lines it printed."""
        status = self.process.returncode
        lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        last = [line.rstrip() for line in lines if line.strip()][-_LAST_LINES:]
        how = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        return "\n".join([how, *last])


def read_values(path: Path, metric: str) -> dict[int, float]:
    """Step to value of one column of a metrics.csv that may be growing; the last value of a step counts."""
    values: dict[int, float] = {}
    for row in _rows(path):
        if text := row.get(metric):
            values[int(float(row["step"]))] = float(text)
    return values


def logged_names(path: Path) -> list[str]:
    """The columns of a metrics.csv that hold a value."""
    return list(
        dict.fromkeys(name for row in _rows(path) for name, text in row.items() if text and name != "step")
    )


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # a line in the making is left for later
    return list(csv.DictReader(whole.splitlines(), restval=""))
