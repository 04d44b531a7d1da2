"""SIM's loss against closed forms on Gaussian data, and its square as SiD."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.objectives.base import StudentSample
from lightning_modules.objectives.sid_lsg import SiDLSG
from lightning_modules.objectives.sim import SIM
from tests.objectives.analytic import (
    FAKE,
    REAL,
    SHAPE,
    VALUES,
    alpha_sigma,
    posterior_mean,
    step_random,
    student_gradient,
)


def test_the_square_is_sid(make_scores: Any, text: Any, schedule: NoiseSchedule) -> None:
    """SIM's loss is 2 α²/σ⁴ times SiD's at a = 1 before its normaliser ω; in x0 twice that."""
    scores = make_scores(real=REAL, fake=FAKE)
    for scale in ("x0", "score"):
        single = text(VALUES[:1])
        scores.calls.clear()
        x0, loss, gradient = _of_one(SIM("square", scale=scale), single, scores)
        _, other, other_gradient = _of_one(SiDLSG(), single, scores)
        call = scores.calls[0]
        alpha, sigma = alpha_sigma(schedule, call.t)
        omega = (x0 - call.prediction.x0.detach()).abs().mean()
        factor = omega * 2 * (1 if scale == "x0" else alpha**2 / sigma**4)
        torch.testing.assert_close(loss, (factor * other).squeeze(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, factor * other_gradient, rtol=1e-3, atol=1e-4)


def _of_one(objective: Any, condition: Any, scores: Any) -> Any:
    """One sample, so that a factor of its own is one of the loss."""
    x0 = torch.randn(1, *SHAPE[1:], generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = objective.student_loss(StudentSample(x0, condition), scores, step_random(1)).losses["sid"]
    return x0.detach(), loss.detach(), torch.autograd.grad(loss, x0)[0]


@pytest.mark.parametrize("scale", ["x0", "score"])
def test_pseudo_huber_equals_the_analytic_one(
    scale: str, make_scores: Any, text: Any, schedule: NoiseSchedule
) -> None:
    """By scores of the noised Gaussians, differentiated by autograd through x_t."""
    scores, c = make_scores(real=REAL, fake=FAKE), 0.3
    objective = SIM(c=c, scale=scale, teacher_guidance=1.0, fake_guidance=1.0)
    x0, loss, gradient = student_gradient(objective, text(VALUES), scores)
    call = scores.calls[0]
    alpha, sigma = alpha_sigma(schedule, call.t)
    noise = (call.x_t.detach() - alpha * x0) / sigma
    x = x0.clone().requires_grad_()
    x_t = alpha * x + sigma * noise
    means = [posterior_mean(schedule, x_t, call.t, data) for data in (REAL, FAKE)]
    real, fake = ((alpha * mean - x_t) / sigma**2 for mean in means)
    w = 1 if scale == "score" else sigma**2 / alpha
    y, implicit = w * (fake - real), w * (fake - (alpha * x - x_t) / sigma**2)
    norm = (y.square().sum((1, 2, 3), keepdim=True) + c**2 * x0[0].numel()).sqrt()
    expected = -(y / norm * implicit).sum((1, 2, 3)).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=5e-3, atol=1e-3)
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("mean", [2.0, -2.0])
def test_descent_moves_towards_the_teacher(make_scores: Any, text: Any, mean: float) -> None:
    scores = make_scores(real=(mean, 0.5, 0.0), fake=(0.0, 0.5, 0.0))
    _, _, gradient = student_gradient(SIM(), text(VALUES), scores)
    assert gradient.mean().sign() == -torch.tensor(mean).sign()
