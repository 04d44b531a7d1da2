"""Pictures to look at while a run goes on: the losses alone say nothing about progress."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from callbacks.evaluated import as_student, evaluating, evaluation_captions
from callbacks.logging_media import log_media
from callbacks.metrics.result_cache import ResultCache
from callbacks.metrics.teacher import PROTOCOL, Teacher
from callbacks.run_folder import run_dir
from common.errors import UserError
from common.hashing import hash_texts, to_uint8
from reports.run_report import student_row
from reports.sheets import labelled_grid, save_png


class Pictures(Callback, ABC):
    """Draws something every now and then: when and with which prompts and seeds, common to grids and views.

    Its arguments are those of SampleGrid.
    """

    stem = ""
    """File name before the step number."""
    tag = ""
    """Name of the picture in loggers."""

    def __init__(
        self,
        prompts: list[str] | None = None,
        num_images: int = 8,
        seed: int = 0,
        every_n_steps: int | None = None,
    ) -> None:
        if num_images < 1 or (every_n_steps is not None and every_n_steps < 1) or prompts == []:
            raise UserError(
                f"{type(self).__name__}: num_images and every_n_steps must be at least 1, prompts not empty"
            )
        self._given, self.num_images, self.seed, self.every_n_steps = prompts, num_images, seed, every_n_steps
        self._last_step: int | None = None

    def prompts_and_seeds(self, trainer: Trainer) -> tuple[list[str], list[int]]:
        """The prompts, and one seed for each."""
        prompts = self._given if self._given is not None else evaluation_captions(trainer)[: self.num_images]
        return list(prompts), [self.seed + i for i in range(len(prompts))]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw where the student starts from."""
        self.draw_once(trainer, pl_module)

    on_fit_end = on_train_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Draw if it is time."""
        if self.every_n_steps is not None and as_student(pl_module).student_steps % self.every_n_steps == 0:
            self.draw_once(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw unless drawings have a rhythm of their own."""
        if self.every_n_steps is None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.draw_once(trainer, pl_module)

    def draw_once(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw, save and send to the loggers, unless it was done at this step. Collective."""
        step = as_student(module).student_steps
        if step == self._last_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._last_step = step
        # All processes draw, because sharded networks need them all; rank zero keeps the result.
        image = self.draw(trainer, module)
        if trainer.is_global_zero:
            save_png(image, run_dir(trainer) / "samples" / f"{self.stem}{step}.png")
            for logger in trainer.loggers:
                log_media(logger, self.tag, image, step)

    @abstractmethod
    def draw(self, trainer: Trainer, module: LightningModule) -> Image.Image:
        """The sheet at this step."""


class SampleGrid(Pictures):
    """``samples/step_<n>.png``: the student's few steps beside the teacher's many, same prompts and seeds.

    Args:
        prompts: what to draw (default: the first captions of the evaluation).
        num_images: how many prompts to take where ``prompts`` is not given.
        seed: the picture of prompt i is drawn from seed ``seed + i``.
        every_n_steps: student updates between drawings; None draws after each validation. Start and end
            are always drawn.
        teacher_steps: of the teacher; its pictures are made once and cached.
        teacher_guidance: guidance scale of the teacher.
    """

    stem, tag = "step_", "samples"

    def __init__(
        self,
        prompts: list[str] | None = None,
        num_images: int = 8,
        seed: int = 0,
        every_n_steps: int | None = None,
        teacher_steps: int = 25,
        teacher_guidance: float = 4.5,
    ) -> None:
        super().__init__(prompts, num_images, seed, every_n_steps)
        self.teacher_steps, self.teacher_guidance = teacher_steps, teacher_guidance
        self._teacher_images: Tensor | None = None

    def draw(self, trainer: Trainer, module: LightningModule) -> Image.Image:
        """Student and teacher, side by side."""
        prompts, seeds = self.prompts_and_seeds(trainer)
        with evaluating(trainer, module):
            student = as_student(module)
            images = student.generator.images(prompts, seeds).cpu()
            if self._teacher_images is None:
                self._teacher_images = teacher_pictures(
                    trainer, student.parts.path, prompts, seeds, self.teacher_steps, self.teacher_guidance
                )
        views = {student_row(len(student.steps)).lower(): images,
                 f"teacher, {self.teacher_steps} steps": self._teacher_images}  # fmt: skip
        return labelled_grid(views, prompts)


def teacher_pictures(
    trainer: Trainer, path: str, prompts: list[str], seeds: list[int], steps: int, guidance_scale: float
) -> Tensor:
    """The teacher's pictures [B, 3, H, W], of 8-bit values in [0, 1], made once and cached."""
    teacher = Teacher(path, trainer.strategy.root_device, steps, guidance_scale)
    cache, key = ResultCache(), {
        "teacher": teacher.content_hash, "prompts": hash_texts(prompts), "seeds": seeds,
        "protocol": PROTOCOL, "steps": steps, "guidance_scale": guidance_scale,
        "precision": str(trainer.precision),
    }  # fmt: skip
    if (entry := cache.get("teacher-samples", key)) is not None:
        return entry.tensors["images"].float() / 255
    pixels = to_uint8(teacher.multistep(prompts, seeds)).cpu()
    if trainer.is_global_zero:
        cache.put("teacher-samples", key, {}, {"images": pixels})
    return pixels.float() / 255


class ScoreViews(Pictures):
    """``samples/score_views_step_<n>.png``: what student, teacher and fake score each see as x0.

    Args:
        prompts, num_images, seed, every_n_steps: as for SampleGrid.
    """

    stem, tag = "score_views_step_", "score_views"

    def draw(self, trainer: Trainer, module: LightningModule) -> Image.Image:
        """The three views, side by side."""
        prompts, seeds = self.prompts_and_seeds(trainer)
        with evaluating(trainer, module, own_weights=True):
            views = as_student(module).score_views(prompts, seeds)
        return labelled_grid({name: images.cpu() for name, images in views.items()}, prompts, columns=3)
