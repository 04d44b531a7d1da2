"""SwiftBrush trained on Gaussian data: the student reaches the teacher, the fake score the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.objectives.base import StudentSample
from lightning_modules.objectives.swiftbrush import SwiftBrush

Text = Callable[..., Condition]
B, SHAPE = 64, (1, 4, 4)


class LinearStudent(nn.Module):
    """x0 = a z + b + c · text: Gaussian with mean b + c · text and standard deviation |a|."""

    def __init__(self, scale: float = 1.0, mean: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.mean = nn.Parameter(torch.tensor(mean))
        self.shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        return self.scale * noise + self.mean + self.shift * condition.tensors["text"][:, None, None, None]


def copy_student_into(fake: Any, student: LinearStudent) -> None:
    """Make the fake score the closed-form score of the student's distribution."""
    with torch.no_grad():
        fake.mean.copy_(student.mean)
        fake.log_std.copy_(student.scale.abs().log())
        fake.shift.copy_(student.shift)


def train(
    objective: SwiftBrush,
    student: LinearStudent,
    scores: Any,
    text: Text,
    steps: int,
    student_rate: float = 0.0,
    fake_rate: float = 0.0,
    exact_fake: bool = False,
) -> None:
    """Alternate the turns (a rate of 0 leaves one out) with learning rates falling linearly to zero."""
    optimizers = [
        torch.optim.Adam(role.parameters(), lr=rate, betas=(0.5, 0.99))
        for role, rate in ((student, student_rate), (scores.fake, fake_rate))
    ]
    for step in range(steps):
        random = StepRandom(0, step, torch.arange(B))
        condition = text(random.uniform("text").round())
        sample = StudentSample(student(random.normal("start", SHAPE), condition), condition)
        if exact_fake:
            copy_student_into(scores.fake, student)
        for optimizer, rate, loss_of in zip(
            optimizers,
            (student_rate, fake_rate),
            (objective.student_loss, objective.fake_score_loss),
            strict=True,
        ):
            if rate == 0:
                continue
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
            torch.stack(list(loss_of(sample, scores, random).losses.values())).sum().backward()
            optimizer.step()
        scores.calls.clear()


def test_a_linear_student_reaches_the_teacher(make_scores: Any, text: Text) -> None:
    scores = make_scores(real=(1.5, 0.4, -0.8))
    student = LinearStudent()
    train(SwiftBrush(1.0), student, scores, text, steps=250, student_rate=0.05, exact_fake=True)
    assert student.mean.item() == pytest.approx(1.5, abs=0.03)
    assert abs(student.scale.item()) == pytest.approx(0.4, abs=0.03)
    assert student.shift.item() == pytest.approx(-0.8, abs=0.05)


def test_a_wider_teacher_widens_the_student(make_scores: Any, text: Text) -> None:
    scores = make_scores(real=(-0.5, 1.3, 0.0))
    student = LinearStudent(scale=0.5, mean=1.0)
    train(SwiftBrush(1.0), student, scores, text, steps=250, student_rate=0.05, exact_fake=True)
    assert student.mean.item() == pytest.approx(-0.5, abs=0.05)
    assert student.scale.item() == pytest.approx(1.3, abs=0.08)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_fake_score_reaches_the_students_score(make_scores: Any, text: Text, per_sample: bool) -> None:
    student = LinearStudent(scale=0.4, mean=1.5)
    student.shift.data.fill_(-0.8)
    scores = make_scores(fake=(0.0, 1.0, 0.0))
    objective = SwiftBrush(prompt_dropout=0.0, dropout_per_sample=per_sample)
    train(objective, student, scores, text, steps=250, fake_rate=0.05)
    assert scores.fake.mean.item() == pytest.approx(1.5, abs=0.03)
    assert scores.fake.log_std.exp().item() == pytest.approx(0.4, abs=0.03)
    assert scores.fake.shift.item() == pytest.approx(-0.8, abs=0.05)


def test_both_turns_together_reach_the_teacher(make_scores: Any, text: Text) -> None:
    # Nothing is given but the teacher: the fake score starts as it, as LoRA does, and follows the student.
    scores = make_scores(real=(1.5, 0.4, -0.8), fake=(1.5, 0.4, -0.8))
    student = LinearStudent()
    objective = SwiftBrush(1.0, prompt_dropout=0.0)
    train(objective, student, scores, text, steps=500, student_rate=0.03, fake_rate=0.1)
    assert student.mean.item() == pytest.approx(1.5, abs=0.1)
    assert abs(student.scale.item()) == pytest.approx(0.4, abs=0.1)
    assert student.shift.item() == pytest.approx(-0.8, abs=0.15)
