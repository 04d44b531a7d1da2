"""Reports of what was measured, and the manifests beside them: one builder for runs and for `evaluate`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.measure import Results
from common.environment import command_line, commit, environment
from common.hashing import hash_texts
from datamodules.evaluation_sets import EvaluationSet
from reports.published import deviations, label, published_rows, remarks
from reports.run_report import Report


def make_report(
    subject: Mapping[str, Any],
    results: Results,
    manifest: Mapping[str, Any],
    timing: Mapping[str, Any],
    pictures: Mapping[str, Path],
    *,
    machine: Mapping[str, Any],
    seeds: str,
    teacher: Mapping[str, Results] | None = None,
    fewer_steps: Mapping[str, Results] | None = None,
    curves: Path | None = None,
    evaluation_set: EvaluationSet | None = None,
    row: str = "Student, 1 step",
) -> Report:
    """The report of one measurement.

    Args:
        subject: what was measured: ``experiment``, ``step``, ``weights``, ``model``, ``config_path``.
        results: by metric; ``teacher``: the same for each of the teacher's rows.
        fewer_steps: the same for the student in fewer of its steps.
        manifest: what a comparable measurement must share.
        timing: where the time went. ``machine``: accelerator, processes and more.
        pictures: titles to PNG files; ``curves``: a metrics.csv.
        seeds: their rule, in words.
        evaluation_set: what was drawn, if it may have a published protocol; a run's own captions have none.
        row: title in the table.
    """
    told = {name: _told(name, result, seeds, evaluation_set) for name, result in results.items()}
    content = dict(subject) | {
        "metrics": told,
        "teacher_metrics": dict(teacher or {}),
        "timing": dict(timing),
        "environment": environment() | dict(machine),
        "command": command_line(),
        "commit": commit(),
    }
    if fewer_steps:
        content["student_metrics"] = dict(fewer_steps)
    rows = [] if evaluation_set is None else published_rows(told, evaluation_set)
    published = tuple((name, row.model, row.values[name], row.source) for name, row in rows)
    return Report(content, dict(manifest), dict(pictures), curves, row, published)


def _told(name: str, result: Mapping[str, Any], seeds: str, drawn: EvaluationSet | None) -> dict[str, Any]:
    """A result with what a reader needs beside it: name, reference, seeds, deviations from its paper.

    Times stay as they are.
    """
    details = dict(result["details"])
    if "extractor" not in details:
        return dict(result)
    found = None
    if drawn is not None:
        details["label"] = label(name, drawn)
        found = deviations(name, result, drawn)
        if found is not None:
            found = found + remarks(name, drawn)
    if "differs" in details:  # from the paper that introduced the metric
        found = [*(found or []), str(details["differs"])]
    count, digest = details.get("reference_num_images"), str(details.get("reference_hash", ""))
    details |= {
        "reference": f"{count:,} real pictures ({digest[:12]})" if count is not None else "none",
        "seeds": seeds,
        "differs_from_published": found,
    }
    return dict(result) | {"details": details}


def set_manifest(
    drawn: EvaluationSet, model: Mapping[str, Any], metrics: Sequence[ImageMetric]
) -> dict[str, Any]:
    """All that the numbers of `evaluate` depend on; shared by what is unfinished.

    Args:
        drawn: the captions.
        model: all that the pictures depend on beside that.
        metrics: bound.
    """
    frame, negatives, groups = drawn.frame, drawn.negatives, drawn.groups
    return {
        "evaluation_set": {
            "name": drawn.name,
            "count": len(drawn),
            "hash_of_captions": hash_texts(drawn.captions),
            "hash_of_seeds": hash_texts([str(seed) for seed in drawn.seeds]),
            **({} if negatives is None else {"hash_of_negative_prompts": hash_texts(negatives)}),
            **({} if groups is None else {"hash_of_groups": hash_texts(groups)}),
            **drawn.facts,
        },
        "model": dict(model),
        "crop_and_resize": frame.describe() if frame is not None else "none before those of the networks",
        "metrics": {metric.name: metric.key() for metric in metrics},
    }


def seeds_in_words(seeds: Sequence[int]) -> str:
    """The rule of the seeds of an evaluation."""
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} + place of the caption"
    return f"{min(seeds)} to {max(seeds)}, listed by the set"
