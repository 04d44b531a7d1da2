"""Measures the student during validation and, with the teacher beside it, at the end of training."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.evaluated import as_student, evaluating, evaluation_captions, evaluation_extras
from callbacks.loggers import MetricsCSV
from callbacks.metrics.base import ImageMetric, bind_metrics, place_metrics, refuse_repeated
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.manifest import run_manifest
from callbacks.metrics.measure import (
    FinalResults,
    Results,
    evaluate_model,
    milliseconds_per_image,
    require_finite,
)
from callbacks.metrics.reference import ReferenceSource, describe_reference, framed_reference
from callbacks.metrics.result_cache import ResultCache
from callbacks.metrics.teacher import Teacher, teacher_metrics
from common.errors import UserError
from datamodules.picture_files import Frame
from lightning_modules.networks.model_names import asset_path


class Evaluation(Callback):
    """Measures the pictures of validation and test steps, and everything once training is over.

    During validation it logs ``val/NAME``, during test ``test/NAME``. When ``fit`` ends it draws
    ``final_size`` pictures with the evaluation weights, measures them and both of the teacher's rows by the
    same code, and logs them as ``test/NAME`` (another sample count than the curve ``val/NAME``, so another
    bias).

    Args:
        scoring_clip: CLIP folder that sees the pictures for metrics that name no network.
        reference: folder of real pictures, or a file of their statistics (scripts/make_reference.py); None:
            no ``frechet_distance``.
        metrics: metric objects (default: FrechetDistance if there is a reference, and ClipScore).
        frame: crop and resize of drawn pictures, and of those in a reference folder; None: none.
        final_size: captions of the final evaluation, the first ones of the data module; 0 skips it.
        batch_size: pictures per pass and process in the final evaluation.
        seed: the picture of caption i is drawn from seed ``seed + i``, by student and teacher alike.
        teacher_rows: measure the teacher too.
        teacher_steps: DDIM steps of the teacher's first row.
        teacher_guidance: guidance scale of the teacher's first row.
        timing_batch_size: pictures per pass when milliseconds per image are taken.

    Raises:
        UserError: a number out of range; a folder or file missing; statistics of another CLIP.
    """

    def __init__(
        self,
        scoring_clip: str = "assets/emoji-clip",
        reference: str | None = "assets/cache/emoji-reference.safetensors",
        metrics: list[ImageMetric] | None = None,
        final_size: int = 1024,
        batch_size: int = 64,
        seed: int = 0,
        teacher_rows: bool = True,
        teacher_steps: int = 25,
        teacher_guidance: float = 4.5,
        timing_batch_size: int = 16,
        frame: Frame | None = None,
    ) -> None:
        for name, value, least in [
            ("final_size", final_size, 0),
            ("batch_size", batch_size, 1),
            ("teacher_steps", teacher_steps, 2),
            ("timing_batch_size", timing_batch_size, 1),
        ]:
            if value < least:
                raise UserError(f"Evaluation.{name} is {value}: it must be at least {least}")
        if metrics is None:
            metrics = [FrechetDistance(), ClipScore()] if reference is not None else [ClipScore()]
        refuse_repeated(metrics, "Evaluation.metrics")
        self.scoring_clip, self.reference_path, self.metrics = scoring_clip, reference, metrics
        self.final_size, self.batch_size, self.seed = final_size, batch_size, seed
        self.teacher_rows, self.teacher_steps = teacher_rows, teacher_steps
        self.teacher_guidance = teacher_guidance
        self.timing_batch_size, self.frame = timing_batch_size, frame
        self.extractor: ClipExtractor | None = None
        self.reference: ReferenceSource | None = None
        self._is_set_up = False
        self.final: FinalResults | None = None
        self._fed = False
        self.measured: Results = {}  # by the last validation or test

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the scoring CLIP and the reference, so that mistakes show before any training."""
        if self._is_set_up:
            return
        if any(metric.spec is None for metric in self.metrics):
            self.extractor = ClipExtractor(asset_path(self.scoring_clip))
        if self.reference_path is not None:
            self.reference = framed_reference(self.reference_path, self.frame)
        bind_metrics(self.metrics, self.extractor, self.reference, trainer.strategy.root_device)
        self._warn_if_not_comparable(evaluation_captions(trainer))
        self._is_set_up = True

    def _warn_if_not_comparable(self, captions: Sequence[str]) -> None:
        described = describe_reference(self.reference, captions) or {}
        if described.get("captions_are_those_of_the_evaluation") is False:
            rank_zero_warn(
                f"the evaluation captions are not those of the reference statistics {self.reference_path} "
                f"({described['source']}): frechet_distance is not comparable with published numbers; for "
                "your own captions make statistics of your own pictures with scripts/make_reference.py"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier pictures."""
        place_metrics(self.metrics, trainer.strategy.root_device)
        self._fed, self.measured = False, {}
        for metric in self.metrics:
            metric.reset()
            metric.prepare(evaluation_captions(trainer), *evaluation_extras(trainer))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the pictures of this step."""
        if not outputs or outputs.get("images") is None:
            return
        self._fed = True
        images, prompts, padding = outputs["images"], outputs["prompts"], outputs["is_padding"]
        if self.frame is not None:  # 8-bit pictures hold no NaN any more
            require_finite(images, outputs["indices"].tolist(), prompts, padding.tolist())
            images = self.frame.batch(images)
        for metric in self.metrics:
            metric.update(images, prompts, padding, outputs["indices"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log ``val/NAME``, or ``test/NAME`` during a test."""
        if trainer.sanity_checking or not self._fed:
            return
        prefix = "test" if trainer.testing else "val"
        for metric in self.metrics:
            results = metric.results()
            self.measured |= results
            for name, result in results.items():
                # The value is already that of all processes.
                pl_module.log(
                    f"{prefix}/{name}",
                    result["value"],
                    rank_zero_only=False,
                    sync_dist=False,
                    prog_bar=prefix == "val" and "/" not in name,
                    batch_size=1,
                )
            metric.reset()

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The final evaluation: after the last checkpoint, so that a run killed here can be completed."""
        self.finalize(trainer, pl_module)

    def finalize(self, trainer: Trainer, module: LightningModule) -> FinalResults | None:
        """Measure student and teacher once at this step; later calls return the same. Collective.

        Returns:
            The results, or None where no final evaluation is wanted (``final_size`` 0, ``fast_dev_run``).
        """
        student = as_student(module)
        if self.final is not None and self.final.step == student.student_steps:
            return self.final
        if self.final_size == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        every = evaluation_captions(trainer)
        captions = every[: self.final_size]
        seeds = [self.seed + i for i in range(len(captions))]
        place_metrics(self.metrics, trainer.strategy.root_device)
        with evaluating(trainer, module) as weights:
            draw = student.generator.images
            metrics = evaluate_model(
                draw, captions, self.metrics, self.batch_size, seeds, "student, 1 step",
                *self._extras(trainer),
            )  # fmt: skip
            metrics["milliseconds_per_image"] = milliseconds_per_image(draw, captions, self.timing_batch_size)
            rows = {}
            if self.teacher_rows:
                rows = self._teacher_rows(trainer, student.parts.path, captions, seeds)
        guidance = {"student": None, f"steps_{self.teacher_steps}": self.teacher_guidance, "steps_1": None}
        self.final = FinalResults(
            step=student.student_steps,
            weights=weights,
            metrics=metrics,
            teacher_metrics=rows,
            manifest=self.manifest(every, len(captions), self.seed, guidance, weights),
        )
        self._log_final(trainer)
        return self.final

    def manifest(
        self,
        every: list[str],
        count: int,
        first_seed: int,
        guidance: dict[str, float | None],
        weights: str,
    ) -> dict[str, Any]:
        """What a measurement must share with one of the first ``count`` captions to be comparable."""
        return run_manifest(
            self.metrics, self.extractor, self.reference, self.frame, every, count, first_seed, guidance,
            weights,
        )  # fmt: skip

    def _extras(self, trainer: Trainer) -> tuple[list[str] | None, list[str] | None, Frame | None]:
        groups, negatives = (
            None if texts is None else texts[: self.final_size] for texts in evaluation_extras(trainer)
        )
        return groups, negatives, self.frame

    def _teacher_rows(
        self, trainer: Trainer, path: str, captions: list[str], seeds: list[int]
    ) -> dict[str, Results]:
        rank_zero_info("Measuring the teacher (values are cached, times are taken on this machine) ...")
        teacher = Teacher(path, trainer.strategy.root_device, self.teacher_steps, self.teacher_guidance)
        precision = str(trainer.precision)
        rows = teacher_metrics(
            teacher, captions, seeds, self.metrics, self.batch_size, ResultCache(), precision,
            extras=self._extras(trainer),
        )  # fmt: skip
        for row, (draw, _) in teacher.rows.items():
            rows[row]["milliseconds_per_image"] = milliseconds_per_image(
                draw, captions, self.timing_batch_size
            )
        teacher.release()
        return rows

    def _log_final(self, trainer: Trainer) -> None:
        assert self.final is not None
        measured = {k: v for k, v in self.final.metrics.items() if k != "milliseconds_per_image"}
        values = {f"test/{name}": result["value"] for name, result in measured.items()}
        step = self.final.step
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
            if isinstance(logger, MetricsCSV):
                logger.flush()
