"""Training steps a second and peak memory, against a plain loop that works as the public SwiftBrush script.

    python benchmarks/train_step.py                                      bundled models, batch 16: minutes
    python benchmarks/train_step.py --size sd21 --batch 1 2 4 8 16 32    needs a GPU; bf16
    python benchmarks/train_step.py --size sd21 --small --rounds 2       tries that code on any machine

This project runs as `fit` does: its module under a Lightning Trainer, with the settings of
configs/experiment/emoji_swiftbrush_official.yaml. The plain loop (benchmarks/reference_loop.py) has the same
weights, prompts, random draws, batch and precision. Both take turns on the same machine, each in a process of
its own that rests meanwhile; a time is the median over the rounds, a ratio the median of the rounds' ratios,
with the quartiles beside it.
Losses of the first 20 steps are compared. Peak memory is that of each alone in a process of its own, above
what the imports take (on a GPU: allocated there).

The floor is the time that the counted operations of a step (matrix products, convolutions, attention) would
take at the rate of a large matrix product, measured in every round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import SIZES, model_folder
from benchmarks.training_rounds import LOSSES, alone, measure_memory, measure_speed, write_prompt_cache
from common.environment import environment

COMPARED = 20  # steps whose losses are compared


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Everything about one batch size."""
    found = alone(measure_speed, options)
    memory = {side: alone(measure_memory, options, side) for side in ("project", "reference")}
    return {"batch": options["batch"], "memory_mib": memory, **summary(found, options["batch"])}


def summary(found: dict[str, Any], batch: int) -> dict[str, Any]:
    """Medians, quartiles, ratios, differences of losses, floor."""
    seconds, counted = found["seconds"], dict(found["operations"])
    own = counted.pop("project")
    ratios = [b / a for a, b in zip(seconds["project"], seconds["reference"], strict=True)]
    floors = [sum(counted.values()) / rate for rate in found["matrix_rates"]]
    return {
        "seconds": {side: quartiles(values) for side, values in seconds.items()},
        "images_per_second": batch / statistics.median(seconds["project"]),
        "speed_ratio": quartiles(ratios),
        "rounds": len(ratios),
        "loss_differences": {name: difference(found["losses"], name) for name in LOSSES},
        "operations": {"project": own, **counted},
        "matrix_rate": statistics.median(found["matrix_rates"]),
        "share_of_matrix_rate": {
            side: quartiles([floor / time for floor, time in zip(floors, values, strict=True)])
            for side, values in seconds.items()
        },
        "losses": found["losses"],
    }


def difference(losses: dict[str, dict[str, list[float]]], name: str) -> float:
    """Largest difference of the two curves in the first 20 steps, relative to the curve's largest value."""
    ours, plain = (losses[side][name][:COMPARED] for side in ("project", "reference"))
    return max(abs(a - b) for a, b in zip(ours, plain, strict=True)) / max(plain)


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def markdown(results: list[dict[str, Any]], command: str, where: str) -> str:
    """Tables of all batch sizes."""
    lines = [
        f"`{command}`", "", where, "",
        "| batch | steps/s | plain loop | ratio (quartiles) | memory of the step, MiB | plain loop | "
        "largest loss difference | of the matrix rate | plain loop |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for one in results:
        low, ratio, high = one["speed_ratio"]
        cells = [
            f"{one['batch']}", *(f"{1 / one['seconds'][side][1]:.3f}" for side in ("project", "reference")),
            f"**{ratio:.2f}** ({low:.2f}–{high:.2f})",
            *(f"{one['memory_mib'][side]['step']:.0f}" for side in ("project", "reference")),
            f"{max(one['loss_differences'].values()):.0e}",
            *(f"{100 * one['share_of_matrix_rate'][side][1]:.0f} %" for side in ("project", "reference")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    first = results[0]
    rate, parts = first["matrix_rate"], {k: v for k, v in first["operations"].items() if k != "project"}
    title = f"floor of a step, batch {first['batch']}"
    lines += ["", f"| {title} | GFLOP | at {rate / 1e9:,.0f} GFLOP/s, ms |", "|---|---:|---:|"]
    for name, count in {**parts, "all": sum(parts.values())}.items():
        lines.append(f"| {name} | {count / 1e9:,.1f} | {1000 * count / rate:,.0f} |")
    return "\n".join(lines) + "\n"


def insert(text: str, path: Path, name: str) -> None:
    """Put text between the lines ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a file."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path} has no lines {begin.strip()} and {end}")
    write_text(path, before + begin + text + end + after)


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def machine() -> str:
    """What it ran on, in words."""
    found = environment()
    device = found["gpus"][0] if found["gpus"] else f"{found['processor']}, no GPU"
    return f"{device}; PyTorch {found['torch']}, {time.strftime('%Y-%m-%d')}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=SIZES, default="emoji", help="bundled models, or a shape with random weights"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="prompts per step")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="default: bf16-mixed on a GPU")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--per-round", type=int, default=2, help="steps of each in a round")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: time of the process, for one thread on a machine that has other work",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="set the module's option compile")
    parser.add_argument(
        "--cached-text", action="store_true",
        help="encode prompts beforehand (option prompt_cache), as the plain loop does",
    )  # fmt: skip
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of this project's student")
    parser.add_argument(
        "--small", action="store_true", help="few channels, to try sd21 and pixart without a GPU"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/train_step"), help="folder for .md and .json"
    )
    parser.add_argument("--into", type=Path, help="also put the tables into this file, between its two marks")
    options = parser.parse_args()
    if options.size != "emoji" and not options.small and not torch.cuda.is_available():
        parser.error(
            f"--size {options.size} needs a GPU, and there is none here; --small tries the code on a CPU"
        )
    if options.clock == "cpu" and (options.threads > 1 or torch.cuda.is_available()):
        parser.error("--clock cpu is for one thread without a GPU")
    return options


def main() -> None:
    given = arguments()
    precision = given.precision or ("bf16-mixed" if torch.cuda.is_available() else "32-true")
    # steps up to a multiple of the round's, the first ones for warming up
    options: dict[str, Any] = {
        "precision": precision, "per_round": given.per_round, "threads": given.threads, "clock": given.clock,
        "compile": given.compile, "apart": True, "memory_steps": 3, "changes": changes(given),
        "steps": 1 + given.per_round * (given.rounds + 1),
    }  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(given.size, Path(temporary) / "model", given.small)
        options |= {"folder": str(folder), "texts": str(Path(temporary) / "texts.pt")}
        if given.cached_text:
            options["changes"]["prompt_cache"] = write_prompt_cache(folder, Path(temporary) / "prompts")
        for batch in given.batch:
            results.append(measure(options | {"batch": batch}))
            print(json.dumps({k: v for k, v in results[-1].items() if k != "losses"}), flush=True)
    command = " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]])
    rounds = f"{given.rounds} rounds of {given.per_round} steps, {given.clock} clock"
    where = f"{machine()}; {precision}, threads: {given.threads}, {rounds}"
    text = markdown(results, command, where)
    write_text(given.output / "train_step.json", json.dumps(results, indent=1))
    write_text(given.output / "train_step.md", text)
    if given.into is not None:
        insert(text, given.into, "compiled training step" if given.compile else "training step")
    print("\n" + text)


def changes(given: argparse.Namespace) -> dict[str, Any]:
    """Options of the module that differ from the configuration."""
    found = {"compile": given.compile, "gradient_checkpointing": given.gradient_checkpointing}
    return {name: True for name, value in found.items() if value}


if __name__ == "__main__":
    main()
