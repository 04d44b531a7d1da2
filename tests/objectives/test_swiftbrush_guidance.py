"""PG-SB's random guidance scale and NASA-T's negative prompts in SwiftBrush, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.guidance.scales import UniformGuidance
from lightning_modules.objectives.base import NEGATIVE_PROMPTS, StudentSample
from lightning_modules.objectives.swiftbrush import SwiftBrush

Text = Callable[..., Condition]
SHAPE = (4, 2, 4, 4)


def judge(
    objective: SwiftBrush, scores: Any, sample: StudentSample, step: int = 0, first: int = 0
) -> tuple[Tensor, Any, Any, Any]:
    """Gradient at x0, what teacher and fake score were asked, and the numbers told."""
    x0 = sample.x0.clone().requires_grad_()
    random = StepRandom(0, step, torch.arange(first, first + len(x0)))
    given = StudentSample(x0, sample.condition, sample.negative)
    losses, numbers = objective.student_loss(given, scores, random)
    (loss,) = losses.values()
    return torch.autograd.grad(loss, x0)[0], *scores.calls[-2:], numbers


@pytest.mark.parametrize("both", ["both", "teacher", "fake_score"])
def test_the_scale_is_random_where_wanted(make_scores: Any, text: Text, both: str) -> None:
    random, scores = UniformGuidance(0.5, 4), make_scores()
    objective = {
        "both": SwiftBrush(random),
        "teacher": SwiftBrush(random, fake_guidance_scale=4.5),
        "fake_score": SwiftBrush(4.5, fake_guidance_scale=random),
    }[both]
    sample = StudentSample(torch.zeros(2, 1, 1, 1), text([0.0] * 2))
    seen = []
    for step in range(300):
        _, teacher, fake, numbers = judge(objective, scores, sample, step)
        logged = [numbers[f"guidance_scale/{role}"] for role in ("teacher", "fake_score")]
        assert logged == [teacher.guidance_scale, fake.guidance_scale]
        # the same on another process and after a resume: a function of seed and step alone
        _, again, _, _ = judge(objective, scores, sample, step, first=2)
        assert again.guidance_scale == teacher.guidance_scale
        seen.append(logged)
    values = torch.tensor(seen)
    if both == "both":
        assert torch.equal(values[:, 0], values[:, 1])
    for column, role in enumerate(("teacher", "fake_score")):
        kappa = values[:, column]
        if both in ("both", role):
            assert 0.5 <= kappa.min() < 0.6 and 3.9 < kappa.max() <= 4
            assert abs(kappa.mean() - 2.25) < 5 * 3.5 / math.sqrt(12 * 300)
        else:
            assert (kappa == 4.5).all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_two_random_scales_share_one_uniform_number(make_scores: Any, text: Text, per_sample: bool) -> None:
    """κ_teacher = 1 + 4 u and κ_fake = 0.5 + 2 u with the same u."""
    teachers, fakes = (
        UniformGuidance(low, high, per_sample=per_sample) for low, high in ((1, 5), (0.5, 2.5))
    )
    objective = SwiftBrush(teachers, fake_guidance_scale=fakes)
    sample = StudentSample(torch.zeros(2, 1, 1, 1), text([0.0] * 2))
    for step in range(3):
        _, teacher, fake, _ = judge(objective, make_scores(), sample, step)
        u = [(torch.as_tensor(kappa) - low) / width for kappa, low, width in (
            (teacher.guidance_scale, 1, 4), (fake.guidance_scale, 0.5, 2))]  # fmt: skip
        assert u[0].shape == ((2,) if per_sample else ())
        torch.testing.assert_close(u[0], u[1])


@pytest.mark.parametrize(
    ("in_teacher", "in_fake_score"), [(False, False), (True, False), (True, True), (False, True)]
)
def test_negative_prompts_take_the_place_of_no_text(
    make_scores: Any, text: Text, schedule: NoiseSchedule, in_teacher: bool, in_fake_score: bool
) -> None:
    # Equal variances make g a function of t alone; m^κ = m_n + κ (m_y − m_n) with n = y⁻ or ∅ in each role.
    kappa, std, values = 4.5, 0.5, torch.tensor([-1.0, 0.0, 1.0, 2.0])
    scores = make_scores(real=(1.0, std, 0.3), fake=(-0.5, std, 0.1))
    unwanted = torch.tensor([3.0, -2.0, 0.5, 1.0])
    sample = StudentSample(torch.randn(SHAPE), text(values, null=0.25), text(unwanted, null=0.25))
    objective = SwiftBrush(kappa, teacher_negatives=in_teacher, fake_score_negatives=in_fake_score)
    gradient, teacher, _, _ = judge(objective, scores, sample)
    alpha, sigma = schedule.alpha_sigma(teacher.t)
    bases = [unwanted if used else torch.full((4,), 0.25) for used in (in_teacher, in_fake_score)]
    real_text, fake_text = (base + kappa * (values - base) for base in bases)
    difference = (1.0 + 0.3 * real_text) - (-0.5 + 0.1 * fake_text)
    g = sigma**2 * (-sigma * alpha * difference / (alpha**2 * std**2 + sigma**2))
    expected = g[:, None, None, None].expand(SHAPE) / math.prod(SHAPE)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_the_fake_score_is_trained_without_negative_prompts(make_scores: Any, text: Text) -> None:
    scores, condition = make_scores(), text([1.0] * 4)
    objective = SwiftBrush(teacher_negatives=True, fake_score_negatives=True, prompt_dropout=0)
    sample = StudentSample(torch.randn(SHAPE), condition, text([9.0] * 4))
    objective.fake_score_loss(sample, scores, StepRandom(0, 0, torch.arange(4)))
    (call,) = scores.calls
    assert call.negative is None and call.guidance_scale == 1.0 and call.condition is condition


def test_the_students_scale_is_one_draw_per_step_apart_from_the_guidance(
    make_scores: Any, text: Text
) -> None:
    objective = SwiftBrush(UniformGuidance(0, 1), student_negatives=UniformGuidance(0, 1))
    sample = StudentSample(torch.zeros(2, 1, 1, 1), text([0.0] * 2), text([0.0] * 2))
    pairs = []
    for step in range(500):
        *_, numbers = judge(objective, make_scores(), sample, step)
        alpha = objective.student_negative_scale(StepRandom(0, step, torch.arange(7, 9)))
        assert isinstance(alpha, float) and alpha == numbers["student_negative_scale"]
        pairs.append([alpha, numbers["guidance_scale/teacher"]])
    alphas, kappas = torch.tensor(pairs, dtype=torch.float64).T
    assert 0 <= alphas.min() < 0.02 and 0.98 < alphas.max() <= 1
    assert abs(alphas.mean() - 0.5) < 5 / math.sqrt(12 * 500)
    assert abs(torch.stack([alphas, kappas]).corrcoef()[0, 1]) < 5 / math.sqrt(500)
    assert SwiftBrush().student_negative_scale(StepRandom(0, 0, torch.arange(2))) is None


def test_what_needs_negative_prompts_says_so(make_scores: Any, text: Text) -> None:
    plain = StudentSample(torch.zeros(2, 1, 1, 1), text([0.0] * 2))
    uses = ({"teacher_negatives": True}, {"fake_score_negatives": True}, {"student_negatives": 0.5})
    assert not SwiftBrush(UniformGuidance(0.5, 4)).needs
    for settings in uses:
        objective = SwiftBrush(**settings)  # type: ignore[arg-type]
        assert objective.needs == {NEGATIVE_PROMPTS}
        with pytest.raises(ValueError, match="needs negative prompts"):
            judge(objective, make_scores(), plain)
    with pytest.raises(ValueError, match="one draw per step"):
        SwiftBrush(student_negatives=UniformGuidance(0, 1, per_sample=True))
