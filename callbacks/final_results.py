"""What the last evaluation of a run found, and what another one must share with it to be comparable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from callbacks.hashing import hash_texts
from callbacks.references import describe_reference

if TYPE_CHECKING:
    from callbacks.evaluation import Evaluation

Result = dict[str, Any]


@dataclass(frozen=True)
class FinalResults:
    """What the last evaluation of a run found.

    Attributes:
        step: student updates done. ``weights``: "ema" or "online".
        metrics: ``{name: {"value", "num_images", "details"}}`` of the student.
        teacher_metrics: the same for each of the teacher's rows; empty if they were not asked for.
        manifest: what a comparable measurement must share with this one.
    """

    step: int
    weights: str
    metrics: dict[str, Result]
    teacher_metrics: dict[str, dict[str, Result]]
    manifest: dict[str, Any]


def run_manifest(
    evaluation: Evaluation, captions: list[str], every: list[str], weights: str
) -> dict[str, Any]:
    """What a measurement must share with the final one of a run to be comparable."""
    sight: dict[str, Any] = {metric.name: metric.extractor.name for metric in evaluation.metrics}
    resize = {metric.name: metric.extractor.preprocessing.describe() for metric in evaluation.metrics}
    if evaluation.extractor is not None:
        sight = {"name": evaluation.extractor.name, "hash": evaluation.extractor.content_hash}
    return {
        "captions": {
            "count": len(captions),
            "hash": hash_texts(captions),
            "hash_of_all": hash_texts(every),
        },
        "reference": describe_reference(evaluation.reference, every),
        "extractor": sight,
        "crop_and_resize": "; ".join(
            [
                *([evaluation.frame.describe()] if evaluation.frame is not None else []),
                *dict.fromkeys(resize.values()),
            ]
        ),
        "seeds": {"first": evaluation.seed, "count": len(captions), "rule": "first + index of the caption"},
        "guidance": {
            "student": None,
            f"steps_{evaluation.teacher_steps}": evaluation.teacher_guidance,
            "steps_1": None,
        },
        "metric_versions": {metric.name: metric.version for metric in evaluation.metrics},
        "weights": weights,
    }
