"""Measures the student during validation and, with the teacher beside it, at the end of training."""

from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.evaluated import (
    Student,
    as_student,
    evaluating,
    evaluation_captions,
    evaluation_set,
    measured_captions,
    shown_set,
)
from callbacks.loggers import MetricsCSV
from callbacks.metrics.base import ImageMetric, bind_metrics, place_metrics, refuse_repeated
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.extractors import FeatureExtractor, shared_extractor
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.measure import Results, measure_set, milliseconds_per_image, require_finite
from callbacks.metrics.reference import ReferenceSource, describe_reference, framed_reference
from callbacks.metrics.result_cache import ResultCache
from callbacks.metrics.teacher import Teacher, teacher_metrics
from common.errors import UserError
from common.hashing import hash_texts
from common.processes import from_every_rank, say
from datamodules.evaluation_sets import EvaluationSet
from datamodules.picture_files import Frame
from lightning_modules.networks.model_names import asset_path
from reports.run_report import student_row

_LONGEST_REASON = 400
"""Characters: open_clip lists all networks that it knows."""
Guidance = dict[str, float | None]


@dataclass(frozen=True)
class FinalResults:
    """What an evaluation of a run found.

    Attributes:
        step: student updates done. ``weights``: "ema" or "online".
        metrics: results of the student; ``teacher_metrics``: of each of the teacher's rows, if it was asked.
        fewer_steps: of a student of several steps, results in 1 and 2 of them (``steps_1``, ``steps_2``).
        manifest: what a comparable measurement must share with this one.
        drawn: the captions, with the published protocol that they may have.
    """

    step: int
    weights: str
    metrics: Results = field(default_factory=dict)
    teacher_metrics: dict[str, Results] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    fewer_steps: dict[str, Results] = field(default_factory=dict)
    drawn: EvaluationSet | None = None


class Evaluation(Callback):
    """Measures the pictures of validation and test steps, and everything once training is over.

    During validation it logs ``val/NAME``, during test ``test/NAME``. When ``fit`` ends it draws
    ``final_size`` pictures with the evaluation weights, measures them and both of the teacher's rows by the
    same code, and logs them as ``test/NAME`` (another sample count than the curve ``val/NAME``, so another
    bias).

    Args:
        scoring_clip: CLIP folder that sees the pictures for metrics that name no network.
        reference: folder of real pictures, or a file of their statistics (scripts/make_reference.py); None:
            the data module's ``eval_reference``, if it has one.
        metrics: metric objects (default: FrechetDistance if there is a ``reference``, and ClipScore).
        frame: crop and resize of drawn pictures, and of those in a reference folder; None: that of the data
            module's ``eval_set``, if it has one.
        leave_out: leave out, with one line that says how to get it, what lacks real pictures, or a network
            for which no file is named and none is found; otherwise that is refused.
        final_size: captions of the final evaluation, the first ones of the data module (all, if it has no
            more), of grouped ones as many of each group; 0 skips it.
        batch_size: pictures per pass and process in the final evaluation.
        seed: the picture of caption i is drawn from seed ``seed + i``, by student and teacher alike.
        teacher_rows: measure the teacher too.
        teacher_steps: of the teacher's first row, by DDIM or Euler's method.
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
        leave_out: bool = False,
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
        self.timing_batch_size, self.frame, self.leave_out = timing_batch_size, frame, leave_out
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
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.frame = self.frame or getattr(data, "eval_frame", None)
        self.reference_path = self.reference_path or getattr(data, "eval_reference", None)
        if any(metric.spec is None for metric in self.metrics):
            self.extractor = ClipExtractor(asset_path(self.scoring_clip))
        if self.reference_path is not None:
            self.reference = framed_reference(self.reference_path, self.frame)
        loaded = self._leave_out(data) if self.leave_out else []
        bind_metrics(self.metrics, self.extractor, self.reference, trainer.strategy.root_device)
        loaded.clear()  # the metrics hold them now
        if stage == "fit" and self.final_size:  # at the end it would be too late
            last = evaluation_set(trainer, self.final_size, self.seed, self.frame)
            for metric in self.metrics:
                metric.prepare(last.captions, last.groups, last.negatives)
        self._rest(trainer)
        described = describe_reference(self.reference, evaluation_captions(trainer)) or {}
        if described.get("captions_are_those_of_the_evaluation") is False:
            rank_zero_warn(
                f"the evaluation captions are not those of the reference statistics {self.reference_path} "
                f"({described['source']}): frechet_distance is not comparable with published numbers; for "
                "your own captions make statistics of your own pictures with scripts/make_reference.py"
            )
        self._is_set_up = True

    def _leave_out(self, data: Any) -> list[FeatureExtractor]:
        """Keep the metrics that can measure, the same on all processes; returns their networks.

        Raises:
            UserError: a named file can't be used.
        """
        loaded, kept, reasons = [], [], dict[str, list[str]]()
        for metric in self.metrics:
            failure = None
            if metric.needs_reference and self.reference is None and metric.reference_path is None:
                failure = "no real pictures: data.eval_reference is not set"
            elif metric.spec is not None:
                try:
                    loaded.append(shared_extractor(metric.spec))
                except UserError as error:
                    if any(isinstance(part, Path) for part in metric.spec):  # somebody has named it
                        raise
                    failure = str(error)
            if failure := next(filter(None, from_every_rank(failure)), None):
                reasons.setdefault(shorten(failure, _LONGEST_REASON), []).append(metric.name)
            else:
                kept.append(metric)
        self.metrics = kept
        lines = [f"{', '.join(names)} left out ({reason})" for reason, names in reasons.items()]
        if getattr(data, "lacks_eval_set", False):
            count = len(data.eval_captions)
            lines.insert(0, f"only the {count} of data.eval_captions drawn (no data.eval_set.captions)")
        if lines:
            where = "For COCO, configs/data/coco.yaml takes both paths and says where the files are"
            say(f"Evaluation: {'; '.join(lines)}. {where}")
        return loaded

    def _rest(self, trainer: Trainer) -> None:
        """Leave a GPU's memory to the training."""
        for metric in self.metrics if trainer.strategy.root_device.type == "cuda" else ():
            metric.extractor.to("cpu")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier pictures."""
        place_metrics(self.metrics, trainer.strategy.root_device)
        self._fed, self.measured = False, {}
        shown = shown_set(trainer)
        for metric in self.metrics:
            metric.reset()
            metric.prepare(shown.captions, shown.groups, shown.negatives)

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
        require_finite(images, outputs["indices"].tolist(), prompts)
        if self.frame is not None:
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
        self._rest(trainer)

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
        drawn = evaluation_set(trainer, self.final_size, self.seed, self.frame)
        place_metrics(self.metrics, trainer.strategy.root_device)
        with evaluating(trainer, module) as weights:
            count, fewer = len(student.steps), {}
            metrics = self._student_row(student, drawn, count)
            for less in (1, 2):
                if less < count and (not student.steps.counts or less in student.steps.counts):
                    with student.generator.taking(less):
                        fewer[f"steps_{less}"] = self._student_row(student, drawn, less)
            is_asked = self.teacher_rows and self.metrics
            rows = self._teacher_rows(trainer, student.parts.path, drawn) if is_asked else {}
        guidance = {"student": None, f"steps_{self.teacher_steps}": self.teacher_guidance, "steps_1": None}
        manifest = self.manifest(trainer, drawn, self.seed, guidance, weights)
        self.final = FinalResults(student.student_steps, weights, metrics, rows, manifest, fewer, drawn)
        self._rest(trainer)
        self._log_final(trainer, self.final)
        return self.final

    def last(self, trainer: Trainer, step: int, weights: str) -> FinalResults:
        """What the last validation or test has measured, after ``step`` updates."""
        count = max(result["num_images"] for result in self.measured.values())
        # the validation step draws caption i from seed i, whatever the seed of the final evaluation
        shown = shown_set(trainer, self.frame)
        drawn = shown.take(range(min(count, len(shown))))
        manifest = self.manifest(trainer, drawn, 0, {"student": None}, weights)
        return FinalResults(step, weights, self.measured, manifest=manifest, drawn=drawn)

    def _student_row(self, student: Student, drawn: EvaluationSet, steps: int) -> Results:
        draw = student.generator.images
        found: Results = {}
        if self.metrics:
            found = measure_set(draw, drawn, self.metrics, self.batch_size, student_row(steps).lower())
        found["milliseconds_per_image"] = milliseconds_per_image(draw, drawn.captions, self.timing_batch_size)
        return found

    def _teacher_rows(self, trainer: Trainer, path: str, drawn: EvaluationSet) -> dict[str, Results]:
        rank_zero_info("Measuring the teacher (values are cached, times are taken on this machine) ...")
        teacher = Teacher(path, trainer.strategy.root_device, self.teacher_steps, self.teacher_guidance)
        precision = str(trainer.precision)
        rows = teacher_metrics(teacher, drawn, self.metrics, self.batch_size, ResultCache(), precision)
        for row, (draw, _) in teacher.rows.items():
            rows[row]["milliseconds_per_image"] = milliseconds_per_image(
                draw, drawn.captions, self.timing_batch_size
            )
        teacher.release()
        return rows

    def _log_final(self, trainer: Trainer, final: FinalResults) -> None:
        measured = {k: v["value"] for k, v in final.metrics.items() if k != "milliseconds_per_image"}
        for logger in trainer.loggers:
            logger.log_metrics({f"test/{name}": value for name, value in measured.items()}, step=final.step)
            if isinstance(logger, MetricsCSV):
                logger.flush()

    def manifest(
        self, trainer: Trainer, drawn: EvaluationSet, first_seed: int, guidance: Guidance, weights: str
    ) -> dict[str, Any]:
        """What a measurement must share with one of these captions to be comparable.

        Args:
            drawn: caption i of them was drawn from ``first_seed + i``.
            guidance: of student and teacher. ``weights``: "ema" or "online".
        """
        every = measured_captions(trainer)
        own = {
            metric.name: metric.reference.describe()
            for metric in self.metrics
            if metric.needs_reference and metric.reference_path is not None
        }
        settings = {metric.name: found for metric in self.metrics if (found := metric.settings())}
        frame = [self.frame.describe()] if self.frame is not None else []
        resize = dict.fromkeys(metric.extractor.preprocessing for metric in self.metrics)
        return {
            "captions": {
                "count": len(drawn),
                "hash": hash_texts(drawn.captions),
                "hash_of_all": hash_texts(every),
            },
            "reference": describe_reference(self.reference, every),
            **({"references_of_metrics": own} if own else {}),
            "extractors": {
                metric.name: {"name": metric.extractor.name, "hash": metric.extractor.content_hash}
                for metric in self.metrics
            },
            "crop_and_resize": "; ".join([*frame, *resize]),
            "seeds": {"first": first_seed, "count": len(drawn), "rule": "first + index of the caption"},
            "guidance": guidance,
            "metric_versions": {metric.name: metric.version for metric in self.metrics},
            **({"metric_settings": settings} if settings else {}),
            "weights": weights,
        }
