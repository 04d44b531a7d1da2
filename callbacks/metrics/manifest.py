"""Reports of what was measured, and the manifests beside them: one builder for runs and for `evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.extractors import FeatureExtractor
from callbacks.metrics.measure import Results
from callbacks.metrics.reference import ReferenceSource, describe_reference
from common.environment import environment
from common.hashing import hash_texts
from datamodules.evaluation_sets import EvaluationSet
from datamodules.picture_files import Frame
from reports.published import deviations, label, open_questions, published_rows
from reports.run_report import Report


@dataclass(frozen=True)
class Subject:
    """What was measured, and where that ran.

    Attributes:
        experiment: its name. ``step``: student updates, where they are known.
        weights: "ema", "online", "as stored" or "given pictures".
        model: path or name. ``config_path``: of the file that repeats it.
        machine: accelerator, processes and more, for the report's environment.
        seeds: their rule, in words.
        row: title in the table.
    """

    experiment: str
    step: int | None
    weights: str
    model: str
    config_path: Path
    machine: Mapping[str, Any]
    seeds: str
    row: str = "Student, 1 step"


def make_report(
    subject: Subject,
    results: Results,
    manifest: Mapping[str, Any],
    timing: Mapping[str, Any],
    pictures: Mapping[str, Path],
    teacher: Mapping[str, Results] | None = None,
    curves: Path | None = None,
    evaluation_set: EvaluationSet | None = None,
) -> Report:
    """The report of one measurement.

    Args:
        subject: what was measured.
        results: by metric; ``teacher``: the same for each of the teacher's rows.
        manifest: what a comparable measurement must share.
        timing: where the time went.
        pictures: titles to PNG files; ``curves``: a metrics.csv.
        evaluation_set: what was drawn, if it may have a published protocol; a run's own captions have none.
    """
    told = explained(results, subject.seeds, evaluation_set)
    content = {
        "experiment": subject.experiment,
        "step": subject.step,
        "weights": subject.weights,
        "model": subject.model,
        "metrics": told,
        "teacher_metrics": dict(teacher or {}),
        "timing": dict(timing),
        "environment": environment() | dict(subject.machine),
        "config_path": str(subject.config_path),
    }
    rows = [] if evaluation_set is None else published_rows(told, evaluation_set)
    published = tuple((name, row.model, row.values[name], row.source) for name, row in rows)
    return Report(content, dict(manifest), dict(pictures), curves, subject.row, published)


def explained(results: Results, seeds: str, evaluation_set: EvaluationSet | None = None) -> Results:
    """The results with what a reader needs beside each: name, reference, seeds, deviations from its paper.

    Times stay as they are.
    """
    told: Results = {}
    for name, result in results.items():
        details = dict(result["details"])
        if "extractor" in details:
            found = None
            if evaluation_set is not None:
                details["label"] = label(name, evaluation_set)
                found = deviations(name, result, evaluation_set)
                if found is not None:
                    found = found + [f"open: {text}" for text in open_questions(name, evaluation_set)]
            if "differs" in details:  # from the paper that introduced the metric
                found = [*(found or []), str(details["differs"])]
            count, digest = details.get("reference_num_images"), str(details.get("reference_hash", ""))
            details |= {
                "reference": f"{count:,} real pictures ({digest[:12]})" if count is not None else "none",
                "seeds": seeds,
                "differs_from_published": found,
            }
        told[name] = result | {"details": details}
    return told


def set_manifest(
    evaluation_set: EvaluationSet, model: Mapping[str, Any], metrics: Sequence[ImageMetric]
) -> dict[str, Any]:
    """All that the numbers of `evaluate` depend on; shared by what is unfinished.

    Args:
        evaluation_set: what is drawn.
        model: all that the pictures depend on beside that.
        metrics: bound.
    """
    frame, negatives, groups = evaluation_set.frame, evaluation_set.negatives, evaluation_set.groups
    return {
        "evaluation_set": {
            "name": evaluation_set.name,
            "count": len(evaluation_set),
            "hash_of_captions": hash_texts(evaluation_set.captions),
            "hash_of_seeds": hash_texts([str(seed) for seed in evaluation_set.seeds]),
            **({} if negatives is None else {"hash_of_negative_prompts": hash_texts(negatives)}),
            **({} if groups is None else {"hash_of_groups": hash_texts(groups)}),
            **evaluation_set.facts,
        },
        "model": dict(model),
        "crop_and_resize": frame.describe() if frame is not None else "none before those of the networks",
        "metrics": {metric.name: metric.key() for metric in metrics},
    }


def run_manifest(
    metrics: Sequence[ImageMetric],
    extractor: FeatureExtractor | None,
    reference: ReferenceSource | None,
    frame: Frame | None,
    every: Sequence[str],
    count: int,
    first_seed: int,
    guidance: Mapping[str, float | None],
    weights: str,
) -> dict[str, Any]:
    """What a measurement must share with one of a run to be comparable.

    Args:
        metrics: bound; ``extractor``: of those that name no network.
        reference, frame: of the evaluation.
        every: all evaluation captions of the run's data; the first ``count`` were drawn.
        first_seed: caption i was drawn from ``first_seed + i``.
        guidance: of student and teacher. ``weights``: "ema" or "online".
    """
    sight: dict[str, Any] = {metric.name: metric.extractor.name for metric in metrics}
    resize = [frame.describe()] if frame is not None else []
    resize += dict.fromkeys(metric.extractor.preprocessing.describe() for metric in metrics)
    if extractor is not None:
        sight = {"name": extractor.name, "hash": extractor.content_hash}
    return {
        "captions": {
            "count": count,
            "hash": hash_texts(every[:count]),
            "hash_of_all": hash_texts(every),
        },
        "reference": describe_reference(reference, every),
        "extractor": sight,
        "crop_and_resize": "; ".join(resize),
        "seeds": {"first": first_seed, "count": count, "rule": "first + index of the caption"},
        "guidance": dict(guidance),
        "metric_versions": {metric.name: metric.version for metric in metrics},
        "weights": weights,
    }


def seeds_in_words(seeds: Sequence[int]) -> str:
    """The rule of the seeds of an evaluation."""
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} + place of the caption"
    return f"{min(seeds)} to {max(seeds)}, listed by the set"
