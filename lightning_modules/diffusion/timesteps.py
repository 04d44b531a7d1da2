"""Where on the schedule a loss looks: uniform numbers in, timesteps out."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.diffusion.steps import Steps


class UniformTimesteps:
    """Integer timesteps, uniform over ``low`` … ``high`` − 1.

    Raises:
        ValueError: unless 0 ≤ low < high.
    """

    def __init__(self, low: int, high: int) -> None:
        if not 0 <= low < high:
            raise ValueError(f"timesteps need 0 <= low < high, got low={low}, high={high}")
        self.low = low
        self.high = high

    def draw(self, u: Tensor) -> Tensor:
        """Timesteps, int64, same shape as ``u``, whose entries are uniform in [0, 1), float32 or float64.

        In these types u < 1 implies u n < n after rounding too, so ``high`` is never reached.
        """
        return self.low + (u * (self.high - self.low)).long()


def own_timesteps(steps: Steps, low: int, high: int) -> list[UniformTimesteps]:
    """The part of ``low`` … ``high`` − 1 that is each step's own: from the next one's timestep to its own.

    Raises:
        ValueError: one has none.
    """
    ends = [*steps.timesteps[1:], 0]
    return [
        UniformTimesteps(max(low, end), min(high, top))
        for end, top in zip(ends, steps.timesteps, strict=True)
    ]
