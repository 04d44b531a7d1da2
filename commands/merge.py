"""`merge`: theta = lambda theta_A + (1 - lambda) theta_B of two students, measured over a grid if wanted."""

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

import torch

from callbacks.metrics.base import ImageMetric, bind_metrics, place_metrics
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.measure import evaluate_model
from callbacks.metrics.reference import ReferenceStatistics, describe_reference
from commands.options import Count, Guidance, Seed
from common.environment import environment
from common.errors import UserError
from common.files import check_output_folder, filled_at_once
from common.hashing import hash_texts
from datamodules.prompts import read_prompts
from datamodules.sources import EVAL_CAPTIONS
from lightning_modules.diffusion.steps import step_facts
from lightning_modules.generator import make_generator
from lightning_modules.networks.interpolation import merge_students, merged_weights, stored_dtype
from lightning_modules.networks.loading import asset_path
from lightning_modules.networks.pipeline_folder import export_student, own_names, without_place
from lightning_modules.networks.student import LoadedStudent, is_checkpoint, load_student, student_path
from reports.merge_report import MergePoint, MergeReport, findings, text_table, write_merge_report

BATCH_SIZE = 64
MOST_POINTS = 101
SHOWN_PROMPTS = 6


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `merge`.

    Args:
        first: model A: a run folder (its best.ckpt, else last.ckpt), best or last (of the newest finished
            run), a .ckpt file, or a diffusers pipeline folder
        second: model B, of the same architecture: the same choice
        weight: lambda of lambda * first + (1 - lambda) * second: 1 is the first, 0 the second; others than 0
            to 1 extrapolate
        output: pipeline folder to write, in the dtype the first is stored in; a former export is replaced
        weights: averaged or last weights of checkpoints (ema if the run had it)
        teacher: of checkpoints, where their teacher lies now (where it was in training)
        evaluate: START:STOP:STEP; also draw and measure for these lambdas (and that of --weight), e.g.
            0:1:0.25; writes merge.json, merge.md, merge.html and merge_samples.png into the output folder
        captions: with --evaluate, file with one caption a line
        scoring_clip: with --evaluate, CLIP folder that judges
        reference: with --evaluate, statistics of real pictures by that CLIP
        num_images: with --evaluate, pictures per lambda, of the first captions (all captions if left out)
        seed: with --evaluate, of the first picture; picture i has seed + i
    """

    first: str
    second: str
    weight: Guidance = 0.5
    output: Path
    weights: Literal["ema", "online"] | None = None
    teacher: str | None = None
    evaluate: str | None = None
    captions: str = str(EVAL_CAPTIONS)
    scoring_clip: str = "assets/emoji-clip"
    reference: str = "assets/cache/emoji-reference.safetensors"
    num_images: Count | None = None
    seed: Seed = 0


def run(options: Options) -> None:
    """Merge, measure if asked to, and write everything at the end.

    Raises:
        UserError: an unusable option, model or output folder, or models that do not fit; nothing is written.
    """
    paths = [student_path(options.first), student_path(options.second)]
    target = check_output_folder(options.output, own_names)
    if target in [asset_path(path).resolve() for path in paths]:
        raise UserError(f"--output {options.output} is one of the two models and would be replaced.")
    if (options.weights or options.teacher) and not any(map(is_checkpoint, paths)):
        raise UserError("--weights and --teacher are for checkpoints, but both models are folders.")
    with _told_in_one_line():
        grid = parse_grid(options.evaluate, options.weight) if options.evaluate is not None else []
        judge = Judge(options) if grid else None
        chosen = [(options.weights, options.teacher) if is_checkpoint(path) else () for path in paths]
        first, second = (load_student(path, *given) for path, given in zip(paths, chosen))
        dtype, other = map(stored_dtype, paths)
        merged = merge_students(first, second, options.weight, dtype)
    words = [str(kind).removeprefix("torch.") for kind in (dtype, other)]
    if dtype != other:
        print(f"The first model is stored in {words[0]}, the second in {words[1]}: the result is {words[0]}.")
    merged.facts |= {"first": without_place(options.first), "second": without_place(options.second)}
    report = None
    if judge is not None:
        points = measure(first, second, merged, grid, dtype, judge)
        facts = {name: without_place(value) for name, value in merged.facts.items()}
        facts |= {**step_facts(merged.steps), "dtype": words[0]}
        report = MergeReport(facts, points, judge.captions[:SHOWN_PROMPTS], judge.manifest, environment())
    export_student(merged.parts.denoiser, merged.parts, merged.steps, options.output, dtype, merged.facts)
    print(f"Merged {options.weight:g} * first + {1 - options.weight:g} * second into {options.output}.")
    if report is not None:
        with filled_at_once(target) as folder:
            write_merge_report(report, folder)
        print("\n".join(["", text_table(report), "", *findings(report), f"Report: {target / 'merge.html'}"]))


def parse_grid(text: str, weight: float) -> list[float]:
    """The lambdas of START:STOP:STEP, both ends included, and `weight`, ascending.

    Computed in decimals, so that 0:1:0.1 holds 0.3 and not 0.30000000000000004.

    Raises:
        UserError: it is no such grid, or has more than 101 points.
    """
    try:
        start, stop, step = (Decimal(word.strip()) for word in text.split(":"))
        count = (stop - start) / step
        if not 0 <= count < MOST_POINTS or count != int(count):
            raise ValueError
    except (ArithmeticError, ValueError) as error:
        raise UserError(
            f"--evaluate {text!r} is no grid. Give START:STOP:STEP, three numbers of which STEP leads from "
            f"START to STOP in at most {MOST_POINTS} points, e.g. --evaluate 0:1:0.25 (and "
            "--evaluate=-0.5:1.5:0.5 for a negative start)."
        ) from error
    if start < 0 or stop > 1:
        warnings.warn(f"--evaluate {text} leaves [0, 1]: that extrapolates beyond both models.", stacklevel=2)
    return sorted({float(start + i * step) for i in range(int(count) + 1)} | {weight})


class Judge:
    """Captions, seeds and bound metrics: what every lambda is measured with.

    Raises:
        UserError: captions, CLIP or reference are missing, damaged, or do not fit each other.
    """

    def __init__(self, options: Options) -> None:
        every = read_prompts(asset_path(options.captions))
        count = len(every) if options.num_images is None else options.num_images
        if not 2 <= count <= len(every):
            raise UserError(
                f"--num-images {count} can't be drawn: {options.captions} has {len(every)} captions, and a "
                "Fréchet distance needs at least 2 pictures."
            )
        self.captions = every[:count]
        self.seeds = [options.seed + i for i in range(count)]
        self.metrics: list[ImageMetric] = [FrechetDistance(), ClipScore()]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        extractor = ClipExtractor(asset_path(options.scoring_clip))
        reference = ReferenceStatistics.load(asset_path(options.reference))
        bind_metrics(self.metrics, extractor, reference, self.device)
        place_metrics(self.metrics, self.device)
        self.manifest = {
            "captions": {"count": count, "hash": hash_texts(self.captions), "hash_of_all": hash_texts(every)},
            "reference": describe_reference(reference, every),
            "extractor": {"name": extractor.name, "hash": extractor.content_hash},
            "crop_and_resize": extractor.preprocessing,
            "seeds": {"first": options.seed, "count": count, "rule": "first + index of the caption"},
            "guidance": None,
            "metric_versions": {metric.name: metric.version for metric in self.metrics},
        }


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
    student = copy.deepcopy(merged.parts.denoiser)
    generator = make_generator(merged.parts, merged.steps, student=student).eval().to(judge.device)
    points = []
    for weight in grid:
        student.load_state_dict(merged_weights(first.parts.denoiser, second.parts.denoiser, weight, dtype))
        results = evaluate_model(
            generator.images, judge.captions, judge.metrics, BATCH_SIZE, judge.seeds, f"lambda {weight:g}"
        )
        shown = generator.images(judge.captions[:SHOWN_PROMPTS], judge.seeds[:SHOWN_PROMPTS])
        points.append(MergePoint(weight, results, shown.cpu()))
    generator.cpu()  # the other parts are those of `merged`
    return points


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Print warnings without the place in the code that they come from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
