"""The report of `evaluate`: manifest, what is told about each number, loggers, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import Logger
from PIL import Image

from callbacks.logging_media import Table, log_media
from callbacks.metrics.base import ImageMetric
from callbacks.metrics.binding import describe_reference
from callbacks.metrics.measure import Stopwatch
from common.environment import environment, peak_memory_gib
from common.hashing import hash_texts
from common.processes import rank_and_world_size
from datamodules.evaluation_sets import EvaluationSet
from lightning_modules.drawing import Drawer
from reports.published import deviations, label, open_questions, published_rows
from reports.run_report import Report

if TYPE_CHECKING:
    from callbacks.evaluation import Evaluation


Results = dict[str, dict[str, Any]]
KIND = "evaluation"


def evaluation_key(
    evaluation_set: EvaluationSet, drawer: Drawer, metrics: Sequence[ImageMetric]
) -> dict[str, Any]:
    """All that the numbers depend on: the core of the manifest, shared by what is unfinished."""
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
        "model": {"pictures": drawer.title, "weights": drawer.weights, **drawer.identity},
        "crop_and_resize": frame.describe() if frame is not None else "none before those of the networks",
        "metrics": {metric.name: metric.key() for metric in metrics},
    }


def seeds_in_words(evaluation_set: EvaluationSet, drawer: Drawer) -> str:
    """The rule of the seeds."""
    if not drawer.seeded:
        return "given pictures"
    seeds = evaluation_set.seeds
    if seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} + place of the caption"
    return f"{min(seeds)} to {max(seeds)}, listed by the set"


def annotated(results: Results, evaluation_set: EvaluationSet, drawer: Drawer) -> Results:
    """The results with what a reader needs beside each: name, reference, seeds, deviations."""
    told: Results = {}
    for name, result in results.items():
        details = dict(result["details"])
        count, digest = details.get("reference_num_images"), str(details.get("reference_hash", ""))
        found = deviations(name, result, evaluation_set)
        if found is not None:
            found = found + [f"open: {text}" for text in open_questions(name, evaluation_set)]
        if "differs" in details:  # from the paper that introduced the metric
            found = [*(found or []), str(details["differs"])]
        told[name] = result | {
            "details": details
            | {
                "label": label(name, evaluation_set),
                "reference": f"{count:,} real pictures ({digest[:12]})" if count is not None else "none",
                "seeds": seeds_in_words(evaluation_set, drawer),
                "differs_from_published": found,
            }
        }
    return told


def timing(watch: Stopwatch, seconds: float, count: int) -> dict[str, Any]:
    """Where the time went on this process; ``seconds`` is the wall time of all of it."""
    return {
        "seconds": seconds,
        "images_per_second": count / seconds if seconds > 0 else None,
        **{f"{name}_seconds": value for name, value in asdict(watch).items() if name != "images"},
        "peak_memory_gib": peak_memory_gib(),
    }


def make_report(
    results: Results,
    evaluation_set: EvaluationSet,
    drawer: Drawer,
    manifest: Mapping[str, Any],
    timing: Mapping[str, Any],
    pictures: Mapping[str, Path],
    device: torch.device,
    config_path: Path,
) -> Report:
    """The report of one evaluation; ``results`` are the annotated ones."""
    processes = rank_and_world_size()[1]
    content = {
        "experiment": evaluation_set.name,
        "step": drawer.step,
        "weights": drawer.weights,
        "model": drawer.model,
        "metrics": results,
        "teacher_metrics": {},
        "timing": dict(timing),
        "environment": environment() | {"accelerator": device.type, "processes": processes},
        "config_path": str(config_path),
    }
    published = tuple(
        (name, row.model, row.values[name], row.source)
        for name, row in published_rows(results, evaluation_set)
    )
    return Report(content, {"kind": KIND, **manifest}, dict(pictures), row=drawer.title, published=published)


def send(report: Report, loggers: Sequence[Logger], table: tuple[list[str], list[list[str]]]) -> None:
    """Scalars ``test/NAME``, the table and the pictures, to all loggers that take them."""
    values = {f"test/{name}": result["value"] for name, result in report.content["metrics"].items()}
    step = report.content["step"] or 0
    images = {title: Image.open(path) for title, path in report.pictures.items()}
    for logger in loggers:
        logger.log_metrics(values, step=step)
        log_media(logger, "results", Table(*table), step)
        for title, image in images.items():
            log_media(logger, title, image, step)
        logger.finalize("success")


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
