"""Weights of auxiliary losses over the training: pure functions of the student step, so resuming is exact."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from common.errors import UserError


class WeightSchedule(ABC):
    """A weight for each student step."""

    @abstractmethod
    def __call__(self, step: int, max_steps: int) -> float:
        """The weight after `step` student updates, of a training of `max_steps`.

        Raises:
            UserError: the schedule depends on the length of the training, and that is not known.
        """


class ConstantWeight(WeightSchedule):
    """The same weight always."""

    def __init__(self, value: float) -> None:
        self.value = _weight("value", value)

    def __call__(self, step: int, max_steps: int) -> float:
        """`value`."""
        return self.value


class LinearWeight(WeightSchedule):
    """From `start` to `end` on a straight line (SwiftBrush v2, arXiv 2408.14176: 0.1 to 0).

    Args:
        start: weight of the first update.
        end: weight that is reached after `steps` updates, and stays.
        steps: length of the way; null: the whole training.
    """

    def __init__(self, start: float = 0.1, end: float = 0.0, steps: int | None = None) -> None:
        if steps is not None and steps < 1:
            raise UserError(f"the steps of a weight schedule must be at least 1, or null; got {steps}")
        self.start, self.end, self.steps = _weight("start", start), _weight("end", end), steps

    def __call__(self, step: int, max_steps: int) -> float:
        """start + (end - start) * way."""
        return self.start + (self.end - self.start) * self._way(step, max_steps)

    def _way(self, step: int, max_steps: int) -> float:
        """How much of the way is behind, in [0, 1]."""
        length = self.steps or max_steps
        if length <= 0:
            raise UserError(
                "the weight of an image loss follows the length of the training, and there is none: set "
                "trainer.max_steps, or the steps of the schedule"
            )
        return min(step / length, 1.0)


class CosineWeight(LinearWeight):
    """From `start` to `end` on half a cosine, flat at both ends; arguments as `LinearWeight`."""

    def _way(self, step: int, max_steps: int) -> float:
        return (1 - math.cos(math.pi * super()._way(step, max_steps))) / 2


class PiecewiseWeight(WeightSchedule):
    """Straight lines between given points: any shape.

    Args:
        points: [step, weight] pairs, steps rising; before the first and after the last the weight stays.
    """

    def __init__(self, points: list[tuple[int, float]]) -> None:
        steps = [step for step, _ in points]
        if not points or any(later <= earlier for earlier, later in zip(steps, steps[1:])):
            raise UserError(
                f"the points of a weight schedule are [step, weight] pairs, steps rising; got {points}"
            )
        self.points = [(step, _weight("points", weight)) for step, weight in points]

    def __call__(self, step: int, max_steps: int) -> float:
        """The weight on the line between the neighbouring points."""
        if step <= self.points[0][0]:
            return self.points[0][1]
        for (left, low), (right, high) in zip(self.points, self.points[1:]):
            if step <= right:
                return low + (high - low) * (step - left) / (right - left)
        return self.points[-1][1]


def as_schedule(weight: float | WeightSchedule | None) -> WeightSchedule:
    """The schedule itself, a constant for a number, and SwiftBrush v2's line from 0.1 to 0 for None."""
    if weight is None:
        return LinearWeight()
    return weight if isinstance(weight, WeightSchedule) else ConstantWeight(weight)


def _weight(name: str, value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{name} of a weight schedule must be a finite number of at least 0, got {value}")
    return float(value)
