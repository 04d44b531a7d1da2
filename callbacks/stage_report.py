"""Writes what `validate` or `test` has measured, as `evaluate` and the end of `fit` do."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.evaluated import as_student, weights_of
from callbacks.evaluation import Evaluation
from callbacks.logging_media import log_media
from callbacks.report import publish
from callbacks.run_folder import run_dir
from common.environment import peak_memory_gib
from reports.sheets import labelled_grid, save_png

STAGES = ("validate", "test")
GRID = "samples.png"
_TITLE = "First pictures"


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
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first pictures."""
        if trainer.state.fn not in STAGES or not outputs or outputs.get("images") is None:
            return
        for prompt, image, padding in zip(outputs["prompts"], outputs["images"], outputs["is_padding"]):
            if len(self._drawn) < self.num_images and not bool(padding):
                self._drawn.append((prompt, image.float().cpu()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of `validate` or `test`."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        evaluation = next((one for one in callbacks if isinstance(one, Evaluation)), None)
        if trainer.state.fn not in STAGES or evaluation is None or not evaluation.measured:
            return
        weights = weights_of(as_student(pl_module))  # on all processes
        if trainer.is_global_zero:
            self._report(trainer, pl_module, evaluation, weights)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    def _report(
        self, trainer: Trainer, module: LightningModule, evaluation: Evaluation, weights: str
    ) -> None:
        student, seconds = as_student(module), time.perf_counter() - self._begin
        folder = run_dir(trainer) / str(trainer.state.fn.value)  # type: ignore[union-attr]
        folder.mkdir(parents=True, exist_ok=True)
        found = evaluation.last(trainer, student.student_steps, weights)
        assert found.drawn is not None
        count = len(found.drawn)
        timing = {
            "seconds": seconds, "images_per_second": count / seconds, "peak_memory_gib": peak_memory_gib(),
        }  # fmt: skip
        model = str(trainer.ckpt_path or student.parts.path)
        pictures = self._grid(trainer, folder, student.student_steps)
        publish(trainer, student, found, folder, model, timing, pictures)

    def _grid(self, trainer: Trainer, folder: Path, step: int) -> dict[str, Path]:
        """Lay out the first pictures, for the folder and the loggers; title and file, if there are any."""
        if not self._drawn:
            return {}
        images = torch.stack([image for _, image in self._drawn])
        grid = labelled_grid({"": images}, [prompt for prompt, _ in self._drawn])
        save_png(grid, folder / GRID)
        for logger in trainer.loggers:
            log_media(logger, _TITLE, grid, step)
        return {_TITLE: folder / GRID}
