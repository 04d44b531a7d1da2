"""Uni-Instruct's loss against closed forms on Gaussian data; the reverse KL as SiD."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.sid_lsg import SiDLSG
from lightning_modules.objectives.uni_instruct import UniInstruct
from tests.objectives.analytic import (
    FAKE,
    REAL,
    VALUES,
    alpha_sigma,
    built,
    log_ratio,
    posterior_mean,
    student_gradient,
)


def exact(divergence: str, schedule: NoiseSchedule, **settings: Any) -> Any:
    """With the Gaussians' own ratio."""
    objective = UniInstruct(Discriminator(["x"]), divergence, ratio_range=(0.5, 2.0), **settings)
    objective.discriminator.log_ratio = lambda x_t, t, *_: log_ratio(schedule, x_t, t)
    return built(objective, schedule)


def test_the_reverse_kl_is_sid(make_scores: Any, text: Any, schedule: NoiseSchedule) -> None:
    scores = make_scores(real=REAL, fake=FAKE)
    ours = student_gradient(exact("reverse_kl", schedule), text(VALUES), scores, "sid")
    other = student_gradient(SiDLSG(), text(VALUES), scores)
    for a, b in zip(ours, other):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "pearson"])
def test_student_gradient_equals_the_analytic_one(
    name: str, make_scores: Any, text: Any, schedule: NoiseSchedule
) -> None:
    """Per sample h(r) ∇SiD − ½ r² h'' SNR ‖D‖² D / ω / B, r that of the noised Gaussians in its range."""
    scores, plain = make_scores(real=REAL, fake=FAKE), {"teacher_guidance": 1.0, "fake_guidance": 1.0}
    x0, _, gradient = student_gradient(exact(name, schedule, **plain), text(VALUES), scores, "sid")
    _, _, sid = student_gradient(SiDLSG(**plain), text(VALUES), scores)
    call = scores.calls[0]
    x_t, (alpha, sigma) = call.x_t.detach(), alpha_sigma(schedule, call.t)
    real, fake = (posterior_mean(schedule, x_t, call.t, data) for data in (REAL, FAKE))
    ratio = log_ratio(schedule, x_t, call.t).exp()[:, None, None, None]
    r = ratio.clamp(0.5, 2.0)
    assert not r.equal(ratio)
    h, second = {
        "forward_kl": (r, 0 * r),
        "jensen_shannon": (r / (1 + r), -2 / (1 + r) ** 3),
        "pearson": (r**2, 2 + 0 * r),
    }[name]
    d, omega = real - fake, (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    squares = d.square().sum((1, 2, 3), keepdim=True)
    direct = -0.5 * r**2 * second * (alpha / sigma) ** 2 * squares * d / omega / len(x0)
    torch.testing.assert_close(gradient, h * sid + direct, rtol=5e-3, atol=1e-3)
    assert name == "forward_kl" or direct.abs().max() > 1e-2
