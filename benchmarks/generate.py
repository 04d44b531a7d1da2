"""What one-step generation costs: its parts, the stock pipeline, the teacher, negative prompts, decoders.

    python benchmarks/generate.py                                          bundled student: minutes
    python benchmarks/generate.py --size sd21 --dtype bfloat16 --compile   needs a GPU
    python benchmarks/generate.py --size sd21 --small --rounds 2           tries that code on any machine
    python benchmarks/generate.py --counts --compile 1 16 --into docs/performance.md

"Stock" is diffusers' own pipeline on the same weights, prompts and seeds, at one step without guidance; the
teacher is the same pipeline in 25 guided steps, whose network is as large as the student's. Everything takes
turns in one process, each round in another order; a time is the median over the rounds. A ratio is the median
of the rounds' ratios, with the order statistics that hold it with 95 % beside it (their range with fewer than
six rounds).

What a negative prompt adds is measured on the network's call, with the negative text encoded beforehand.
"First" enters the context of `negative_attention` and makes keys and values of the negative text; "later" is
every further call inside that context. "Counted" are floating-point operations. The tiny decoder has TAESD's
shape and random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.generation_models import SIZES, open_model
from benchmarks.generation_rounds import TEACHER_STEPS, measure
from benchmarks.negative_guidance import table as counts
from benchmarks.train_step import insert, machine, write_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def markdown(results: list[dict[str, Any]], head: list[str]) -> str:
    """Tables of all batch sizes."""

    def rows(
        title: str, cells: Callable[[dict[str, Any]], list[str]], chosen: list[dict[str, Any]] = results
    ) -> list[str]:
        lines = [f"| {title} |", f"|{'---:|' * (title.count('|') + 1)}"]
        return ["", *lines, *(f"| {one['batch']} | {' | '.join(cells(one))} |" for one in chosen)]

    compiled = [one for one in results if one["compiled_speedup"]]

    return "\n".join([
        *head,
        *rows(
            "batch | text, ms | network | decode | whole call | images/s | stock, one step | whole / stock | "
            f"{TEACHER_STEPS} guided steps | times the whole call", parts_row,
        ),
        *rows(
            "batch | CFG adds | NASA, first call | later calls | later, to the whole call | "
            "counted, first / later | NAG, first call | later calls | later, part of CFG's", negatives_row,
        ),
        *rows(
            "batch | VAE, ms | tiny decoder | VAE / tiny",
            lambda one: [*_ms(one, "decode", "tiny"), times(one["decode_over_tiny"])],
        ),
        *(rows(
            "batch | whole call, ms | compiled | times as fast: whole call | network | decode", compiled_row,
            compiled,
        ) if compiled else []),
    ]) + "\n"  # fmt: skip


def parts_row(one: dict[str, Any]) -> list[str]:
    whole = one["milliseconds"]["whole"]
    return [
        *_ms(one, "text", "network", "decode", "whole"), f"{1000 * one['batch'] / whole:.1f}",
        *_ms(one, "stock"), f"**{times(one['whole_over_stock'], 3)}**", *_ms(one, "teacher"),
        f"{one['teacher_over_whole'][1]:.1f}",
    ]  # fmt: skip


def negatives_row(one: dict[str, Any]) -> list[str]:
    added, counted = one["added_to_network"], one["operations"]
    growth = [100 * (counted[name] / counted["network"] - 1) for name in ("nasa, first", "nasa, later")]
    return [
        *(percent(added[name]) for name in ("cfg", "nasa, first", "nasa, later")),
        percent(one["added_to_whole"]["nasa, later"]), " / ".join(f"+{value:.2f} %" for value in growth),
        *(percent(added[name]) for name in ("nag, first", "nag, later")),
        times(one["share_of_cfgs"]["nag, later"]),
    ]  # fmt: skip


def compiled_row(one: dict[str, Any]) -> list[str]:
    speedup = one["compiled_speedup"]
    faster = (times(speedup[name]) for name in ("whole", "network", "decode"))
    return [*_ms(one, "whole", "whole, compiled"), *faster]


def _ms(one: dict[str, Any], *names: str) -> list[str]:
    return [f"{one['milliseconds'][name]:.1f}" for name in names]


def times(found: list[float], digits: int = 2) -> str:
    """A ratio with its interval."""
    low, middle, high = (f"{value:.{digits}f}" for value in found)
    return f"{middle} ({low}–{high})"


def percent(found: list[float]) -> str:
    """A growth with its interval."""
    low, middle, high = (f"{100 * value:.1f}" for value in found)
    return f"+{middle} % ({low} to {high})".replace("+-", "-")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="emoji", help="--model, or a shape with random weights")
    add("--model", default="assets/emoji-sd-swiftbrush", help="run, .ckpt or folder (default: %(default)s)")
    add(
        "--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64],
        help="images per call (default: 1 to 64)",
    )  # fmt: skip
    add("--rounds", type=int, default=20, help="(default: %(default)s; the teacher has a fifth of them)")
    add("--dtype", choices=DTYPES, default="float32", help="of all weights (default: %(default)s)")
    add(
        "--compile", type=int, nargs="*", metavar="BATCH",
        help="also with network and decoder compiled, at these batch sizes (none given: all); minutes each",
    )  # fmt: skip
    add("--counts", action="store_true", help="also count operations of real backbones")
    add("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on the CPU")
    add(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: time of the process, for one thread on a machine that has other work",
    )  # fmt: skip
    add("--small", action="store_true", help="few channels, to try sd21 without a GPU")
    add("--output", type=Path, default=Path("outputs/benchmark_generate"), help="folder for .md and .json")
    add("--into", type=Path, help="also put the tables into this file, between its marks for this size")
    given = parser.parse_args(argv)
    if given.size != "emoji" and not given.small and not torch.cuda.is_available():
        parser.error(f"--size {given.size} needs a GPU, and there is none here; --small tries it on a CPU")
    if given.clock == "cpu" and (given.threads > 1 or torch.cuda.is_available()):
        parser.error("--clock cpu is for --threads 1 without a GPU")
    if min(*given.batch, given.rounds, given.threads) < 1:
        parser.error("--batch, --rounds and --threads must be at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(given.size, given.model, given.small, device, DTYPES[given.dtype])
    clock = time.process_time if given.clock == "cpu" else time.perf_counter

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    compiled = [] if given.compile is None else given.compile or given.batch
    results = [measure(model, batch, given.rounds, batch in compiled, now) for batch in given.batch]
    command = " ".join(["python", "benchmarks/generate.py", *(sys.argv[1:] if argv is None else argv)])
    where = (
        f"{machine()}; {given.dtype}, threads: {given.threads}, {given.rounds} rounds, {given.clock} clock; "
        f"{model.title}; largest difference from a stock picture (0 to 1): "
        f"{max(one['difference_from_stock'] for one in results):.1g}"
    )
    text = markdown(results, [f"`{command}`", "", where])
    if given.counts:
        text += "\n" + "\n".join(counts()) + "\n"
    facts = {"command": command, "where": where, "results": results}
    write_text(given.output / f"{given.size}.json", json.dumps(facts, indent=1))
    write_text(given.output / f"{given.size}.md", text)
    if given.into is not None:
        insert(text, given.into, f"generation {given.size}")
    print("\n" + text)


if __name__ == "__main__":
    main()
