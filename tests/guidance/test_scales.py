"""Guidance scales: fixed, and uniform per step or per sample."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.guidance.scales import FixedGuidance, UniformGuidance, as_guidance


def test_numbers_become_fixed_scales_and_rules_pass_through() -> None:
    random = StepRandom(0, 0, torch.arange(3))
    assert as_guidance(4.5).draw(random) == 4.5
    assert as_guidance(1).draw(random) == 1.0
    rule = UniformGuidance(0.5, 4)
    assert as_guidance(rule) is rule


def test_uniform_is_one_number_for_the_global_batch() -> None:
    rule = UniformGuidance(0.5, 4)
    draws = []
    for step in range(2000):
        kappa = rule.draw(StepRandom(0, step, torch.arange(2)))
        assert isinstance(kappa, float)
        assert kappa == rule.draw(StepRandom(0, step, torch.arange(2, 9)))
        draws.append(kappa)
    values = torch.tensor(draws)
    assert values.min() >= 0.5 and values.max() <= 4
    assert values.min() < 0.6 and values.max() > 3.9
    assert abs(values.mean() - 2.25) < 5 * 3.5 / math.sqrt(12 * len(values))


def test_uniform_per_sample() -> None:
    kappa = UniformGuidance(-1, 1, per_sample=True).draw(StepRandom(0, 0, torch.arange(2000)))
    assert isinstance(kappa, torch.Tensor) and kappa.shape == (2000,)
    assert kappa.min() >= -1 and kappa.max() <= 1 and kappa.unique().numel() > 1900
    assert abs(kappa.mean()) < 5 * 2 / math.sqrt(12 * 2000)


def test_a_range_of_one_value() -> None:
    assert UniformGuidance(3, 3).draw(StepRandom(0, 0, torch.arange(2))) == 3


@pytest.mark.parametrize(("low", "high"), [(2, 1), (float("nan"), 1), (0, float("inf"))])
def test_impossible_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low <= high"):
        UniformGuidance(low, high)


def test_an_infinite_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        FixedGuidance(float("inf"))
