"""Scales for training: fixed, or drawn anew at each student step. Imports torch only.

Of guidance, κ as in ε^κ = ε_∅ + κ (ε_y − ε_∅), where 1 is no guidance; or of a negative prompt in attention,
α as in Z = Z⁺ − α Z⁻, where 0 is none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from lightning_modules.diffusion.randomness import StepRandom


class GuidanceScale(ABC):
    """A rule that yields κ for the samples of one student step."""

    @abstractmethod
    def draw(self, random: StepRandom, name: str = "guidance_scale") -> float | Tensor:
        """κ: one number for the whole global batch, or one per sample [B].

        Draws of one step under one `name` come from the same random numbers.
        """


class FixedGuidance(GuidanceScale):
    """The same κ always (SwiftBrush, arXiv 2312.05239: 4.5).

    Raises:
        ValueError: if ``value`` is not finite.
    """

    def __init__(self, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"the guidance scale must be a finite number, got {value}")
        self.value = float(value)

    def __str__(self) -> str:
        return f"{self.value:g}"

    def draw(self, random: StepRandom, name: str = "guidance_scale") -> float:
        """The fixed κ."""
        return self.value


class UniformGuidance(GuidanceScale):
    """κ ~ U(low, high), as in PG-SB (SNOOPI, arXiv 2412.02687).

    Args:
        low: least κ.
        high: largest κ.
        per_sample: one draw per sample rather than, as the paper's text has it, one per iteration.

    Raises:
        ValueError: unless both are finite and low ≤ high.
    """

    def __init__(self, low: float, high: float, per_sample: bool = False) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"the guidance range needs finite low <= high, got low={low}, high={high}")
        self.low = float(low)
        self.high = float(high)
        self.per_sample = per_sample

    def __str__(self) -> str:
        return f"U({self.low:g}, {self.high:g})"

    def draw(self, random: StepRandom, name: str = "guidance_scale") -> float | Tensor:
        """κ of this step, a number or [B]."""
        u = random.uniform(name) if self.per_sample else random.shared_uniform(name)
        return self.low + (self.high - self.low) * u


def as_guidance(scale: float | GuidanceScale) -> GuidanceScale:
    """``scale`` itself if it is a rule already, else the rule that always yields this number."""
    return scale if isinstance(scale, GuidanceScale) else FixedGuidance(scale)
