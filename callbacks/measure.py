"""Measures anything that turns prompts and seeds into pictures: a student, a teacher, a stock pipeline."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from callbacks.distributed import rank_and_world_size
from callbacks.metrics.base import ImageMetric

Generate = Callable[[list[str], list[int]], Tensor]
"""Prompts and one seed for each, to pictures [B, 3, H, W] in [0, 1]."""


def evaluate_model(
    generate: Generate,
    captions: Sequence[str],
    metrics: Sequence[ImageMetric],
    batch_size: int,
    seeds: Sequence[int] | None = None,
    progress: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Draw one picture for each caption and measure them; all processes must call it, each draws its share.

    Every process makes the same number of passes, as sharded networks need: where the captions do not divide
    evenly, a padding sample is drawn and not counted.

    Args:
        generate: prompts and seeds to pictures.
        captions: what to draw.
        metrics: bound metrics; they are reset before and after.
        batch_size: pictures per pass and process.
        seeds: one for each caption (default 0, 1, 2, ...).
        progress: label of the progress bar; None shows none.

    Returns:
        ``{name: {"value", "num_images", "details"}}``, the same on every process.

    Raises:
        ValueError: no captions, or numbers of captions and seeds differ.
        RuntimeError: a metric did not count every caption exactly once.
    """
    seeds = list(range(len(captions))) if seeds is None else list(seeds)
    if not captions or len(seeds) != len(captions):
        raise ValueError(
            f"{len(captions)} captions and {len(seeds)} seeds: need one seed for each of at least one caption"
        )
    rank, world = rank_and_world_size()
    share = list(range(rank, len(captions), world))
    padding = [False] * len(share) + [True] * (-(-len(captions) // world) - len(share))
    share += [0] * (len(padding) - len(share))
    for metric in metrics:
        metric.reset()
    with tqdm(total=len(captions), desc=progress, unit="image", disable=progress is None or rank > 0) as bar:
        for start in range(0, len(share), batch_size):
            chosen = share[start : start + batch_size]
            prompts = [captions[i] for i in chosen]
            images = generate(prompts, [seeds[i] for i in chosen])
            is_padding = torch.tensor(padding[start : start + batch_size])
            for metric in metrics:
                metric.update(images, prompts, is_padding)
            bar.update(min(len(chosen) * world, len(captions) - bar.n))
    results = {metric.name: metric.result() for metric in metrics}
    for metric in metrics:
        if metric.num_images != len(captions):
            raise RuntimeError(
                f"{metric.name} counted {metric.num_images} pictures for {len(captions)} captions"
            )
        metric.reset()
    return results


def milliseconds_per_image(
    generate: Generate, captions: Sequence[str], batch_size: int = 16, repeats: int = 3
) -> dict[str, Any]:
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
