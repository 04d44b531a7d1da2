"""What one-step generation costs: its parts, beside the stock pipeline, the teacher and negative prompts.

    python benchmarks/generate.py                                   bundled student: minutes
    python benchmarks/generate.py --model outputs/sd21 --dtype bfloat16
                                                                    for a GPU (benchmarks/models.py)
    python benchmarks/generate.py --counts                          counted operations of real networks

"Stock" is diffusers' own pipeline on the same weights, prompts and seeds, at one step without guidance; the
teacher is the same pipeline in 25 guided steps, whose network is as large as the student's. Everything takes
turns in one process, each round in another order; a time is the median over the rounds. A ratio is the median
of the rounds' ratios, with the order statistics that hold it with 95 % beside it (their range with fewer than
six rounds).

What a negative prompt adds is measured on the network's call, with the negative text encoded beforehand.
"First" enters the context of `negative_attention` and makes keys and values of the negative text; "later" is
every further call inside that context.

--counts: floating-point operations (matrix products, convolutions, attention) of one call for one image,
counted on the meta device. CFG makes two calls; NASA and NAG differ in element-wise operations only, which
are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.benchmark import timer  # waits for the GPU
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import interval, parser, table, times, write
from benchmarks.models import MODELS
from lightning_modules.diffusion.condition import Condition
from lightning_modules.generator import OneStepGenerator, make_generator
from lightning_modules.guidance.methods import METHODS, Method, make_method
from lightning_modules.guidance.prompting import negative_attention
from lightning_modules.networks.backbones.calling import run_network
from lightning_modules.networks.student import load_student, student_path
from lightning_modules.pipelines import multistep_scheduler, pipeline_images, stock_pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT, NEGATIVE = "a red apple, noto style", "on a white background"
CFG_SCALE = 1.5
TEACHER_STEPS = 25


@dataclass(frozen=True)
class Subject:
    """Something that is timed, and a context around it that is not."""

    call: Callable[[], Any]
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext


class Model(NamedTuple):
    """A student and its stock pipelines (the same weights, not copied)."""

    generator: OneStepGenerator
    stock: DiffusionPipeline
    teacher: DiffusionPipeline


def open_model(path: str, kind: torch.dtype) -> Model:
    """What `generate` would load, and the rest."""
    loaded = load_student(student_path(path))
    parts, device = loaded.parts, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = make_generator(parts, loaded.steps).eval().to(device, kind)
    return Model(
        generator, stock_pipeline(parts), stock_pipeline(parts, multistep_scheduler(parts.scheduler))
    )


def subjects(model: Model, batch: int) -> dict[str, Subject]:
    """All that takes turns at one batch size."""
    generator = model.generator
    prompts, seeds = [PROMPT] * batch, list(range(batch))
    encode = generator.prompt_encoder.encode
    condition, negative = encode(prompts), encode([NEGATIVE])
    noise = partial(generator.noise, seeds)
    network = partial(generator.latents, noise(), condition, fresh=noise)
    latents, drawn = network(), partial(pipeline_images, prompts=prompts, seeds=seeds)
    found = {
        "text": Subject(partial(encode, prompts)),
        "network": Subject(network),
        "decode": Subject(partial(generator.decoder.decode, latents)),
        "whole": Subject(partial(generator.images, prompts, seeds)),
        "stock": Subject(partial(drawn, model.stock, steps=1, guidance_scale=1.0)),
        "teacher": Subject(partial(drawn, model.teacher, steps=TEACHER_STEPS, guidance_scale=4.5)),
        "cfg": Subject(partial(network, guidance_scale=CFG_SCALE, negative=negative)),
    }
    for name in METHODS:
        given = generator, negative, make_method(name, generator.student), network
        found[f"{name}, first"] = Subject(partial(first_call, *given))
        found[f"{name}, later"] = Subject(network, partial(later_calls, *given))
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


def in_turns(timed: dict[str, Subject], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of each in every round, each round in another order; one round more comes first to warm up."""
    names = list(timed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(rounds + 1), desc=title, unit="round"):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with timed[name].inside():
                began = timer()
                timed[name].call()
                elapsed = timer() - began
            if turn:
                seconds[name].append(elapsed)
    return seconds


@torch.no_grad()
def measure(model: Model, batch: int, rounds: int) -> dict[str, Any]:
    """Everything about one batch size."""
    timed = subjects(model, batch)
    difference = float((timed["whole"].call() - timed["stock"].call()).abs().max())
    seconds = in_turns(timed, rounds, f"batch {batch}")
    return {"batch": batch, "difference_from_stock": difference, **summary(seconds)}


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians in milliseconds, and ratios with their intervals."""

    def ratio(a: str, b: str) -> list[float]:
        return interval([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])

    def added(name: str, to: str) -> list[float]:
        """Growth of the network's time, relative to another."""
        columns = (seconds[name], seconds["network"], seconds[to])
        return interval([(x - plain) / y for x, plain, y in zip(*columns, strict=True)])

    negatives = ["cfg", *(name for name in seconds if name.startswith(METHODS))]
    return {
        "milliseconds": {name: 1000 * statistics.median(x) for name, x in seconds.items()},
        "whole_over_stock": ratio("whole", "stock"),
        "teacher_over_whole": ratio("teacher", "whole"),
        "added_to_network": {name: added(name, "network") for name in negatives},
        "added_to_whole": {name: added(name, "whole") for name in negatives},
        "seconds": seconds,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """Tables of all batch sizes: parts and pipelines, and negative prompts."""
    parts = [
        "batch", "text, ms", "network", "decode", "whole call", "stock, one step", "whole / stock",
        f"{TEACHER_STEPS} guided steps", "times the whole call",
    ]  # fmt: skip
    names = ["cfg", *(f"{name}, {call}" for name in METHODS for call in ("first", "later"))]
    tables = [
        table(parts, [parts_row(one) for one in results]),
        table(
            ["batch", *(f"{name} adds" for name in names), f"{METHODS[0]}, later, to the whole call"],
            [
                [
                    f"{one['batch']}", *(percent(one["added_to_network"][name]) for name in names),
                    percent(one["added_to_whole"][f"{METHODS[0]}, later"]),
                ]
                for one in results
            ],
        ),
    ]  # fmt: skip
    return "\n\n".join(tables)


def parts_row(one: dict[str, Any]) -> list[str]:
    def milliseconds(*names: str) -> list[str]:
        return [f"{one['milliseconds'][name]:.1f}" for name in names]

    return [
        f"{one['batch']}", *milliseconds("text", "network", "decode", "whole", "stock"),
        f"**{times(one['whole_over_stock'], 3)}**", *milliseconds("teacher"),
        f"{one['teacher_over_whole'][1]:.1f}",
    ]  # fmt: skip


def percent(found: list[float]) -> str:
    """A growth with its interval."""
    low, middle, high = (f"{100 * value:.1f}" for value in found)
    return f"+{middle} % ({low} to {high})".replace("+-", "-")


@torch.no_grad()
def operations(name: str) -> tuple[int, int, int]:
    """Operations of a plain call, and of the first and of a later call with a negative prompt."""
    with torch.device("meta"):
        network = MODELS[name].network(**MODELS[name].shape).eval()
        inputs = MODELS[name].inputs(1)
        plain, first, later = (FlopCounterMode(display=False) for _ in range(3))
        with plain:
            run_network(network, *inputs)
        with ExitStack() as stack:
            with first:
                method = make_method("nasa", network, 0.5)
                stack.enter_context(negative_attention(network, inputs[-1], method))
                run_network(network, *inputs)
            with later:
                run_network(network, *inputs)
    return plain.get_total_flops(), first.get_total_flops(), later.get_total_flops()


def counts(names: Sequence[str] = ("sd15", "sd21", "sdxl", "pixart")) -> tuple[str, dict[str, Any]]:
    """A table of these networks, and its numbers; a multiplication and an addition are two operations."""
    found = {name: operations(name) for name in tqdm(names, desc="operations", unit="network")}
    rows = [
        [
            MODELS[name].title, f"{plain / 1e9:,.0f}", "+100 %",
            *(f"{100 * (value / plain - 1):+.2f} %" for value in with_negative),
        ]
        for name, (plain, *with_negative) in found.items()
    ]  # fmt: skip
    head = ["network", "plain, GFLOP", "CFG", "negative prompt, first call", "later calls"]
    return table(head, rows), found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    reader = parser(__doc__)
    add = reader.add_argument
    add("--model", default="assets/emoji-sd-swiftbrush", help="run, .ckpt or folder (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 4, 16, 64], help="images per call (default: 1 4 16 64)")
    add("--rounds", type=int, default=20, help="(default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of all weights (default: %(default)s)")
    add("--counts", action="store_true", help="count operations of real networks, and measure nothing")
    add("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on the CPU")
    given = reader.parse_args(argv)
    if min(*given.batch, given.rounds, given.threads) < 1:
        reader.error("--batch, --rounds and --threads must be at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = arguments(argv)
    if given.counts:
        write(*counts(), given.output)
        return
    torch.set_num_threads(given.threads)
    model = open_model(given.model, DTYPES[given.dtype])
    results = [measure(model, batch, given.rounds) for batch in given.batch]
    difference = max(one["difference_from_stock"] for one in results)
    where = (
        f"{given.dtype}, threads: {given.threads}, {given.rounds} rounds; "
        f"{given.model}; largest difference from a stock picture (0 to 1): {difference:.1g}"
    )
    write(markdown(results), results, given.output, where)


if __name__ == "__main__":
    main()
