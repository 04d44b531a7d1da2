"""Measures anything that turns prompts and seeds into pictures: a student, a teacher, a stock pipeline."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.extractors import Item, by_size
from callbacks.metrics.unfinished import Unfinished
from common.errors import UserError
from common.processes import rank_and_world_size
from datamodules.evaluation_sets import EvaluationSet

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
Seconds = dict[str, float]
"""Where the wall time on this process went: drawing (or reading) pictures; measuring, that is features and
sums; statistics, that is values out of the sums, over all processes."""


def results_of(name: str, results: Results) -> Results:
    """Those of one metric: its own, and those of its parts (``hpsv2/anime``)."""
    return {key: result for key, result in results.items() if key.partition("/")[0] == name}


def evaluate_model(
    generate: Generate,
    captions: Sequence[str],
    metrics: Sequence[ImageMetric],
    batch_size: int,
    seeds: Sequence[int] | None = None,
    progress: str | None = None,
) -> Results:
    """``measure_set`` of plain captions.

    Args:
        generate: prompts and seeds to pictures.
        captions: what to draw. ``seeds``: one for each (default 0, 1, 2, ...).
        metrics, batch_size, progress: as for ``measure_pictures``.
    """
    numbers = range(len(captions)) if seeds is None else seeds
    drawn = EvaluationSet("captions", list(captions), list(numbers))
    return measure_set(generate, drawn, metrics, batch_size, progress)


def measure_set(
    generate: Generate,
    drawn: EvaluationSet,
    metrics: Sequence[ImageMetric],
    batch_size: int,
    progress: str | None = None,
) -> Results:
    """``measure_pictures`` of what is drawn from the set's captions and seeds."""
    captions, seeds = drawn.captions, drawn.seeds
    if not captions or len(seeds) != len(captions):
        raise ValueError(f"{len(captions)} captions need one seed for each, and there are {len(seeds)}")

    def draw(places: list[int]) -> Tensor:
        return generate([captions[i] for i in places], [seeds[i] for i in places])

    return measure_pictures(draw, drawn, metrics, batch_size, progress)


def measure_pictures(
    draw: Draw,
    drawn: EvaluationSet,
    metrics: Sequence[ImageMetric],
    batch_size: int,
    progress: str | None = None,
    unfinished: Unfinished | None = None,
    on_pictures: OnPictures | None = None,
    seconds: Seconds | None = None,
) -> Results:
    """Measure one picture for each caption, each drawn once; all processes must call it.

    Every process makes the same number of passes, as sharded networks need: where the captions do not divide
    evenly, a padding sample is drawn and not counted. Pass k draws the next ``batch_size`` captions of each
    process (whole prompts where these have several pictures), so that what is done is always a beginning of
    the list, whatever the number of processes.

    Args:
        drawn: the captions, with groups, negative prompts and frame (crop and resize before the metrics).
        metrics: bound metrics; they are reset before and after.
        batch_size: pictures per pass and process. ``progress``: label of the progress bar; None: no bar.
        unfinished: where to put what has been measured, and to continue from.
        on_pictures: called with places and pictures (before crop and resize, without padding).
        seconds: receives the times.

    Raises:
        UserError: a picture holds NaN or infinity, or can't be read.
        RuntimeError: a metric did not count every caption exactly once.
    """
    spent, captions = defaultdict[str, float](float), drawn.captions
    rank, world = rank_and_world_size()
    run = drawn.images_per_prompt
    run = run if run * world <= len(captions) else 1  # a few prompts of many pictures are shared out singly
    share = max(1, batch_size // run) * run  # pictures of a process in one pass: whole prompts
    for metric in metrics:
        metric.reset()
        metric.prepare(captions, drawn.groups, drawn.negatives)
    done = unfinished.load(metrics) if unfinished is not None else 0
    is_silent = progress is None or rank > 0
    with tqdm(total=len(captions), initial=done, desc=progress, unit="image", disable=is_silent) as bar:
        while done < len(captions):
            end = min(done + share * world, len(captions))
            # the pictures of a prompt go to one process, so that metrics within a prompt keep none for long
            places = [place for place in range(done, end) if (place - done) // run % world == rank]
            # the last pass is made equally long on all processes, with pictures that are not counted
            padding = -(-(end - done) // (run * world)) * run - len(places)
            for batch in _batches([*places, *[None] * padding], batch_size):
                chosen = [place for place in batch if place is not None]
                start = time.perf_counter()
                images = draw([place or 0 for place in batch])[: len(chosen)]
                require_finite(images, chosen, [captions[i] for i in chosen])
                middle = time.perf_counter()  # reading the pictures for that check has waited for the GPU
                if chosen and on_pictures is not None:
                    on_pictures(chosen, images)
                _update(metrics, images, chosen, drawn)
                spent["drawing"] += middle - start
                spent["measuring"] += time.perf_counter() - middle
            bar.update(end - done)
            done = end
            if unfinished is not None and unfinished.is_due(done) and done < len(captions):
                unfinished.save(metrics, done)
    start = time.perf_counter()
    results = _results(metrics, len(captions))
    spent["statistics"] = time.perf_counter() - start
    if seconds is not None:
        seconds.update(spent)
    return results


def _batches(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _results(metrics: Sequence[ImageMetric], count: int) -> Results:
    results: Results = {}
    for metric in metrics:
        results |= metric.results()
        if metric.num_images != count:
            raise RuntimeError(f"{metric.name} counted {metric.num_images} pictures, not {count}")
        metric.reset()
    return results


def _update(metrics: Sequence[ImageMetric], images: Images, places: list[int], drawn: EvaluationSet) -> None:
    """Give the metrics the pictures of these places, framed, in batches of equal size."""
    if drawn.frame is not None:
        images = [drawn.frame.batch(image[None])[0] for image in images]
    for members, batch in by_size(images) if places else ():
        chosen = [places[i] for i in members]
        for metric in metrics:
            metric.update(batch, [drawn.captions[i] for i in chosen], None, chosen)


def require_finite(images: Images, places: Sequence[int], prompts: Sequence[str]) -> None:
    """Refuse pictures that hold NaN or infinity.

    Raises:
        UserError: one does; its prompt and the place of that are named.
    """
    for image, place, prompt in zip(images, places, prompts, strict=True):
        if not bool(torch.isfinite(image).all()):
            raise UserError(
                f"the picture of caption {place} ({prompt!r}) holds NaN or infinity, so nothing can be "
                "measured: evaluate with --dtype float32, or an earlier checkpoint"
            )


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
    value, *ends = (1000 * f(times[1:]) / batch_size for f in (statistics.median, min, max))
    statistic = f"median of {repeats} passes after a warm-up"
    details = {"batch_size": batch_size, "device": device, "statistic": statistic, "spread": ends}
    return {"value": value, "num_images": batch_size * repeats, "details": details}
