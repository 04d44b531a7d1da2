"""How a training step's time and memory grow with batch, resolution, LoRA rank and number of processes.

    python benchmarks/cost_growth.py                     bundled models, CPU; about ten minutes
    python benchmarks/cost_growth.py --steps 3           a quick look

The settings are those of configs/experiment/emoji_swiftbrush_official.yaml (batch 16, 8 x 8 latents, rank 64,
one process of one thread), one of them changed at a time, each in processes of its own. Times are medians
over the steps with the quartiles, the first two left out; memory is the largest of a process, above what its
imports take. Several processes share the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import EMOJI
from benchmarks.train_step import insert, machine, quartiles, write_text
from benchmarks.training_rounds import MIB, Clock, build, peak_resident_bytes, train

BASE = {"batch": 16, "latent side": 8, "LoRA rank": 64, "processes": 1}
GROWTH = {
    "batch": (1, 2, 4, 8, 32, 64), "latent side": (16, 24), "LoRA rank": (4, 16, 256), "processes": (2,),
}  # fmt: skip
WARM_UP = 2


def settings() -> list[dict[str, int]]:
    """The base, then each change of it."""
    return [dict(BASE), *(BASE | {name: value} for name, values in GROWTH.items() for value in values)]


def teacher(folder: Path, side: int) -> Path:
    """The bundled teacher, told another size: its network takes any."""
    path = folder / str(side)
    if not path.is_dir():
        shutil.copytree(EMOJI, path)
        config = path / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": side}))
    return path


def one_process(rank: int, port: int, folder: str, setting: dict[str, int], steps: int) -> dict[str, Any]:
    """Seconds of the steps and memory of one of the processes."""
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    if (world := setting["processes"]) > 1:  # as torchrun would have it
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_RANK": "0",
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "cost-growth",
        }  # fmt: skip
    lora = {"rank": setting["LoRA rank"], "alpha": 108, "targets": ["to_q", "to_v"]}
    module, data = build(Path(folder), setting["batch"], lora=lora)
    clock = Clock()
    train(module, data, clock, steps + WARM_UP, "32-true", world)
    return {"seconds": clock.seconds[WARM_UP - 1 :], "memory_mib": (peak_resident_bytes() - before) / MIB}


def measure(folder: Path, setting: dict[str, int], steps: int) -> dict[str, Any]:
    """Time and memory of one setting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world, path = setting["processes"], str(teacher(folder, setting["latent side"]))
    with ProcessPoolExecutor(world, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(one_process, rank, port, path, setting, steps) for rank in range(world)]
        found = [task.result() for task in tasks]
    return {
        **setting,
        "milliseconds": [1000 * value for value in quartiles(found[0]["seconds"])],
        "memory_mib": max(one["memory_mib"] for one in found),
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """One table; what differs from the first row is bold."""
    lines = [
        f"| {' | '.join(BASE)} | ms per step (quartiles) | times the first row | memory, MiB |",
        f"|{'---:|' * (len(BASE) + 3)}",
    ]
    for one in results:
        low, median, high = one["milliseconds"]
        cells = [f"**{one[name]}**" if one[name] != BASE[name] else str(one[name]) for name in BASE]
        ratio = median / results[0]["milliseconds"][1]
        cells += [f"{median:,.0f} ({low:,.0f}–{high:,.0f})", f"{ratio:.2f}", f"{one['memory_mib']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each setting")
    parser.add_argument("--output", type=Path, default=Path("outputs/cost_growth"), help="for .md and .json")
    parser.add_argument("--into", type=Path, help="also put the table into this file, between its two marks")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bar = tqdm(settings(), desc="settings")
        results = [measure(Path(temporary), setting, given.steps) for setting in bar]
    text = f"`python benchmarks/cost_growth.py --steps {given.steps}`\n\n{machine()}\n\n{markdown(results)}"
    write_text(given.output / "cost_growth.json", json.dumps(results, indent=1))
    write_text(given.output / "cost_growth.md", text)
    if given.into is not None:
        insert(text, given.into, "cost growth")
    print("\n" + text)


if __name__ == "__main__":
    main()
