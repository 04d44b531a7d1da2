"""TDM's noised samples, losses and weights against closed forms on Gaussian data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.steps import Steps
from lightning_modules.diffusion.timesteps import UniformTimesteps
from lightning_modules.objectives.base import StudentSample, TeacherFacts, Turn
from lightning_modules.objectives.tdm import TDM
from tests.objectives.analytic import FAKE, REAL, SHAPE, VALUES, alpha_sigma, posterior_mean, step_random

STEPS = Steps((900, 600, 300), "none")
COUNTED = Steps((900, 700, 500, 300), "none", counts=(2, 4))


def objective(schedule: NoiseSchedule, steps: Steps = STEPS, **settings: Any) -> TDM:
    made = TDM(3.0, **settings)
    made.build(TeacherFacts(schedule, SHAPE[1:], steps, lambda name: ()))
    return made


def sample(condition: Any, k: int, steps: Steps = STEPS, told: int = 0) -> StudentSample:
    x0, x_t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return StudentSample(x0, condition, x_t=x_t, t=torch.full((4,), steps.timesteps[k]), k=k, told=told)


@pytest.mark.parametrize(
    ("whole", "told", "k"), [*((STEPS, 0, k) for k in range(3)), (COUNTED, 2, 0), (COUNTED, 2, 1)]
)
def test_samples_are_diffused_on_from_where_the_step_arrives(
    make_scores: Any, text: Any, schedule: NoiseSchedule, whole: Steps, told: int, k: int
) -> None:
    """Against the step of the sampler, and the forward process between two times; also of fewer steps."""
    steps = whole.fewer(told) if told else whole
    made, given, random = objective(schedule, whole), sample(text(VALUES), k, steps, told), step_random()
    at, fresh = made.diffused(given, schedule, random, "student")
    times = (*steps.timesteps, 20)
    assert at.t.min() >= times[k + 1] and at.t.max() < times[k] - 10
    alpha, sigma = alpha_sigma(schedule, at.t)
    if k + 1 == len(steps):
        arrived, a, s = given.x0, torch.tensor(1.0), torch.tensor(0.0)
    else:
        said = Prediction(given.x0, "sample", given.x_t, *schedule.alpha_sigma(given.t))
        arrived = steps.next_input(k, said, schedule, given.x_t)
        a, s = alpha_sigma(schedule, torch.full((4,), steps.timesteps[k + 1]))
    expected = alpha / a * arrived + (sigma**2 - (alpha / a * s) ** 2).sqrt() * fresh
    torch.testing.assert_close(at.x_t, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at.x_t, alpha * given.x0 + sigma * at.noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("huber", [0.0, 0.3])
def test_student_gradient_equals_the_analytic_one(
    make_scores: Any, text: Any, schedule: NoiseSchedule, huber: float
) -> None:
    """ρ'(y_fake − y_real^κ) / mean |x̂ − y_real^κ| / numel."""
    scores, null = make_scores(real=REAL, fake=FAKE), 0.25
    given = sample(text(VALUES, null=null), 1)
    leaf = given.x0.clone().requires_grad_()
    given = StudentSample(leaf, given.condition, x_t=given.x_t, t=given.t, k=1)
    loss = objective(schedule, huber=huber).student_loss(given, scores, step_random()).losses["matching"]
    (gradient,) = torch.autograd.grad(loss, leaf)
    real, fake = scores.calls
    assert (real.role, fake.role, fake.guidance_scale) == ("teacher", "fake_score", 1)
    y_real = posterior_mean(schedule, real.x_t, real.t, REAL, null + 3.0 * (VALUES - null))
    difference = posterior_mean(schedule, fake.x_t, fake.t, FAKE) - y_real
    slope: Tensor = difference / (difference**2 + huber**2).sqrt() if huber else difference
    g = slope / (leaf.detach() - y_real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, g / g.numel(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("importance", [True, False])
def test_fake_score_loss(make_scores: Any, text: Any, schedule: NoiseSchedule, importance: bool) -> None:
    k = 0 if importance else 2  # at the last step, with little noise, the weight has reached its largest
    made, given = objective(schedule, importance=importance), sample(text(VALUES), k)
    scores = make_scores(fake=FAKE)
    loss = made.fake_score_loss(given, scores, step_random()).losses["denoising"]
    (call,) = scores.calls
    alpha, sigma = alpha_sigma(schedule, call.t)
    noise = (call.x_t - alpha * given.x0) / sigma
    fresh = step_random().normal("fake_noise", SHAPE[1:])
    weight = (alpha**2 / sigma**2).clamp(max=5)
    assert importance or weight.max() == 5
    if importance:
        ratio = torch.exp(-0.5 * noise.square().mean((1, 2, 3))) / torch.exp(
            -0.5 * fresh.square().mean((1, 2, 3))
        )
        weight = weight * ratio[:, None, None, None]
        assert (ratio - 1).abs().max() > 1e-3
    error = weight * (posterior_mean(schedule, call.x_t, call.t, FAKE) - given.x0).square()
    torch.testing.assert_close(loss, error.mean(), rtol=1e-3, atol=1e-5)
    loss.backward()
    assert scores.fake.mean.grad is not None and scores.real.mean.grad is None


def test_what_does_not_fit_is_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="step_noise is fresh"):
        objective(schedule, Steps((900, 300)))
    with pytest.raises(ValueError, match="low=300, high=295"):
        objective(schedule, Steps((305, 300), "none"))
    assert objective(schedule, intervals="whole").ranges[0][1].high == schedule.num_timesteps - 10
    made = objective(schedule)
    assert [(own.low, own.high) for own in made.ranges[0]] == [(600, 890), (300, 590), (20, 290)]
    assert made.turns(0) == [Turn("fake_score"), Turn("student")]


def test_weighted_noise_is_unit_normal(make_scores: Any, text: Any, schedule: NoiseSchedule) -> None:
    """Of one number a sample, where mean and sum are the same, w is the ratio of N(0, 1) to what n has."""
    count, made = 20_000, objective(schedule)
    made.ranges[0][0] = UniformTimesteps(880, 881)
    x0, x_t = torch.full((count, 1, 1, 1), 0.7), torch.full((count, 1, 1, 1), 1.9)
    given = StudentSample(x0, text(VALUES), x_t=x_t, t=torch.full((count,), 900), k=0)
    at, fresh = made.diffused(given, schedule, StepRandom(3, 0, torch.arange(count)), "fake")
    noise, fresh = at.noise.flatten().double(), fresh.flatten().double()
    assert noise.mean().abs() > 0.15  # without the weight
    weight = torch.exp(0.5 * (fresh.square() - noise.square()))
    mean = (weight * noise).sum() / weight.sum()
    assert abs(float(mean)) < 0.03
    assert abs(float((weight * (noise - mean).square()).sum() / weight.sum()) - 1) < 0.05
