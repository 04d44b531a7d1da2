"""A step's prompts, cut into batches and into the parts of them that fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.objectives.base import Inputs, StudentSample


@dataclass
class Part:
    """What one pass takes, and what became of it within the step.

    Attributes:
        prompts: b prompts.
        indices: their places in the global batch, [b].
        share: b as a share of this process's batch.
        number: of the batch within the step.
        place: of the part among this process's parts of the batch.
        passes: the number of those.
        negatives: b negative prompts, if there are some.
        random: of the step, for these samples.
        inputs: prompts encoded, once for all turns.
        sample: of the student, without its graph, once a turn has made it.
    """

    prompts: list[str]
    indices: Tensor
    share: float
    number: int = 0
    place: int = 0
    passes: int = 1
    negatives: list[str] | None = None
    random: StepRandom | None = None
    inputs: Inputs | None = None
    sample: StudentSample | None = None


def cut(batch: Mapping[str, Any], batches: int, size: int | None) -> list[list[Part]]:
    """The parts of each of the step's batches, `size` prompts each (None: the whole batch at once).

    Args:
        batch: "prompts", their "indices" in the global batch, and perhaps "negative_prompts", of all the
            step's batches, one batch after the other.
        batches: their number.
        size: prompts of a pass.
    """
    prompts, indices, negatives = batch["prompts"], batch["indices"], batch.get("negative_prompts")
    whole = len(prompts) // batches
    size = size or whole
    parts: list[list[Part]] = []
    for number in range(batches):
        places = [
            slice(start, min(start + size, (number + 1) * whole))
            for start in range(number * whole, (number + 1) * whole, size)
        ]
        parts.append([
            Part(prompts[at], indices[at], len(prompts[at]) / whole, number, place, len(places),
                 negatives[at] if negatives else None)
            for place, at in enumerate(places)
        ])  # fmt: skip
    return parts
