"""Writes what `validate` or `test` has measured, as `evaluate` and the end of `fit` do."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.evaluated import as_student, evaluation_captions
from callbacks.evaluation import Evaluation
from callbacks.logging_media import log_media, log_report
from callbacks.metrics.manifest import run_manifest, told
from callbacks.run_folder import CONFIG_NAME, run_dir
from common.environment import environment, peak_memory_gib
from reports.run_report import Report, render_text_table
from reports.sheets import labelled_grid, save_png
from reports.write import write_report

STAGES = ("validate", "test")
GRID = "samples.png"


class StageReport(Callback):
    """report.json, .md, .html, manifest.json and a grid, in ``validate/`` or ``test/`` of the run's folder.

    What `fit` has written stays as it is, and during `fit` nothing happens. The numbers are those of the
    run's Evaluation; without one there is no report.

    Args:
        num_images: most pictures in the grid: the first that this process has drawn.
    """

    def __init__(self, num_images: int = 16) -> None:
        self.num_images = num_images
        self._drawn: list[tuple[str, Tensor]] = []
        self._begin = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._drawn, self._begin = [], time.perf_counter()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Keep the first pictures."""
        self._keep(trainer, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of `validate`."""
        self._report(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._drawn, self._begin = [], time.perf_counter()

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Keep the first pictures."""
        self._keep(trainer, outputs)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of `test`."""
        self._report(trainer, pl_module)

    def _keep(self, trainer: Trainer, outputs: Any) -> None:
        if trainer.state.fn not in STAGES or not outputs or outputs.get("images") is None:
            return
        for prompt, image, padding in zip(outputs["prompts"], outputs["images"], outputs["is_padding"]):
            if len(self._drawn) < self.num_images and not bool(padding):
                self._drawn.append((prompt, image.float().cpu()))

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        evaluation = next((one for one in callbacks if isinstance(one, Evaluation)), None)
        if trainer.state.fn not in STAGES or evaluation is None or not evaluation.measured:
            return
        with as_student(module).evaluation_weights() as weights:
            pass
        if trainer.is_global_zero:
            folder = run_dir(trainer) / str(trainer.state.fn.value)
            folder.mkdir(parents=True, exist_ok=True)
            report = self._assemble(trainer, module, evaluation, weights, folder)
            path = write_report(report, folder)
            log_report(trainer.loggers, report, folder)
            print(f"\n{render_text_table(report)}\n\nReport: {path}", flush=True)

    def _assemble(
        self, trainer: Trainer, module: LightningModule, evaluation: Evaluation, weights: str, folder: Path
    ) -> Report:
        student, run, seconds = as_student(module), folder.parent, time.perf_counter() - self._begin
        count = max(result["num_images"] for result in evaluation.measured.values())
        every = evaluation_captions(trainer)
        pictures = {}
        if self._drawn:
            grid = labelled_grid(
                {"": torch.stack([image for _, image in self._drawn])}, [prompt for prompt, _ in self._drawn]
            )
            save_png(grid, folder / GRID)
            pictures = {"First pictures": folder / GRID}
            for logger in trainer.loggers:
                log_media(logger, "First pictures", grid, student.student_steps)
        content = {
            "experiment": run.parent.name if run.name.startswith("version_") else run.name,
            "step": student.student_steps,
            "weights": weights,
            "model": str(trainer.ckpt_path or student.parts.path),
            # the validation step draws caption i from seed i, whatever the seed of the final evaluation
            "metrics": told(evaluation.measured, 0),
            "teacher_metrics": {},
            "timing": {
                "seconds": seconds, "images_per_second": count / seconds,
                "peak_memory_gib": peak_memory_gib(),
            },
            "environment": environment() | {
                "accelerator": trainer.strategy.root_device.type, "processes": trainer.world_size,
                "precision": str(trainer.precision),
            },
            "config_path": str(run / CONFIG_NAME),
        }  # fmt: skip
        manifest = run_manifest(evaluation, every[:count], every, weights)
        manifest["seeds"] |= {"first": 0}
        manifest["guidance"] = {"student": None}
        own = {"model": Path(student.parts.path).name, "start_timestep": student.start_timestep}
        return Report(content, own | manifest, pictures)
