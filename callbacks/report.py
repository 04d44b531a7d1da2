"""Writes what a run has come to when ``fit`` ends, also after one step."""

import re
import shlex
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.evaluated import Student, as_student, weights_of
from callbacks.evaluation import Evaluation, FinalResults
from callbacks.evaluation_share import EvaluationShare
from callbacks.health import Health
from callbacks.loggers import MetricsCSV
from callbacks.logging_media import log_config, log_report
from callbacks.metrics.manifest import make_report
from callbacks.run_folder import CONFIG_NAME, run_dir
from callbacks.samples import Pictures
from common.environment import environment, peak_memory_gib
from lightning_modules.diffusion.steps import step_facts
from reports.run_report import findings, render_text_table, student_row
from reports.write import write_report

_WARM_UP = 5
_MOST_PICTURES = 6


class StepTimer:
    """Durations of student updates, from the start to the end of a batch; the first few are warm-up."""

    def __init__(self) -> None:
        self._marks: list[tuple[Any, Any]] = []
        self._start: Any = None
        self.images_per_step = 0

    def start(self, device: torch.device) -> None:
        """A batch begins."""
        self._start = _mark(device)

    def stop(self, device: torch.device, images: int) -> None:
        """The batch has ended, and ``images`` pictures were drawn in it over all processes."""
        if self._start is not None:
            self._marks.append((self._start, _mark(device)))
            self._start = None
            self.images_per_step = images

    def seconds_per_step(self) -> float | None:
        """The median once warm, None before any step."""
        return statistics.median(seconds) if (seconds := self._warm()) else None

    def quartiles(self) -> list[float] | None:
        """Between which the middle half of them lies, None before the second step."""
        return statistics.quantiles(seconds, n=4)[::2] if len(seconds := self._warm()) > 1 else None

    def _warm(self) -> list[float]:
        seconds = [_seconds(*marks) for marks in self._marks]
        return seconds[min(_WARM_UP, len(seconds) // 2) :]


def _mark(device: torch.device) -> Any:
    """A point in time: on a GPU an event in its queue, so that nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


class RunReport(Callback):
    """report.json, .md, .html and manifest.json in the run folder, at each validation and at the end.

    At a validation it says what that has measured, and that the run isn't finished. Takes its numbers from
    the run's Evaluation (if there is one), its pictures from ``samples/``, its curves from ``metrics.csv``.
    At the end it prints the table of results and where report.html lies. The timing goes into checkpoints, so
    that a finished run whose report is completed later keeps that of its training.
    """

    def __init__(self) -> None:
        self.timer = StepTimer()
        self._earlier: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the settings to the loggers."""
        if trainer.is_global_zero:
            log_config(trainer.loggers, run_dir(trainer) / CONFIG_NAME)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self.timer.start(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        self.timer.stop(pl_module.device, len(batch["prompts"]) * trainer.world_size)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is known so far."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        student = as_student(pl_module)
        weights, found = weights_of(student), FinalResults(student.student_steps, "")  # on all processes
        if not trainer.is_global_zero:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        evaluation = next((one for one in callbacks if isinstance(one, Evaluation) and one.measured), None)
        if evaluation is not None:
            found = evaluation.last(trainer, student.student_steps, weights)
        self._write(trainer, replace(found, weights=weights), student, is_finished=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the final evaluation and the last pictures, then write and print."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        final = None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # Whatever their order in the list, the others' last words must be in the report.
            if isinstance(callback, Evaluation):
                final = callback.finalize(trainer, pl_module)
            elif isinstance(callback, Pictures):
                callback.draw_once(trainer, pl_module)
        student = as_student(pl_module)
        final = final or FinalResults(student.student_steps, weights_of(student))  # on all processes
        if trainer.is_global_zero:
            self._write(trainer, final, student, is_finished=True)

    def _write(self, trainer: Trainer, found: FinalResults, student: Student, is_finished: bool) -> None:
        folder = run_dir(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        checkpoint, curves = folder / "checkpoints" / "last.ckpt", folder / "metrics.csv"
        model = str(checkpoint if checkpoint.exists() else student.parts.path)
        timing, callbacks = self._timing(), trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, EvaluationShare):
                timing["evaluation_share"] = callback.share
        publish(
            trainer, student, found, folder, model, timing, sample_pictures(folder),
            curves if curves.is_file() else None, is_finished, numbered_sheets(folder),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the timing so far."""
        return {"timing": self._timing()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the timing of an earlier session, for the case that this one trains nothing."""
        self._earlier = state_dict["timing"]

    def _timing(self) -> dict[str, Any]:
        seconds = self.timer.seconds_per_step()
        if self._earlier and seconds is None:
            peak = max(self._earlier["peak_memory_gib"], peak_memory_gib())
            return self._earlier | {"peak_memory_gib": peak}
        return {
            "seconds_per_step": seconds,
            "seconds_per_step_quartiles": self.timer.quartiles(),
            "images_per_second": self.timer.images_per_step / seconds if seconds else None,
            "peak_memory_gib": peak_memory_gib(),
        }


def publish(
    trainer: Trainer,
    student: Student,
    found: FinalResults,
    folder: Path,
    model: str,
    timing: Mapping[str, Any],
    pictures: Mapping[str, Path],
    curves: Path | None = None,
    is_finished: bool = True,
    sheets: Mapping[int, Path] | None = None,
) -> None:
    """Write the report of a run's student to a folder, hand it to the loggers, print its table and its place.

    Of a run that isn't finished it is only written.

    Args:
        trainer, student: of the run.
        found: what was measured; no metrics and no manifest where nothing was.
        folder: where to write. ``model``: where the weights lie.
        timing, pictures, curves: as for ``make_report``. ``sheets``: as for ``Report``.
    """
    run, manifest = run_dir(trainer), found.manifest
    subject = {
        "experiment": run.parent.name if run.name.startswith("version_") else run.name,
        "step": student.student_steps,
        "weights": found.weights,
        "model": model,
        "config_path": str(run / CONFIG_NAME),
        "finished": is_finished,
        "run": run_facts(trainer, student),
        "evaluation_set": None if found.drawn is None else found.drawn.name,
    }
    machine = {
        "accelerator": trainer.strategy.root_device.type,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }
    facts = {"model": Path(student.parts.path).name, **step_facts(student.steps)}
    report = make_report(
        subject, found.metrics, facts | manifest, timing, pictures, machine=machine,
        seeds=f"{manifest['seeds']['first']} + place of the caption" if manifest else "",
        teacher=found.teacher_metrics, fewer_steps=found.fewer_steps, curves=curves,
        evaluation_set=found.drawn,
        row=student_row(len(student.steps)) + ("" if is_finished else ", at its last validation"),
    )  # fmt: skip
    path = write_report(replace(report, sheets=dict(sheets or {})), folder)
    if not is_finished:
        return
    log_report(trainer.loggers, report, folder)
    lines = ["", render_text_table(report), "", *findings(report)] if found.metrics else ["", ""]
    lines.append(f"Report: {path}")
    if Path(model).suffix == ".ckpt":
        draw = f'cli.py generate --model {shlex.quote(model)} --prompt "a red apple" --output outputs/apple'
        lines.append(f"Next: {python_command()} {draw}")
    print("\n".join(lines), flush=True)


def python_command() -> str:
    """This interpreter as one types it here: .venv/bin/python, or python of an activated environment."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


def run_facts(trainer: Trainer, student: Student) -> dict[str, Any]:
    """What a run is, in a few words: method, teacher, batch, hardware; and the alarms so far."""
    told: Any = student
    described: dict[str, str] = told.describe() if hasattr(told, "describe") else {}
    device, count = trainer.strategy.root_device, trainer.world_size
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else environment()["processor"]
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "method": described.get("Objective"),
        "teacher": described.get("Teacher", Path(student.parts.path).name),
        "batch": getattr(data, "batch_size", None),
        "data": data.describe() if hasattr(data, "describe") else {},
        "hardware": name + ("" if count == 1 else f", {count} {'GPUs' if is_gpu else 'processes'}"),
        "alarms": [
            alarm
            for one in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(one, Health)
            for alarm in one.alarms
        ],
    }


def numbered_sheets(folder: Path) -> dict[int, Path]:
    """A run's sheets of samples by student updates."""
    return _numbered(folder / "samples", "step_")


def sample_pictures(folder: Path) -> dict[str, Path]:
    """Titles to a run's pictures: the last grid, the last score views, then earlier grids in their order."""
    grids, views = numbered_sheets(folder), _numbered(folder / "samples", "score_views_step_")
    pictures: dict[str, Path] = {}
    for found, title in [
        (grids, "Student beside teacher"),
        (views, "What student, teacher and fake score see as x0"),
    ]:
        if found:
            step = max(found)
            pictures[f"{title} after {step:,} student updates"] = found.pop(step)
    steps = sorted(grids)
    if len(steps) > _MOST_PICTURES:  # evenly spaced, first and last kept; samples/ holds them all
        steps = [steps[round(i * (len(steps) - 1) / (_MOST_PICTURES - 1))] for i in range(_MOST_PICTURES)]
    return pictures | {f"After {step:,} student updates": grids[step] for step in steps}


def _numbered(folder: Path, stem: str) -> dict[int, Path]:
    matches = ((re.fullmatch(rf"{stem}(\d+)\.png", path.name), path) for path in folder.glob("*.png"))
    return {int(match.group(1)): path for match, path in matches if match is not None}
