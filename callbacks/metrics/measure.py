"""Measures anything that turns prompts and seeds into pictures: a student, a teacher, a stock pipeline."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.unfinished import Unfinished
from common.errors import UserError
from common.processes import rank_and_world_size
from datamodules.picture_files import Frame

Generate = Callable[[list[str], list[int]], Tensor]
"""Prompts and one seed for each, to pictures [B, 3, H, W] in [0, 1]."""
Images = Tensor | Sequence[Tensor]
Draw = Callable[[list[int]], Images]
"""Places in the list of captions to pictures [3, H, W] in [0, 1], which may differ in size."""
OnPictures = Callable[[list[int], Images], None]
Result = dict[str, Any]
"""``{"value", "num_images", "details"}``."""
Results = dict[str, Result]
"""By the metric's stable name."""


def results_of(name: str, results: Results) -> Results:
    """Those of one metric: its own, and those of its parts (``hpsv2/anime``)."""
    return {key: result for key, result in results.items() if key.partition("/")[0] == name}


@dataclass(frozen=True)
class FinalResults:
    """What the last evaluation of a run found.

    Attributes:
        step: student updates done. ``weights``: "ema" or "online".
        metrics: results of the student; ``teacher_metrics``: of each of the teacher's rows, if it was asked.
        manifest: what a comparable measurement must share with this one.
    """

    step: int
    weights: str
    metrics: Results
    teacher_metrics: dict[str, Results]
    manifest: dict[str, Any]


@dataclass
class Stopwatch:
    """Where the wall time of an evaluation went, in seconds, on this process.

    Attributes:
        drawing: making or reading pictures. ``measuring``: features and sums. ``statistics``: values out
            of the sums, over all processes. ``images``: pictures drawn on this process.
    """

    drawing: float = 0.0
    measuring: float = 0.0
    statistics: float = 0.0
    images: int = 0


def evaluate_model(
    generate: Generate,
    captions: Sequence[str],
    metrics: Sequence[ImageMetric],
    batch_size: int,
    seeds: Sequence[int] | None = None,
    progress: str | None = None,
    groups: Sequence[str] | None = None,
    negatives: Sequence[str] | None = None,
    frame: Frame | None = None,
) -> Results:
    """``measure_pictures`` of what is drawn from captions and seeds; it takes its other arguments, too.

    Args:
        generate: prompts and seeds to pictures.
        captions: what to draw. ``seeds``: one for each (default 0, 1, 2, ...).

    Raises:
        ValueError: no captions, or numbers of captions and seeds differ.
    """
    numbers = list(range(len(captions))) if seeds is None else list(seeds)
    if not captions or len(numbers) != len(captions):
        raise ValueError(
            f"{len(captions)} captions and {len(numbers)} seeds: need one caption, and one seed for each"
        )

    def draw(places: list[int]) -> Tensor:
        return generate([captions[i] for i in places], [numbers[i] for i in places])

    return measure_pictures(draw, captions, metrics, batch_size, progress, groups, negatives, frame)


def measure_pictures(
    draw: Draw,
    captions: Sequence[str],
    metrics: Sequence[ImageMetric],
    batch_size: int,
    progress: str | None = None,
    groups: Sequence[str] | None = None,
    negatives: Sequence[str] | None = None,
    frame: Frame | None = None,
    unfinished: Unfinished | None = None,
    on_pictures: OnPictures | None = None,
    watch: Stopwatch | None = None,
) -> Results:
    """Measure one picture for each caption, each drawn once; all processes must call it.

    Every process makes the same number of passes, as sharded networks need: where the captions do not divide
    evenly, a padding sample is drawn and not counted. Pass k draws the next ``batch_size`` captions of each
    process, so that what is done is always a beginning of the list, whatever the number of processes.

    Args:
        draw: places in the list of captions to pictures.
        captions: the whole list.
        metrics: bound metrics; they are reset before and after.
        batch_size: pictures per pass and process.
        progress: label of the progress bar; None shows none.
        groups: group of each caption, for metrics that report by group; negatives: negative prompt of each.
        frame: crop and resize before the metrics.
        unfinished: where to put what has been measured, and to continue from.
        on_pictures: called with places and pictures (before crop and resize, without padding).
        watch: receives the times.

    Returns:
        ``{name: {"value", "num_images", "details"}}``, the same on every process.

    Raises:
        UserError: a picture holds NaN or infinity, or can't be read.
        RuntimeError: a metric did not count every caption exactly once.
    """
    watch = Stopwatch() if watch is None else watch
    rank, world = rank_and_world_size()
    for metric in metrics:
        metric.reset()
        metric.prepare(captions, groups, negatives)
    done = unfinished.load(metrics) if unfinished is not None else 0
    bar = tqdm(
        total=len(captions), initial=done, desc=progress, unit="image", disable=progress is None or rank > 0
    )
    with bar:
        while done < len(captions):
            end = min(done + batch_size * world, len(captions))
            places = list(range(done + rank, end, world))
            # the last pass is made equally long on all processes
            padding = -(-(end - done) // world) - len(places)
            _pass(draw, places, padding, captions, metrics, frame, on_pictures, watch)
            bar.update(end - done)
            done = end
            if unfinished is not None and unfinished.is_due(done) and done < len(captions):
                unfinished.save(metrics, done)
    return _results(metrics, len(captions), watch)


def _pass(
    draw: Draw,
    places: list[int],
    padding: int,
    captions: Sequence[str],
    metrics: Sequence[ImageMetric],
    frame: Frame | None,
    on_pictures: OnPictures | None,
    watch: Stopwatch,
) -> None:
    """Draw and measure the captions at these places, and as many padding samples, which are not counted."""
    start = time.perf_counter()
    images = draw(places + [0] * padding)[: len(places)]
    require_finite(images, places, [captions[i] for i in places])
    middle = time.perf_counter()  # reading the pictures for that check has waited for the GPU
    watch.drawing += middle - start
    watch.images += len(places)
    if places and on_pictures is not None:
        on_pictures(places, images)
    if places:
        for members, batch in _by_size(images, frame):
            chosen = [places[i] for i in members]
            for metric in metrics:
                metric.update(batch, [captions[i] for i in chosen], None, chosen)
    watch.measuring += time.perf_counter() - middle


def require_finite(
    images: Images,
    places: Sequence[int],
    prompts: Sequence[str],
    is_padding: Sequence[bool] | None = None,
) -> None:
    """Refuse pictures that hold NaN or infinity; padding does not matter.

    Raises:
        UserError: one does; its prompt and the place of that are named.
    """
    for i, image in enumerate(images):
        if not bool(torch.isfinite(image).all()) and not (is_padding is not None and is_padding[i]):
            raise UserError(
                f"the picture of caption {places[i]} ({prompts[i]!r}) holds NaN or infinity, so nothing "
                "can be measured: evaluate with --dtype float32, or an earlier checkpoint"
            )


def _by_size(images: Images, frame: Frame | None) -> list[tuple[list[int], Tensor]]:
    """Batches of equal size with the numbers of their pictures; one batch where all are equal."""
    if isinstance(images, Tensor):
        return [(list(range(len(images))), images if frame is None else frame.batch(images))]
    if frame is not None:
        return [(list(range(len(images))), torch.cat([frame.batch(image[None]) for image in images]))]
    sizes: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(i)
    return [(members, torch.stack([images[i] for i in members])) for members in sizes.values()]


def _results(metrics: Sequence[ImageMetric], count: int, watch: Stopwatch) -> Results:
    start = time.perf_counter()
    results: Results = {}
    for metric in metrics:
        results |= metric.results()
        if metric.num_images != count:
            raise RuntimeError(f"{metric.name} counted {metric.num_images} pictures for {count} captions")
        metric.reset()
    watch.statistics += time.perf_counter() - start
    return results


def milliseconds_per_image(
    generate: Generate, captions: Sequence[str], batch_size: int = 16, repeats: int = 3
) -> Result:
    """Wall time per picture on this machine: prompt encoding, network passes and decoding, copied to the CPU.

    Args:
        generate: prompts and seeds to pictures.
        captions: prompts to take from; used again from the start if there are fewer than ``batch_size``.
        batch_size: pictures per pass.
        repeats: timed passes, after one that is not timed.

    Returns:
        ``{"value", "num_images", "details"}``: the median over the timed passes.
    """
    prompts = [captions[i % len(captions)] for i in range(batch_size)]
    times, device = [], "cpu"
    for repeat in range(repeats + 1):
        seeds = list(range(repeat * batch_size, (repeat + 1) * batch_size))
        start = time.perf_counter()
        images = generate(prompts, seeds)
        device = str(images.device)
        images.cpu()
        times.append(time.perf_counter() - start)
    value = 1000 * statistics.median(times[1:]) / batch_size
    details = {
        "batch_size": batch_size,
        "device": device,
        "statistic": f"median of {repeats} passes after a warm-up",
    }
    return {"value": value, "num_images": batch_size * repeats, "details": details}
