"""Kills a run at random moments with SIGKILL, resumes it, and compares the end with that of a run left alone.

    python scripts/kill_and_resume.py                       # 20 kills on the bundled models
    python scripts/kill_and_resume.py --kills 5 --config my.yaml --threads 2

Weights, average, optimizer states, schedules, counters, position in the prompts, random states, best.ckpt,
the report's metrics, sample pictures and every column of metrics.csv but time and memory must be bit for bit
the same. Exit status 0 only if they are and each kill hit. A run with its own --config must be short, in
32-true, on the CPU, and evaluate and save often.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._pytree import keystr, tree_leaves_with_path

ROOT = Path(__file__).resolve().parent.parent
MARKS_FD = "KILL_AND_RESUME_FD"
NOT_COMPARED = ("throughput/", "memory/")
PHASES = ("step", "checkpoint", "evaluation")
COMPARED = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "counters", "global_step",
            "PromptDataModule", "one_step")  # fmt: skip
SHORT: dict[str, Any] = {
    "data": {"init_args": {"batch_size": 4, "eval_size": 16, "eval_batch_size": 8}},
    "trainer": {
        "accelerator": "cpu", "precision": "32-true", "max_steps": 60, "val_check_interval": 12,
        "log_every_n_steps": 1,
        "callbacks": [
            {"class_path": "RunCheckpoint", "init_args": {"every_n_steps": 4, "keep_step_checkpoints": 2}},
            {"class_path": "Evaluation",
             "init_args": {"final_size": 32, "batch_size": 8, "teacher_rows": False, "timing_batch_size": 4}},
            {"class_path": "SampleGrid", "init_args": {"num_images": 2, "teacher_steps": 2}},
            {"class_path": "RunReport"},
        ],
    },
}  # fmt: skip


class PhaseMarks(Callback):
    """Tells the process that kills what the run is at: "<phase> <step>" lines into a pipe."""

    def __init__(self) -> None:
        self.pipe = int(os.environ[MARKS_FD])

    def _mark(self, phase: str, step: int) -> None:
        os.write(self.pipe, f"{phase} {step}\n".encode())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A step begins."""
        self._mark("step", trainer.global_step + 1)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Any) -> None:
        """A checkpoint is about to be written; what follows up to the next mark is its writing."""
        self._mark("checkpoint", trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation begins."""
        self._mark("evaluation", trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The final evaluation follows."""
        self._mark("evaluation", trainer.global_step)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Any) -> None:
        """So it does where all steps are done."""
        if checkpoint["global_step"] >= trainer.max_steps:
            self._mark("evaluation", checkpoint["global_step"])


class Session(NamedTuple):
    """One process of a run: its id, the reading end of its marks, and what waits for its exit status."""

    pid: int
    pipe: int
    wait: Callable[[], int]


Start = Callable[[list[str], Path], Session]
Moment = tuple[str, int, float]


def start_process(arguments: list[str], log: Path) -> Session:
    """`python cli.py` with these arguments, in a fresh interpreter."""
    reading, writing = os.pipe()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), *arguments], stdout=output, stderr=subprocess.STDOUT,
            pass_fds=[writing], env={**os.environ, MARKS_FD: str(writing)},
        )  # fmt: skip
    os.close(writing)
    return Session(process.pid, reading, process.wait)


def run(
    start: Start, arguments: list[str], log: Path, moment: Moment | None = None, steps: int = 0
) -> tuple[str | None, dict[str, float]]:
    """Run to the end, or kill so many seconds into the first such phase at or after a step.

    The last chance to kill is the evaluation after `steps`. Returns the phase that was hit (None: none was),
    and the median length of each phase in seconds.

    Raises:
        RuntimeError: the run failed by itself.
    """
    session, durations = start(arguments, log), defaultdict[str, list[float]](list)
    now, began, killed = None, 0.0, False
    with os.fdopen(session.pipe) as marks:
        for line in marks:
            if now is not None:
                durations[now].append(time.perf_counter() - began)
            now, began, step = line.split()[0], time.perf_counter(), int(line.split()[1])
            wanted = moment and now == moment[0] and step >= moment[1]
            if moment and not killed and (wanted or (step >= steps and now == "evaluation")):
                time.sleep(moment[2])  # what it gets to meanwhile has marks, too
                os.kill(session.pid, signal.SIGKILL)
                killed = True
    status = session.wait()
    if status not in (0, -signal.SIGKILL if killed else 0):
        raise RuntimeError(f"the run ended with status {status}: see {log}")
    return (now if status else None), {phase: statistics.median(x) for phase, x in durations.items()}


def moments(kills: int, steps: int, seed: int) -> list[Moment]:
    """(phase, earliest step, place within the phase in [0, 1)), half of them in steps; steps never fall."""
    generator = random.Random(seed)
    phases = [PHASES[0] if i % 2 == 0 else PHASES[1 + i // 2 % 2] for i in range(kills)]
    generator.shuffle(phases)
    earliest = sorted(generator.randint(1, max(1, steps - steps // 8)) for _ in range(kills))
    return [(phase, step, generator.random()) for phase, step in zip(phases, earliest)]


def differences(first: Any, second: Any) -> list[str]:
    """Where nested data differ; tensors must be equal bit for bit."""
    one, other = (
        {keystr(path): leaf for path, leaf in tree_leaves_with_path(content)} for content in (first, second)
    )
    return [place for place in dict.fromkeys([*one, *other]) if not same(one.get(place), other.get(place))]


def same(first: Any, second: Any) -> bool:
    """Equality of single values."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and first == second


def newest_run(root: Path) -> Path:
    """The run folder that holds a checkpoint (one killed before its first checkpoint left another folder)."""
    return sorted(path.parents[1] for path in root.glob("*/version_*/checkpoints/last.ckpt"))[-1]


def checkpoint_state(run: Path, name: str) -> dict[str, Any]:
    """What must agree of a checkpoint."""
    content = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    state = {key: content[key] for key in COMPARED if key in content}
    for key, value in content["callbacks"].items():
        if key.startswith("RunCheckpoint"):
            state["callback"] = {k: value[k] for k in ("best_score", "best_step", "random_states")}
    return state


def table(run: Path) -> tuple[list[dict[str, str]], set[str]]:
    """Rows of metrics.csv without the columns of time and memory, and the names of these."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    left_out = {name for name in rows[0] if name.startswith(NOT_COMPARED)}
    return [{k: v for k, v in row.items() if k not in left_out and v} for row in rows], left_out


def contents(path: Path) -> bytes | None:
    """What is in a file, None if there is none."""
    return path.read_bytes() if path.is_file() else None


def compare(alone: Path, killed: Path) -> tuple[list[str], str]:
    """Return the differences of two runs and a line that says how much was compared."""
    runs = (alone, killed)
    (rows, left_out), (others, _) = map(table, runs)
    reports = [json.loads((run / "report.json").read_text())["metrics"] for run in runs]
    for report in reports:
        report.pop("milliseconds_per_image", None)
    names = sorted(path.name for path in (alone / "samples").glob("*.png"))  # a resumed run may draw more
    pictures = [{name: contents(run / "samples" / name) for name in names} for run in runs]
    states = [[checkpoint_state(run, name) for run in runs] for name in ("last", "best")]
    pairs = {
        "last.ckpt": states[0], "best.ckpt": states[1], "metrics.csv": (rows, others),
        "report.json": reports, "samples": pictures,
    }  # fmt: skip
    found = [f"{name}: {place}" for name, pair in pairs.items() for place in differences(*pair)]
    found += [f"left over: {path.relative_to(killed)}" for path in killed.rglob("*") if ".tmp" in path.name]
    state = states[0][0]
    tensors = len(state["state_dict"]) + sum(len(one["state"]) for one in state["optimizer_states"])
    columns = len({name for row in rows for name in row})
    return found, (
        f"compared: last.ckpt and best.ckpt ({tensors} weights and optimizer states each, average, "
        f"schedules, random states), {len(rows)} rows x {columns} columns of metrics.csv (not: "
        f"{', '.join(sorted(left_out)) or 'none'}), the report's metrics, {len(names)} sample pictures"
    )


def prepare(arguments: argparse.Namespace) -> list[str]:
    """Write the settings that make the run short and marked; returns the configs of `fit`."""
    arguments.output.mkdir(parents=True)
    marks = [{"class_path": "scripts.kill_and_resume.PhaseMarks"}]
    if arguments.config:
        own: dict[str, Any] = {"trainer": {"callbacks+": marks}}
    else:
        callbacks = [*SHORT["trainer"]["callbacks"], *marks]
        own = {**SHORT, "trainer": {**SHORT["trainer"], "callbacks": callbacks}}
    path = arguments.output / "marked.yaml"
    path.write_text(yaml.safe_dump(own, sort_keys=False))
    files = [*(arguments.config or [ROOT / "configs" / "quickstart.yaml"]), path]
    return [part for file in files for part in ("--config", str(file))]


def check(arguments: argparse.Namespace, start: Start = start_process) -> list[str]:
    """Run, kill, resume and compare; returns what is wrong."""
    configs, output = prepare(arguments), arguments.output

    def command(name: str) -> list[str]:
        return ["fit", *configs, "--experiment", "run", "--trainer.default_root_dir", str(output / name)]

    began = time.perf_counter()
    _, lengths = run(start, command("alone"), output / "alone.log")
    print(f"left alone: {time.perf_counter() - began:.0f} s; median seconds of a phase: "
          f"{ {phase: round(value, 4) for phase, value in lengths.items()} }", flush=True)  # fmt: skip
    alone = newest_run(output / "alone")
    steps = int(torch.load(alone / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])
    resume, fell = [*command("killed"), "--ckpt_path", "last"], Counter[str]()
    for number, (phase, step, part) in enumerate(moments(arguments.kills, steps, arguments.seed), 1):
        moment = phase, step, part * lengths.get(phase, 0.0)
        hit, _ = run(start, resume, output / f"killed_{number}.log", moment, steps)
        fell[hit or "too late"] += 1
        print(f"kill {number}: for a {phase} from step {step} on; hit: {hit or 'nothing'}", flush=True)
    run(start, resume, output / "killed_end.log")
    wrong, compared = compare(alone, newest_run(output / "killed"))
    where = ", ".join(f"{fell[phase]} in {phase}s" for phase in PHASES)
    print(f"{arguments.kills} kills: {where}; {fell['too late']} too late\n{compared}")
    print("\n".join(["DIFFERENT:", *wrong]) if wrong else "identical")
    print(f"{time.perf_counter() - began:.0f} s with {arguments.threads} thread(s); runs in {output}")
    return wrong + ([f"{fell['too late']} kills came too late"] if fell["too late"] else [])


def main(args: list[str] | None = None) -> None:
    """Parse the command line and check."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--config", action="append", type=Path, help="of a short run (default: quickstart)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/kill_and_resume"), help="must not exist")
    arguments = parser.parse_args(args)
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; remove it or give another --output")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)
    raise SystemExit(1 if check(arguments) else 0)


if __name__ == "__main__":
    main()
