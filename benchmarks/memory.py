"""What fits where: memory of a distillation by part, and the largest micro-batch that a GPU has room for.

    python benchmarks/memory.py                    the table in docs/performance.md; computed on any machine
    python benchmarks/memory.py --models sd21 --output memory.json
    python benchmarks/memory.py --check full.json  the estimate beside a measurement by full_size.py

Nothing is allocated: the networks are built on PyTorch's meta device from the published configurations, and
the two turns of an update run there, forward and backward, with bf16 autocast's casts and fused attention.
Weights and what follows from them are counted by the project's own memory table; activations and gradients
are the largest sum of tensors that are alive at once. Left out is what libraries take for themselves
(workspaces, fragmentation); `ROOM` leaves something for them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.meta_models import MODELS, Distillation, build, condition
from benchmarks.meta_tensors import Autocast, LiveMemory
from lightning_modules.diffusion.condition import Condition
from lightning_modules.memory import GRADIENTS, memory_by_part
from lightning_modules.networks.backbones.calling import run_network

GIB = 2**30
GPUS = {16: 15.6, 24: 23.6, 40: 39.4, 80: 79.1, 141: 139.8}
"""GiB of cards that are sold as so many GB."""
ROOM = 1.0, 0.05
"""What we leave free: GiB for CUDA and its libraries, and a share of the rest for fragmentation."""
STUDENTS = {
    "all weights, average": {"ema": True},
    "all weights": {},
    "all weights, 8-bit Adam": {"eight_bit": True},
    "LoRA, rank 256": {"lora": True},
}


@dataclass(frozen=True)
class Setting:
    """One row's way of training."""

    model: str
    lora: bool = False
    ema: bool = False
    eight_bit: bool = False


class Needs:
    """Bytes of activations and gradients over an update, as a function of the batch.

    The operations are the same for any batch above one (a batch of one needs fewer copies), so after each of
    them the memory is a + b B; two batches tell a and b. The largest sum is not quite proportional to B: it
    moves to other operations.

    Args:
        two, four: bytes after each operation, for batches of two and four.
    """

    def __init__(self, two: list[int], four: list[int]) -> None:
        first, second = np.array(two, np.float64), np.array(four, np.float64)
        self.constant, self.per_sample = 2 * first - second, (second - first) / 2

    def peak(self, batch: int) -> float:
        """Bytes at most."""
        return float((self.constant + self.per_sample * batch).max())

    def largest(self, size: float) -> int:
        """Samples that go into so many bytes; 0 if not even one."""
        if self.constant.max() > size:
            return 0
        growing = self.per_sample > 0
        return max(0, int(((size - self.constant[growing]) / self.per_sample[growing]).min()))


def turns(made: Distillation, batch: int, policy: Autocast) -> list[int]:
    """Bytes of activations and gradients after each operation of an update."""
    student, scores = made.module.student, made.module.scores
    with LiveMemory() as memory, policy:
        noise = torch.empty(batch, *made.latent, device="meta")
        t = torch.empty(batch, dtype=torch.long, device="meta")
        text, twice = condition(made.text, batch), condition(made.text, 2 * batch)
        x0 = run_network(student, noise, t, text)
        with torch.no_grad():  # both scores with guidance: 2 B samples in one call
            pair = _score_pair(scores, x0.detach(), t, twice)
        (x0.float() * pair).mean().backward()
        del x0, pair
        student.zero_grad(set_to_none=True)  # before the other turn begins
        with scores.adapter(True):
            output = run_network(scores.base, noise, t, text)
        output.float().square().mean().backward()
        scores.zero_grad(set_to_none=True)
    return memory.history


def _score_pair(scores: Any, x0: Tensor, t: Tensor, twice: Condition) -> Tensor:
    x_t, both = torch.cat([x0, x0]), torch.cat([t, t])
    with scores.teacher_network() as network:
        teacher = run_network(network, x_t, both, twice).float()
    with scores.adapter(True):
        fake = run_network(scores.base, x_t, both, twice).float()
    return (teacher - fake).chunk(2)[0]


def activations(
    model: str, lora: bool, checkpointing: bool, policy: Autocast, frozen: torch.dtype = torch.bfloat16
) -> Needs:
    """What activations and gradients of an update take."""
    made = build(model, lora=lora, checkpointing=checkpointing, frozen=frozen)
    return Needs(*(turns(made, batch, policy) for batch in (2, 4)))


def decoding(model: str) -> float:
    """Bytes at most while one picture is decoded, as in validation."""
    made = build(model)
    with LiveMemory() as memory, torch.no_grad(), Autocast():
        made.module.parts.vae.decode(torch.empty(1, *made.latent, device="meta", dtype=torch.bfloat16))
    return max(memory.history)


def fixed(setting: Setting) -> dict[str, int]:
    """Bytes of each part that stays, by the project's own table; without text encoders and gradients."""
    made = build(setting.model, lora=setting.lora, ema=setting.ema, eight_bit=setting.eight_bit)
    parts = memory_by_part(made.module)
    return {name: size for name, (_, size, _) in parts.items() if name != GRADIENTS}


def room(gib: float) -> float:
    """Bytes of a card that training may take."""
    return (gib - ROOM[0]) * (1 - ROOM[1]) * GIB


def rows(model: str, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """All ways of training one model."""
    needs = {}
    for lora in (False, True):
        for checkpointing in (False, True):
            bar.set_postfix_str(model)
            needs[lora, checkpointing] = activations(model, lora, checkpointing, Autocast())
            bar.update()
    decoded, found = decoding(model), []
    for name, changes in STUDENTS.items():
        parts = fixed(Setting(model, **changes))
        encoders = parts.pop("text encoders")
        constant, lora = sum(parts.values()), changes.get("lora", False)
        row: dict[str, Any] = {
            "model": model, "student": name, "fixed_gib": constant / GIB, "text_encoders_gib": encoders / GIB,
            "parts": parts, "decoding_gib": decoded / GIB,
        }  # fmt: skip
        for checkpointing in (False, True):
            need, key = needs[lora, checkpointing], "checkpointing" if checkpointing else "plain"
            row[key] = {"gib_by_batch": {batch: need.peak(batch) / GIB for batch in (1, 2, 4, 8, 16, 32)}}
            row[key]["largest"] = {gb: need.largest(room(gib) - constant) for gb, gib in GPUS.items()}
        found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: GiB in all for one sample, then what fits; without / with gradient checkpointing."""
    head = ["", "student", "weights and states", "batch 1", *(f"{gb} GB" for gb in GPUS)]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for row in found:
        ways = row["plain"], row["checkpointing"]
        alone = " / ".join(f"{row['fixed_gib'] + way['gib_by_batch'][1]:.1f}" for way in ways)
        cells = [
            MODELS[row["model"]].title, row["student"], f"{row['fixed_gib']:.1f}", alone,
            *(" / ".join(str(way["largest"][gb] or "–") for way in ways) for gb in GPUS),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check(path: Path) -> str:
    """The estimate for a run of full_size.py beside what it measured."""
    measured = json.loads(path.read_text(encoding="utf-8"))
    model, lora = "sd21_small" if measured["small"] else "sd21", measured["student"] == "lora"
    mixed = measured["precision"] == "bf16-mixed"
    policy = Autocast(enabled=mixed, float32_norms=False, fused_attention=False)  # as autocast is on the CPU
    kind = torch.bfloat16 if mixed else torch.float32
    needed = activations(model, lora, True, policy, kind).peak(1)
    weights = sum(part["bytes"] for name, part in measured["parts"].items() if name != GRADIENTS)
    imports = measured["phases"][0]["after_gib"]
    peak = max(row["peak_gib"] for row in measured["phases"][2:])  # of the updates, without loading
    estimate = imports + (weights + needed) / GIB
    return (
        f"{path.name}: estimated {imports:.2f} (imports) + {weights / GIB:.2f} (parts) + "
        f"{needed / GIB:.2f} (gradients, activations) = {estimate:.2f} GiB, "
        f"measured {peak:.2f} GiB: {estimate / peak - 1:+.1%}"
    )


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    published = [name for name in MODELS if not name.endswith("small")]
    parser.add_argument("--models", nargs="+", choices=published, default=published)
    parser.add_argument("--check", type=Path, nargs="+", help="JSON files of benchmarks/full_size.py")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    if options.check:
        print("\n".join(check(path) for path in options.check))
        return
    with tqdm(total=4 * len(options.models), unit="run") as bar:
        found = [row for model in options.models for row in rows(model, bar)]
    print(table(found))
    for model in options.models:
        row = next(row for row in found if row["model"] == model)
        print(
            f"{MODELS[model].title}: text encoders {row['text_encoders_gib']:.1f} GiB in bf16 if prompts "
            f"aren't cached; decoding takes {row['decoding_gib']:.1f} GiB a picture in validation"
        )
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
