"""Where on the schedule a loss looks: uniform numbers in, timesteps out."""

from __future__ import annotations

from torch import Tensor


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
        """Timesteps, int64, same shape as ``u``, whose entries are uniform in [0, 1)."""
        span = self.high - self.low
        # The clamp matters: in float32 the largest u below 1 times 960 rounds to 960.
        return self.low + (u * span).long().clamp_(max=span - 1)
