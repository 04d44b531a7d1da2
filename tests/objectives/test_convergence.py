"""Each method in 300 updates on Gaussian data: nothing is given but the teacher, and the distance falls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.steps import Steps
from lightning_modules.guidance.scales import UniformGuidance
from lightning_modules.image_losses.base import ImageLoss
from lightning_modules.image_losses.terms import ImageLossSettings, ImageTerms
from lightning_modules.objectives.base import Objective, Real, StudentSample, TeacherFacts
from lightning_modules.objectives.decoupled_dmd import DecoupledDMD
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.divergences import DIVERGENCES
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.f_distill import FDistill
from lightning_modules.objectives.pair_regression import PairRegression
from lightning_modules.objectives.sid_lsg import SiDLSG
from lightning_modules.objectives.sim import SIM
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.objectives.tdm import TDM
from lightning_modules.objectives.uni_instruct import UniInstruct
from tests.objectives.test_swiftbrush_convergence import LinearStudent

B, SHAPE, UPDATES = 16, (1, 4, 4), 300
MEAN, STD, SHIFT = 1.5, 0.4, -0.8


def heads(**settings: Any) -> Discriminator:
    return Discriminator(["x"], **settings)


def perfect(**settings: Any) -> Discriminator:
    """Without heads, as SiDA's: it knows the ratio as well as the fake score knows the student."""
    return Discriminator(["log_ratio"], heads=0, **settings)


# the student goes where the discriminator sends it, whatever the scores say
STRONG = {"student_weight": 3.0, "weight": 10.0}


def _f_distill(divergence: str) -> Objective:
    return FDistill(heads(role="teacher"), divergence, guidance_scale=1.0, fake_updates=1)


UNGUIDED = {"train_fake_guidance": 1.0, "fake_guidance": 1.0, "teacher_guidance": 1.0}
METHODS: dict[str, Callable[[], Objective]] = {
    "swiftbrush": lambda: SwiftBrush(1.0, prompt_dropout=0.0),
    "pgsb": lambda: SwiftBrush(UniformGuidance(0.5, 1.5), prompt_dropout=0.0),  # 1 on average
    "dmd2": lambda: DMD2(1.0, fake_updates=2),
    "dmd2_gan": lambda: DMD2(1.0, fake_updates=1, discriminator=heads()),
    "gan alone": lambda: DecoupledDMD(
        1.0, matching_weight=0.0, fake_updates=1, discriminator=perfect(**STRONG)
    ),
    "decoupled_dmd": lambda: DecoupledDMD(1.0, fake_updates=1),
    **{f"f_distill {kind}": partial(_f_distill, kind) for kind in DIVERGENCES},
    "sid_lsg": lambda: SiDLSG(**UNGUIDED),
    "sida": lambda: SiDLSG(**UNGUIDED, discriminator=perfect(**STRONG)),
    "sim": lambda: SIM(**UNGUIDED),
    "uni_instruct": lambda: UniInstruct(heads(), **UNGUIDED),
    # r of such far samples is next to 0; by one that is nearer to 1, as new heads have it, the direct term,
    # which goes as r² where h goes as r, leads further away
    "uni_instruct jensen_shannon": lambda: UniInstruct(perfect(), "jensen_shannon", **UNGUIDED),
    "uni_instruct pearson": lambda: UniInstruct(heads(), "pearson", **UNGUIDED),
    "tdm": lambda: TDM(1.0),
}  # fmt: skip

Term = Callable[[LinearStudent, StudentSample, Any, StepRandom], Tensor]


def distance(student: LinearStudent, mean: float = MEAN, shift: float = SHIFT) -> float:
    """Squared Wasserstein distance of the two Gaussians, mean of the texts 0 and 1."""
    means = [(student.mean + student.shift * text - mean - shift * text).item() ** 2 for text in (0, 1)]
    return sum(means) / 2 + (student.scale.abs().item() - STD) ** 2


def distances(
    objective: Objective, student: LinearStudent, scores: Any, text: Any, more: Term | None = None,
    **goal: float,
) -> list[float]:  # fmt: skip
    """From the goal, the teacher's Gaussian unless another one is given: at the start, a third, the end.

    The fake score begins as the teacher. `more` is a term of the student's loss beside the objective's.
    """
    objective.build(TeacherFacts(scores.schedule, SHAPE, Steps((999,)), lambda layer: SHAPE))
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr=0.03, betas=(0.5, 0.99)),
        "fake_score": torch.optim.Adam(
            [*scores.fake.parameters(), *objective.parameters_of("fake_score")], lr=0.1, betas=(0.5, 0.99)
        ),
    }
    found = [distance(student, **goal)]
    for step in range(UPDATES):
        for turn in objective.turns(step):
            random = StepRandom(turn.batch, step, torch.arange(B))
            texts, noise = torch.arange(B) % 2.0, torch.randn(2, B, *SHAPE)
            condition = text(texts)
            pictures = MEAN + SHIFT * texts[:, None, None, None] + STD * noise[1]
            real = Real(pictures, condition, random, noise[1])
            x0, t = student(noise[0], condition), torch.full((B,), 999)
            sample = StudentSample(x0, condition, x_t=noise[0], t=t, real=real)
            optimizer = optimizers[turn.role]
            optimizer.zero_grad()
            losses = objective.loss(turn.role, sample, scores, random).losses
            if more is not None and turn.role == "student":
                losses["more"] = more(student, sample, scores, random)
            torch.stack([*losses.values()]).sum().backward()
            optimizer.step()
        scores.calls.clear()
        if step == UPDATES // 3:
            found.append(distance(student, **goal))
    return [*found, distance(student, **goal)]


@pytest.mark.parametrize("name", METHODS)
def test_the_distance_falls(name: str, make_scores: Any, text: Any) -> None:
    scores = make_scores(real=(MEAN, STD, SHIFT), fake=(MEAN, STD, SHIFT))
    start, third, end = distances(METHODS[name](), LinearStudent(), scores, text)
    assert start > 1 and third < start / 2 and end < 0.05


def test_decoupled_guidance_leads_to_the_guided_teacher(make_scores: Any, text: Any) -> None:
    """Whose data have κ times the shift by the text: variances with and without text are equal."""
    scores = make_scores(real=(MEAN, STD, SHIFT), fake=(MEAN, STD, SHIFT))
    # τ_G in τ_M's range: guidance takes the student as far as matching lets it go
    objective = DecoupledDMD(2.0, guidance_timesteps=(20, 980), fake_updates=1)
    start, third, end = distances(objective, LinearStudent(), scores, text, shift=2 * SHIFT)
    assert start > 1 and third < start / 2 and end < 0.05


def test_pairs_tell_which_picture_a_noise_belongs_to(make_scores: Any, text: Any) -> None:
    """DMD alone leaves a student that mirrors the noise as it is: its distribution is the teacher's."""
    regression = PairRegression()

    def pairs(student: LinearStudent, sample: StudentSample, scores: Any, random: StepRandom) -> Tensor:
        scores.student = lambda x_t, t, condition: SimpleNamespace(x0=student(x_t, condition))
        assert sample.real is not None
        return regression.loss(sample.real, scores, 999)

    scales = []
    for more in (None, pairs):
        scores = make_scores(real=(MEAN, STD, SHIFT), fake=(MEAN, STD, SHIFT))
        student = LinearStudent(scale=-1.0)
        start, third, end = distances(DMD2(1.0, fake_updates=1), student, scores, text, more)
        assert start > 1 and third < start / 2 and end < 0.05
        scales.append(student.scale.item())
    assert scales == pytest.approx([-STD, STD], abs=0.15)


class Slope(ImageLoss):
    """A reward that grows by 1 with each value."""

    name = "slope"

    def load(self) -> None: ...

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -images.flatten(1).sum(1)


class Plain(nn.Module):
    """Latents are pictures."""

    in_shards = False

    def __init__(self, vae: Any) -> None:
        super().__init__()

    def decode(self, x0: Tensor) -> Tensor:
        return x0


@pytest.mark.parametrize("weight", [0.75, 1.5])
def test_a_reward_moves_the_mean_as_far_as_the_divergence_lets_it(
    weight: float, make_scores: Any, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DI*: of equal deviations y_fake − y_real = A (m_fake − m_real), A = σ² / (α² s² + σ²).

    So SIM's square is E A² (m_fake − m_real)² for each value, and has its minimum with −weight · m_fake
    beside it weight / (2 E A²) from the teacher's mean; the deviation stays.
    """
    monkeypatch.setattr("lightning_modules.image_losses.terms.LatentDecoder", Plain)
    terms = ImageTerms(ImageLossSettings([Slope(weight)]), SimpleNamespace(vae=None))  # type: ignore[arg-type]

    def reward(student: LinearStudent, sample: StudentSample, scores: Any, random: StepRandom) -> Tensor:
        return terms.judge(sample.x0, [""] * B, random, B, UPDATES)[0]["slope"]

    scores = make_scores(real=(MEAN, STD, SHIFT), fake=(MEAN, STD, SHIFT))
    alpha, sigma = scores.schedule.alpha_sigma(torch.arange(20, 980))
    moved = weight / 2 / (sigma**2 / (alpha**2 * STD**2 + sigma**2)).square().mean().item()
    student = LinearStudent()
    start, third, end = distances(SIM("square", **UNGUIDED), student, scores, text, reward, mean=MEAN + moved)
    assert moved > 0.4 and third < start / 2 and end < 0.05
