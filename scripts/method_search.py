"""Searches settings for the methods' benchmark: the same three trials for every method.

    python scripts/method_search.py                        all trials; stopped at any moment, it goes on
    python scripts/method_search.py --only pgsb,dmd2
    python scripts/method_search.py --report-only          the table of what is there

A trial is a cell of scripts/method_benchmark.py with seed 0. The first has a guidance scale of 2, the second
of 4 (PG-SB: on average, from 0.5 on; what builds on SiD-LSG: in all its places), both at the rates of the
method's configuration; the third has the better one of the two and doubles the rates of student and fake
score. Better is the smaller frechet_distance of the student's average on the choosing captions, so that
nothing is chosen by the captions of the reports. Writes search.json and search.md, and keeps the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from callbacks.metrics.measure import evaluate_model
from common.files import write_text_atomically
from datamodules.prompts import read_prompts
from datamodules.sources import VAL_CAPTIONS
from lightning_modules.generator import load_generator
from reports.text import markdown_table
from scripts.method_benchmark import (
    METHODS,
    Cell,
    affordable,
    bound_metrics,
    configure,
    draw_samples,
    in_passes,
    train,
)

GUIDANCE, FASTER = (2.0, 4.0), 2.0


class Trial(NamedTuple):
    """What is tried; see `Cell`."""

    guidance: float
    rates: float = 1.0

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"guidance{self.guidance:g}-rates{self.rates:g}"


class Chooser:
    """Measures a checkpoint on the choosing captions."""

    def __init__(self) -> None:
        self.captions = read_prompts(VAL_CAPTIONS)
        _, self.metrics = bound_metrics()

    def measure(self, checkpoint: Path) -> dict[str, float]:
        """Values by the metrics' names."""
        draw = in_passes(load_generator(checkpoint).eval().images)
        results = evaluate_model(draw, self.captions, self.metrics, 64)
        return {metric.name: float(results[metric.name]["value"]) for metric in self.metrics}


def run_trial(
    method: str, trial: Trial, updates: int, chooser: Chooser, folder: Path, samples: Path, batch_size: int
) -> bool:
    """Train and measure unless that has been done; False if it failed."""
    cell, root = Cell(method, 0, *trial), folder / trial.name
    kept = root / cell.name / "values.json"
    if kept.is_file():
        return True
    last = train(root / cell.name, configure(cell, updates, root, samples, batch_size))
    if last is None:
        return False
    values = chooser.measure(last) | {"updates": updates}
    write_text_atomically(kept, json.dumps(values))
    print(f"{method}, {trial.name}: {values}", flush=True)
    return True


def distance(method: str, trial: Trial, folder: Path) -> float | None:
    """Of a trial that has been run."""
    kept = folder / trial.name / Cell(method, 0).name / "values.json"
    return json.loads(kept.read_text())["frechet_distance"] if kept.is_file() else None


def best(found: dict[Trial, float | None]) -> Trial | None:
    """The trial of the smallest distance, None before all have been run."""
    known = {trial: value for trial, value in found.items() if value is not None}
    return min(known, key=lambda trial: known[trial]) if len(known) == len(found) else None


def trials(method: str, folder: Path) -> dict[Trial, float | None]:
    """Distances of a method's trials, of the third as soon as it is known which it is."""
    found = {trial: distance(method, trial, folder) for trial in map(Trial, GUIDANCE)}
    better = best(found)
    if better is not None:
        faster = Trial(better.guidance, FASTER)
        found[faster] = distance(method, faster, folder)
    return found


def write_report(folder: Path) -> None:
    """search.json and search.md of the trials that are there."""
    rows, table = [], []
    for method, row in METHODS.items():
        found = trials(method, folder)
        chosen = best(found) if len(found) > len(GUIDANCE) else None
        rows += [{"method": method, **trial._asdict(), "frechet_distance": value, "chosen": trial == chosen}
                 for trial, value in found.items() if value is not None]  # fmt: skip
        shown = ["–" if value is None else f"{value:.2f}" for value in found.values()]
        told = "–" if chosen is None else f"{chosen.guidance:g}, rates × {chosen.rates:g}"
        table.append([row.title, *shown, *["–"] * (len(GUIDANCE) + 1 - len(shown)), told])
    head = ["method", *(f"κ {scale:g}" for scale in GUIDANCE), f"the better κ, rates × {FASTER:g}", "best"]
    write_text_atomically(folder / "search.json", json.dumps(rows, indent=1) + "\n")
    write_text_atomically(folder / "search.md", "\n".join(markdown_table(head, table)) + "\n")


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line says; exit status 1 if a trial failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--updates", type=int, default=100, help="budget in updates of SwiftBrush (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="prompts per update (default: %(default)s)")
    add("--only", default=",".join(METHODS), help="methods between commas (default: all)")
    add("--output", type=Path, default=Path("outputs/methods"))
    add("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(words)
    methods = options.only.split(",")
    if unknown := set(methods) - METHODS.keys():
        parser.error(f"no method {sorted(unknown)[0]!r}: there are {', '.join(METHODS)}")
    folder = (options.output / f"search-{options.updates}x{options.batch_size}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chooser, whole = Chooser(), True
    for number in () if options.report_only else range(len(GUIDANCE) + 1):
        for method in methods:
            found = [*trials(method, folder)]
            if number >= len(found):  # one of the first two failed
                continue
            cell = Cell(method, 0)
            samples = draw_samples(cell, folder)
            updates = affordable(cell, options.updates, folder, samples, options.batch_size)
            whole &= run_trial(method, found[number], updates, chooser, folder, samples, options.batch_size)
            write_report(folder)
    write_report(folder)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
