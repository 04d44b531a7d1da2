"""DMD2's losses against closed forms on Gaussian data, its turns, and the fake score's mixing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.steps import Steps
from lightning_modules.objectives.base import StudentSample, TeacherFacts, Turn
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.pieces import mean_distance
from lightning_modules.objectives.swiftbrush import SwiftBrush
from tests.objectives.analytic import (
    FAKE,
    REAL,
    SHAPE,
    VALUES,
    alpha_sigma,
    built,
    posterior_mean,
    step_random,
    student_gradient,
)
from tests.test_distributed import sgd
from tests.tiny_distillation import Hooks, distillation, fit, snapshot


def test_student_gradient_equals_the_analytic_one(
    make_scores: Any, text: Any, schedule: NoiseSchedule
) -> None:
    """(y_fake − y_real^κ) / mean |x̂ − y_real^κ| / numel; guidance moves the mean of the teacher's data."""
    scores, null, kappa = make_scores(real=REAL, fake=FAKE), 0.25, 3.0
    objective = DMD2(kappa)
    x0, loss, gradient = student_gradient(objective, text(VALUES, null=null), scores)
    real, fake = scores.calls
    assert (real.role, fake.role) == ("teacher", "fake_score") and torch.equal(real.x_t, fake.x_t)
    y_real = posterior_mean(schedule, real.x_t, real.t, REAL, null + kappa * (VALUES - null))
    y_fake = posterior_mean(schedule, fake.x_t, fake.t, FAKE)
    g = (y_fake - y_real) / (x0 - y_real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, g / g.numel(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss, 0.5 * g.square().mean(), rtol=1e-3, atol=1e-5)
    assert not real.prediction.output.requires_grad and gradient.abs().max() > 1e-3


@pytest.mark.parametrize("mean", [2.0, -2.0])
def test_descent_moves_towards_the_teacher(make_scores: Any, text: Any, mean: float) -> None:
    scores = make_scores(real=(mean, 0.5, 0.0), fake=(0.0, 0.5, 0.0))
    _, _, gradient = student_gradient(DMD2(1.0), text(VALUES), scores)
    assert (gradient.sign() == -torch.tensor(mean).sign()).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_fake_score_loss(make_scores: Any, text: Any, kind: str, schedule: NoiseSchedule) -> None:
    """By what the network puts out, over the whole schedule, and without guidance; only its weights move."""
    scores = make_scores(fake=(0.3, 1.4, 0.5))
    scores.schedule = schedule = NoiseSchedule(schedule.alphas_cumprod, kind)
    x0 = torch.randn(SHAPE)
    (loss,) = (
        DMD2().loss("fake_score", StudentSample(x0, text(VALUES)), scores, step_random()).losses.values()
    )
    (call,) = scores.calls
    assert call.role == "fake_score" and call.guidance_scale == 1
    alpha, sigma = alpha_sigma(schedule, call.t)
    noise = (call.x_t - alpha * x0) / sigma
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0, "flow": noise - x0}
    error = (call.prediction.output - target[kind]).square().mean()
    torch.testing.assert_close(loss, error, rtol=1e-3, atol=1e-4)
    loss.backward()
    assert all(w.grad is None for w in scores.real.parameters()) and scores.fake.mean.grad.abs() > 0


def test_the_normaliser_is_never_zero() -> None:
    """Where the teacher sees the very sample, the others of the batch keep their own."""
    real = torch.tensor([0.5, 0.5, 0.5])[:, None, None, None].expand(3, 2, 4, 4)
    x0 = torch.tensor([0.5, 0.5 + 1e-6, -0.5])[:, None, None, None].expand(3, 2, 4, 4)
    expected = torch.tensor([1e-5, 1e-5, 1.0])
    torch.testing.assert_close(mean_distance(x0, real).flatten(), expected, rtol=1e-5, atol=0)


def test_timesteps(make_scores: Any, text: Any) -> None:
    scores, size = make_scores(), 20_000
    sample = StudentSample(torch.zeros(size, 1, 1, 1), text([1.0] * size))
    DMD2().student_loss(sample, scores, step_random(size))
    DMD2().fake_score_loss(sample, scores, step_random(size))
    spans = [(int(call.t.min()), int(call.t.max())) for call in scores.calls]
    assert spans == [(20, 979), (20, 979), (0, 999)]


@pytest.mark.parametrize("kind", [DMD2, SwiftBrush])
def test_each_step_at_its_own_noise(make_scores: Any, text: Any, schedule: NoiseSchedule, kind: Any) -> None:
    """From the next step's timestep up to below its own, student and fake score alike; of 2 steps others."""
    objective, size = kind(intervals="own"), 5_000
    objective.build(TeacherFacts(schedule, SHAPE[1:], Steps((900, 600, 300, 100), counts=(1, 2, 4)), len))
    for count, k, low, high in ((0, 1, 300, 600), (4, 3, 0, 100), (2, 0, 300, 900), (1, 0, 0, 900)):
        scores, random = make_scores(), step_random(size)
        sample = StudentSample(torch.zeros(size, 1, 1, 1), text([1.0] * size), k=k, told=count)
        objective.student_loss(sample, scores, random), objective.fake_score_loss(sample, scores, random)
        spans = [(int(call.t.min()), int(call.t.max())) for call in scores.calls]
        expected = [(max(low, 20), high - 1)] * 2 + [(low, high - 1)]
        for (first, last), (least, most) in zip(expected, spans, strict=True):
            assert first <= least <= first + 2 and last - 2 <= most <= last
    facts = TeacherFacts(schedule, SHAPE[1:], Steps((900, 600)), len)
    with pytest.raises(ValueError, match="low=600, high=500"):
        kind(intervals="own", max_timestep=500).build(facts)


def test_turns() -> None:
    turns = [Turn("student"), *(Turn("fake_score", batch) for batch in range(3))]
    assert DMD2(fake_updates=3).turns(7) == turns


def test_the_fake_score_moves_towards_the_student(tiny_sd: Path, tmp_path: Path) -> None:
    """By the share after the student's update, once a step, and by nothing else as its own rate is 0."""
    still = {"lora": None, "fake_score": sgd(0.0), "student": sgd(100.0)}
    module = distillation(tiny_sd, DMD2(fake_updates=2, student_share=0.25), **still)
    before: dict[str, torch.Tensor] = {}
    # the fake score being the teacher, only guidance moves the student; it starts as the teacher, too
    fit(module, tmp_path, 1, Hooks(on_start=lambda m: before.update(snapshot(m))))
    moved = 0.0
    for name, student in module.student.named_parameters():
        old, new = before[f"scores.full_copy.{name}"], module.scores.full_copy.get_parameter(name)
        torch.testing.assert_close(new, torch.lerp(old, student, 0.25), rtol=1e-5, atol=1e-7)
        moved = max(moved, float((new - old).detach().abs().max()))
    assert moved > 1e-5
    with pytest.raises((UserError, ValueError), match="must be full copies: set model.fake_score.lora"):
        fit(distillation(tiny_sd, DMD2(student_share=0.25)), tmp_path, 1)


def test_what_does_not_fit(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="fake_updates=0"):
        DMD2(fake_updates=0)
    with pytest.raises(ValueError, match="max_timestep is 1001.*only 1000"):
        built(DMD2(max_timestep=1001), schedule)
