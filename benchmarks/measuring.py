"""What all benchmarks share: taking turns, medians with intervals, memory, and how results are written."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common.environment import environment

MIB, GIB = 2**20, 2**30


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


def times(found: Sequence[float], digits: int = 2) -> str:
    """A median with its interval."""
    low, middle, high = (f"{value:.{digits}f}" for value in found)
    return f"{middle} ({low}–{high})"


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that has a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def parser(text: str | None) -> argparse.ArgumentParser:
    """A command line explained by the file's own text, with the options that all have."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="a JSON file for the numbers")
    return made


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(settings: str = "") -> tuple[str, str]:
    """The command, and on what it ran."""
    found = environment()
    device = found["gpus"][0] if found["gpus"] else f"{found['processor']}, no GPU"
    command = " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    where = f"{device}; PyTorch {found['torch']}, {time.strftime('%Y-%m-%d')}{settings and '; ' + settings}"
    return command, where


def write(text: str, numbers: Any, output: Path | None, settings: str = "") -> None:
    """Print the tables under the command and the machine; write the numbers if there is a file for them."""
    command, where = machine(settings)
    print(f"\n`{command}`\n\n{where}\n\n{text}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": command, "where": where, "numbers": numbers}
        output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
