"""`merge`: theta = lambda theta_A + (1 - lambda) theta_B of two students, measured over a grid if wanted."""

import argparse
import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import torch

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.measure import evaluate_model
from callbacks.metrics.reference import ReferenceStatistics
from common.environment import environment
from common.errors import UserError
from common.files import check_output_folder, filled_at_once
from common.hashing import hash_texts
from datamodules.prompts import EVAL_CAPTIONS, read_prompts
from lightning_modules.generator import make_generator
from lightning_modules.networks.interpolation import (
    check_weight,
    merge_students,
    merged_weights,
    stored_dtype,
)
from lightning_modules.networks.loading import asset_path
from lightning_modules.networks.pipeline_folder import (
    FOLDER_NAMES,
    export_student,
    is_own_export,
    without_place,
)
from lightning_modules.networks.student import LoadedStudent, is_checkpoint, load_student, student_path
from reports.merge_report import MergePoint, MergeReport, findings, text_table, write_merge_report

BATCH_SIZE = 64
MOST_POINTS = 101
SHOWN_PROMPTS = 6
_GRID = "Give START:STOP:STEP, e.g. --evaluate 0:1:0.25 (and --evaluate=-0.5:1.5:0.5 for a negative start)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `merge`."""
    add = parser.add_argument
    model = "a run folder (its best.ckpt, else last.ckpt), a .ckpt file, or a diffusers pipeline folder"
    add("--first", required=True, help=f"model A: {model}")
    add("--second", required=True, help="model B, of the same architecture: the same choice")
    add(
        "--weight",
        type=float,
        default=0.5,
        help="lambda of lambda * first + (1 - lambda) * second: 1 is the first, 0 the second; others than 0 "
        "to 1 extrapolate (default: %(default)s)",
    )
    add(
        "--output",
        required=True,
        type=Path,
        help="pipeline folder to write, in the dtype the first is stored in; a former export is replaced",
    )
    add(
        "--weights",
        choices=["ema", "online"],
        help="averaged or last weights of checkpoints (default: ema if the run had it)",
    )
    add(
        "--evaluate",
        metavar="START:STOP:STEP",
        help="also draw and measure for these lambdas (and that of --weight), e.g. 0:1:0.25; writes "
        "merge.json, merge.md, merge.html and merge_samples.png into the output folder",
    )
    group = parser.add_argument_group("with --evaluate")
    add = group.add_argument
    add(
        "--captions",
        default=str(EVAL_CAPTIONS),
        help="file with one caption a line (default: the bundled ones)",
    )
    add("--scoring-clip", default="assets/emoji-clip", help="CLIP folder that judges (default: %(default)s)")
    add(
        "--reference",
        default="assets/cache/emoji-reference.safetensors",
        help="statistics of real pictures by that CLIP (default: %(default)s)",
    )
    add("--num-images", type=int, help="pictures per lambda, of the first captions (default: all captions)")
    add(
        "--seed",
        type=int,
        default=0,
        help="of the first picture; picture i has seed + i (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Merge, measure if asked to, and write everything at the end.

    Raises:
        UserError: an unusable option, model or output folder, or models that do not fit; nothing is written.
    """
    check_weight(options.weight)
    with _told_in_one_line():
        grid = parse_grid(options.evaluate, options.weight) if options.evaluate is not None else []
    judge = load_judge(options) if grid else None
    paths = [student_path(options.first), student_path(options.second)]
    target = _check_output(options.output, paths)
    first, second = _load(paths, options.weights)
    dtype = stored_dtype(paths[0])
    _say_dtypes(paths, dtype)
    with _told_in_one_line():
        merged = merge_students(first, second, options.weight, dtype)
    merged.facts |= {"first": without_place(options.first), "second": without_place(options.second)}
    report = None
    if judge is not None:
        points = measure(first, second, merged, grid, dtype, judge)
        report = _report(merged, points, dtype, judge)
    export_student(
        merged.parts.denoiser, merged.parts, merged.start_timestep, options.output, dtype, merged.facts
    )
    print(f"Merged {options.weight:g} * first + {1 - options.weight:g} * second into {options.output}.")
    if report is not None:
        with filled_at_once(target) as folder:
            write_merge_report(report, folder)
        print("\n".join(["", text_table(report), "", *findings(report), f"Report: {target / 'merge.html'}"]))


def parse_grid(text: str, weight: float) -> list[float]:
    """The lambdas of START:STOP:STEP, both ends included, and `weight`, ascending.

    Computed in decimals, so that 0:1:0.1 holds 0.3 and not 0.30000000000000004.

    Raises:
        UserError: not three finite numbers, the step is not positive or does not lead to STOP, or the grid
            has more than 101 points.
    """
    try:
        start, stop, step = (Decimal(word.strip()) for word in text.split(":"))
        finite = all(number.is_finite() for number in (start, stop, step))
    except (InvalidOperation, ValueError) as error:
        raise UserError(f"--evaluate {text!r} is not a grid of three numbers. {_GRID}") from error
    if not finite or step <= 0 or stop < start:
        raise UserError(f"--evaluate {text!r} needs finite numbers, START <= STOP and STEP above 0. {_GRID}")
    count = (stop - start) / step
    if count > MOST_POINTS - 1:
        raise UserError(f"--evaluate {text!r} has more than {MOST_POINTS} points. Take a larger step.")
    if count != int(count):
        raise UserError(f"--evaluate {text!r} does not arrive at {stop} in steps of {step}. {_GRID}")
    values = {float(start + i * step) for i in range(int(count) + 1)}
    if start < 0 or stop > 1:
        warnings.warn(f"--evaluate {text} leaves [0, 1]: that extrapolates beyond both models.", stacklevel=2)
    return sorted(values | {weight})


@dataclass(frozen=True)
class Judge:
    """Captions, seeds and bound metrics: what every lambda is measured with."""

    captions: list[str]
    seeds: list[int]
    metrics: list[ImageMetric]
    extractor: ClipExtractor
    manifest: dict[str, Any]


def load_judge(options: argparse.Namespace) -> Judge:
    """Read captions, scoring CLIP and reference, before any long work.

    Raises:
        UserError: one of them is missing, damaged, or does not fit the others.
    """
    every = read_prompts(asset_path(options.captions))
    count = len(every) if options.num_images is None else options.num_images
    if not 2 <= count <= len(every):
        raise UserError(
            f"--num-images {count} can't be drawn: {options.captions} has {len(every)} captions, and a "
            "Fréchet distance needs at least 2 pictures. Give a number in between, or more captions."
        )
    if options.seed < 0:
        raise UserError("--seed must not be negative.")
    extractor = ClipExtractor(asset_path(options.scoring_clip))
    reference = ReferenceStatistics.load(asset_path(options.reference))
    metrics: list[ImageMetric] = [FrechetDistance(), ClipScore()]
    for metric in metrics:
        metric.bind(extractor, reference)
    captions, hash_of_all = every[:count], hash_texts(every)
    same = reference.captions_hash == hash_of_all
    manifest = {
        "captions": {"count": count, "hash": hash_texts(captions), "hash_of_all": hash_of_all},
        "reference": reference.describe() | {"captions_are_those_of_the_evaluation": same},
        "extractor": {"name": extractor.name, "hash": extractor.content_hash},
        "crop_and_resize": extractor.preprocessing,
        "seeds": {"first": options.seed, "count": count, "rule": "first + index of the caption"},
        "guidance": None,
        "metric_versions": {metric.name: metric.version for metric in metrics},
    }
    return Judge(captions, [options.seed + i for i in range(count)], metrics, extractor, manifest)


def measure(
    first: LoadedStudent,
    second: LoadedStudent,
    merged: LoadedStudent,
    grid: list[float],
    dtype: torch.dtype,
    judge: Judge,
) -> list[MergePoint]:
    """Draw and measure every lambda of the grid with the weights that `merge` would store, run in float32.

    The same captions and seeds for all; `merged` gives the other parts and is not changed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = copy.deepcopy(merged.parts.denoiser)
    generator = make_generator(merged.parts, merged.start_timestep, student=student).eval().to(device)
    judge.extractor.to(device)
    for metric in judge.metrics:
        metric.to(device)
    prompts, seeds = judge.captions[:SHOWN_PROMPTS], judge.seeds[:SHOWN_PROMPTS]
    points = []
    for weight in grid:
        student.load_state_dict(merged_weights(first.parts.denoiser, second.parts.denoiser, weight, dtype))
        label = f"lambda {weight:g}"
        results = evaluate_model(
            generator.images, judge.captions, judge.metrics, BATCH_SIZE, judge.seeds, label
        )
        points.append(MergePoint(weight, results, generator.images(prompts, seeds).cpu()))
    generator.cpu()  # the other parts are those of `merged`
    return points


def _report(merged: LoadedStudent, points: list[MergePoint], dtype: torch.dtype, judge: Judge) -> MergeReport:
    words = {"start_timestep": merged.start_timestep, "dtype": str(dtype).removeprefix("torch.")}
    facts = {name: without_place(value) for name, value in merged.facts.items()} | words
    return MergeReport(facts, points, judge.captions[:SHOWN_PROMPTS], judge.manifest, environment())


def _load(paths: list[str], weights: Any) -> list[LoadedStudent]:
    """Both models; `weights` concerns checkpoints only."""
    if weights is not None and not any(is_checkpoint(path) for path in paths):
        raise UserError(f"--weights {weights} chooses weights of a checkpoint, but both models are folders.")
    return [load_student(path, weights if is_checkpoint(path) else None) for path in paths]


def _check_output(output: Path, paths: list[str]) -> Path:
    """Refuse what `export_student` would refuse, before any work, and to replace one of the two models."""
    target = check_output_folder(output, lambda folder: FOLDER_NAMES if is_own_export(folder) else set())
    if target in [asset_path(path).resolve() for path in paths]:
        raise UserError(
            f"--output {output} is one of the two models and would be replaced. Give another folder."
        )
    return target


def _say_dtypes(paths: list[str], dtype: torch.dtype) -> None:
    other = stored_dtype(paths[1])
    if other != dtype:
        words = [str(kind).removeprefix("torch.") for kind in (dtype, other)]
        print(f"The first model is stored in {words[0]}, the second in {words[1]}: the result is {words[0]}.")


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Print warnings without the place in the code that they come from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
