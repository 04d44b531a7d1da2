"""What the methods' tests share: samples, random numbers, the student's gradient, Gaussian closed forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.steps import Steps
from lightning_modules.objectives.base import Objective, Real, StudentSample, TeacherFacts

SHAPE = (4, 2, 4, 4)  # B equal to height and width
VALUES = torch.tensor([-1.0, 0.0, 1.0, 2.0])
REAL, FAKE = (1.0, 0.5, 0.3), (-0.5, 1.5, 0.1)
"""Mean, deviation and shift by the text of two Gaussians."""


def step_random(batch_size: int = 4, step: int = 0) -> StepRandom:
    return StepRandom(0, step, torch.arange(batch_size))


def facts(schedule: NoiseSchedule) -> TeacherFacts:
    """Features are x_t, as `GaussianScores` has them."""
    return TeacherFacts(schedule, SHAPE[1:], Steps((999,)), lambda name: SHAPE[1:])


def built(objective: Objective, schedule: NoiseSchedule) -> Any:
    """The objective with its heads."""
    objective.build(facts(schedule))
    return objective


def real_pictures(condition: Any, seed: int = 1) -> Real:
    """Latents with random numbers of their own."""
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return Real(x0, condition, StepRandom(seed, 0, torch.arange(4)))


def student_gradient(
    objective: Objective, condition: Any, scores: Any, term: str | None = None, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂, a loss term (or the sum of all) and its gradient at x̂; the scores' weights get none."""
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sample = StudentSample(x0, condition, **more)
    losses = objective.loss("student", sample, scores, step_random()).losses
    loss = losses[term] if term else torch.stack([*losses.values()]).sum()
    (gradient,) = torch.autograd.grad(loss, x0)
    return x0.detach(), loss.detach(), gradient


def alpha_sigma(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, 1, 1] each."""
    alpha, sigma = (c[:, None, None, None] for c in schedule.alpha_sigma(t))
    return alpha, sigma


def posterior_mean(
    schedule: NoiseSchedule, x_t: Tensor, t: Tensor, data: tuple[float, float, float], text: Tensor = VALUES
) -> Tensor:
    """E[x0 | x_t] of x0 ~ N(mean + shift text, deviation²) by Bayes' rule."""
    (alpha, sigma), (mean, std, shift) = alpha_sigma(schedule, t), data
    centre = mean + shift * text[:, None, None, None]
    return (alpha * std**2 * x_t + sigma**2 * centre) / (alpha**2 * std**2 + sigma**2)


def log_ratio(
    schedule: NoiseSchedule, x_t: Tensor, t: Tensor, text: Tensor = VALUES, real: Any = REAL, fake: Any = FAKE
) -> Tensor:
    """log p_real(x_t) / p_fake(x_t) of the noised Gaussians, mean over a sample's values, [B]."""
    alpha, sigma = alpha_sigma(schedule, t)

    def log_density(data: tuple[float, float, float]) -> Tensor:
        mean, std, shift = data
        deviation = (alpha**2 * std**2 + sigma**2).sqrt()
        return torch.distributions.Normal(
            alpha * (mean + shift * text[:, None, None, None]), deviation
        ).log_prob(x_t)

    return (log_density(real) - log_density(fake)).mean((1, 2, 3))
