"""Decoupled DMD against DMD2, and each of its two terms against a closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.objectives.decoupled_dmd import DecoupledDMD
from lightning_modules.objectives.dmd2 import DMD2
from tests.objectives.analytic import FAKE, REAL, VALUES, built, posterior_mean, student_gradient


def test_equal_settings_are_dmd2_with_guidance(make_scores: Any, text: Any) -> None:
    scores = make_scores(real=REAL, fake=FAKE)
    ours = student_gradient(DecoupledDMD(3.0, guidance_timesteps=None), text(VALUES, null=0.25), scores)
    other = student_gradient(DMD2(3.0), text(VALUES, null=0.25), scores)
    torch.testing.assert_close(ours[2], other[2], rtol=1e-4, atol=1e-8)
    assert ours[2].abs().max() > 1e-3


@pytest.mark.parametrize(("guidance", "matching"), [(2.0, 0.0), (0.0, 0.5)])
def test_each_term_alone(
    guidance: float, matching: float, make_scores: Any, text: Any, schedule: NoiseSchedule
) -> None:
    """Guidance: −(κ − 1)(y_y − y_∅)/ω at its own noised samples; matching: (y_fake − y_y)/ω at its own."""
    scores, null, kappa = make_scores(real=REAL, fake=FAKE), 0.25, 3.0
    objective = DecoupledDMD(kappa, (600, 700), guidance, matching, max_timestep=500)
    x0, _, gradient = student_gradient(objective, text(VALUES, null=null), scores)
    at = {"teacher": scores.calls[-1], "fake_score": scores.calls[2]}["teacher" if guidance else "fake_score"]
    low, high = (600, 700) if guidance else (20, 500)
    assert at.t.min() >= low and at.t.max() < high
    with_text, without, guided = (
        posterior_mean(schedule, at.x_t, at.t, REAL, values)
        for values in (VALUES, torch.full((4,), null), null + kappa * (VALUES - null))
    )
    fake = posterior_mean(schedule, at.x_t, at.t, FAKE)
    term = -guidance * (kappa - 1) * (with_text - without) + matching * (fake - with_text)
    g = term / (x0 - guided).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, g / g.numel(), rtol=2e-3, atol=2e-6)
    assert g.abs().max() > 0.1


def test_timesteps_past_the_schedule(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="the end of guidance_timesteps is 1001"):
        built(DecoupledDMD(guidance_timesteps=(500, 1001)), schedule)
