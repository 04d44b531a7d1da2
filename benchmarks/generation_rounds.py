"""Takes the times of one-step generation and of what it is compared with, in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from benchmarks.generation_models import Model
from benchmarks.negative_guidance import count
from lightning_modules.compiling import CompiledNetworks
from lightning_modules.diffusion.condition import Condition
from lightning_modules.generator import OneStepGenerator
from lightning_modules.guidance.methods import METHODS, Method, make_method
from lightning_modules.guidance.prompting import negative_attention
from lightning_modules.networks.backbones.pixart import call_options

PROMPT, NEGATIVE = "a red apple, noto style", "on a white background"
CFG_SCALE = 1.5
TEACHER_STEPS, TEACHER_GUIDANCE = 25, 4.5
COUNTED = ("network", "cfg", "nasa, first", "nasa, later")
COMPILED = ("network", "decode", "whole")


@dataclass(frozen=True)
class Subject:
    """Something that is timed, and a context around it that is not."""

    call: Callable[[], Any]
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext


def stock_images(
    pipeline: DiffusionPipeline, prompts: list[str], seeds: list[int], steps: int, guidance: float
) -> Tensor:
    """Pictures [B, 3, H, W] of a stock pipeline, called as its users do."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipeline(
        prompt=prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators,
        output_type="pt", **call_options(pipeline),
    )  # fmt: skip
    return output.images


def subjects(model: Model, batch: int, compiled: CompiledNetworks | None) -> dict[str, Subject]:
    """All that takes turns at one batch size, but for the teacher."""
    generator, prompts, seeds = model.generator, [PROMPT] * batch, list(range(batch))
    encode = generator.prompt_encoder.encode
    condition, negative, noise = encode(prompts), encode([NEGATIVE]), generator.noise(seeds)
    network = partial(generator.latents, noise, condition)
    latents = network()
    found = {
        "text": Subject(partial(encode, prompts)),
        "network": Subject(network),
        "decode": Subject(partial(generator.decoder.decode, latents)),
        "whole": Subject(partial(generator.images, prompts, seeds)),
        "stock": Subject(partial(stock_images, model.stock, prompts, seeds, 1, 1.0)),
        "tiny": Subject(partial(model.tiny.decode, latents)),
        "cfg": Subject(partial(network, guidance_scale=CFG_SCALE, negative=negative)),
    }
    for name in METHODS:
        given = generator, negative, make_method(name, generator.student), network
        found[f"{name}, first"] = Subject(partial(first_call, *given))
        found[f"{name}, later"] = Subject(network, partial(later_calls, *given))
    if compiled is not None:
        found |= {f"{name}, compiled": Subject(found[name].call, compiled.active) for name in COMPILED}
    return found


def first_call(
    generator: OneStepGenerator, negative: Condition, method: Method, network: Callable[[], Tensor]
) -> None:
    """A network call with a negative prompt, the context included."""
    with negative_attention(generator.student, negative, method):
        network()


@contextmanager
def later_calls(
    generator: OneStepGenerator, negative: Condition, method: Method, network: Callable[[], Tensor]
) -> Iterator[None]:
    """A context of a negative prompt in which the first call is over."""
    with negative_attention(generator.student, negative, method):
        network()
        yield


def in_turns(
    timed: dict[str, Subject], rounds: int, now: Callable[[], float], title: str
) -> dict[str, list[float]]:
    """Seconds of each in every round; one round more comes first to warm up."""
    names = list(timed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(rounds + 1), desc=title, unit="round"):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with timed[name].inside():
                began = now()
                timed[name].call()
                elapsed = now() - began
            if turn:
                seconds[name].append(elapsed)
    return seconds


def measure(
    model: Model, batch: int, rounds: int, compiled: bool, now: Callable[[], float]
) -> dict[str, Any]:
    """Everything about one batch size; `now` reads the clock."""
    torch._dynamo.reset()  # graphs are for one batch size
    networks = [model.parts.denoiser, model.parts.vae.decoder]
    with torch.no_grad():
        timed = subjects(model, batch, CompiledNetworks(networks, mode=True) if compiled else None)
        seconds = in_turns(timed, rounds, now, f"batch {batch}")
        teacher = partial(stock_images, model.teacher, [PROMPT] * batch, list(range(batch)))
        guided = Subject(partial(teacher, TEACHER_STEPS, TEACHER_GUIDANCE))
        pair = {"teacher": guided, "whole": timed["whole"]}
        seconds_guided = in_turns(pair, max(1, rounds // 5), now, f"teacher, batch {batch}")
        facts = {
            "batch": batch,
            "difference_from_stock": float((timed["whole"].call() - timed["stock"].call()).abs().max()),
            "operations": {name: operations(timed[name]) for name in COUNTED},
        }
    return facts | summary(seconds, seconds_guided)


def operations(subject: Subject) -> int:
    """Counted floating-point operations of a call."""
    with subject.inside():
        return count(subject.call)


def summary(seconds: dict[str, list[float]], guided: dict[str, list[float]]) -> dict[str, Any]:
    """Medians in milliseconds, and ratios with their intervals."""

    def ratio(a: str, b: str, found: dict[str, list[float]] = seconds) -> list[float]:
        return interval([x / y for x, y in zip(found[a], found[b], strict=True)])

    def added(name: str, to: str) -> list[float]:
        """Growth of the network's time, relative to another."""
        columns = (seconds[name], seconds["network"], seconds[to])
        return interval([(x - plain) / y for x, plain, y in zip(*columns, strict=True)])

    def share_of_cfgs(name: str) -> list[float]:
        columns = (seconds[name], seconds["cfg"], seconds["network"])
        return interval([(x - plain) / (cfg - plain) for x, cfg, plain in zip(*columns, strict=True)])

    negatives = [name for name in seconds if name.startswith(METHODS)]
    return {
        "milliseconds": {name: 1000 * statistics.median(x) for name, x in (guided | seconds).items()},
        "whole_over_stock": ratio("whole", "stock"),
        "teacher_over_whole": ratio("teacher", "whole", guided),
        "added_to_network": {name: added(name, "network") for name in ("cfg", *negatives)},
        "added_to_whole": {name: added(name, "whole") for name in ("cfg", *negatives)},
        "share_of_cfgs": {name: share_of_cfgs(name) for name in negatives},
        "decode_over_tiny": ratio("decode", "tiny"),
        "compiled_speedup": {
            name: ratio(name, f"{name}, compiled") for name in COMPILED if f"{name}, compiled" in seconds
        },
        "seconds": seconds,
        "teacher_seconds": guided,
    }


def interval(values: Sequence[float]) -> list[float]:
    """Lower end, median, upper end: the order statistics between which the median lies with 95 %.

    The median lies below the k-th smallest of n values with the probability that fewer than k of n fair coins
    show heads. Below six values their range, which holds it with less.
    """
    ordered, n = sorted(values), len(values)
    k = 0
    while sum(math.comb(n, i) for i in range(k + 1)) <= 0.025 * 2**n:
        k += 1
    k = max(k, 1)
    return [ordered[k - 1], statistics.median(ordered), ordered[n - k]]
