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


def told(results: dict[str, Result], first_seed: int) -> dict[str, Result]:
    """Results with what a reader needs beside each number: reference, seeds, what differs from its paper.

    A run's own captions belong to no published protocol. Times stay as they are.
    """
    found: dict[str, Result] = {}
    for name, result in results.items():
        details = dict(result["details"])
        if "extractor" in details:
            count, digest = details.get("reference_num_images"), str(details.get("reference_hash", ""))
            details |= {
                "reference": f"{count:,} real pictures ({digest[:12]})" if count is not None else "none",
                "seeds": f"{first_seed} + place of the caption",
                "differs_from_published": [details["differs"]] if "differs" in details else None,
            }
        found[name] = result | {"details": details}
    return found


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
