"""Each method in 300 updates on Gaussian data: nothing is given but the teacher, and the distance falls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.steps import Steps
from lightning_modules.guidance.scales import UniformGuidance
from lightning_modules.objectives.base import Objective, Real, StudentSample, TeacherFacts
from lightning_modules.objectives.decoupled_dmd import DecoupledDMD
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.divergences import DIVERGENCES
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.f_distill import FDistill
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


def _f_distill(divergence: str) -> Objective:
    return FDistill(heads(role="teacher"), divergence, guidance_scale=1.0, fake_updates=1)


UNGUIDED = {"train_fake_guidance": 1.0, "fake_guidance": 1.0, "teacher_guidance": 1.0}
METHODS: dict[str, Callable[[], Objective]] = {
    "swiftbrush": lambda: SwiftBrush(1.0, prompt_dropout=0.0),
    "pgsb": lambda: SwiftBrush(UniformGuidance(0.5, 1.5), prompt_dropout=0.0),  # 1 on average
    "dmd2": lambda: DMD2(1.0, fake_updates=2),
    "dmd2_gan": lambda: DMD2(1.0, fake_updates=1, discriminator=heads()),
    "decoupled_dmd": lambda: DecoupledDMD(1.0, fake_updates=1),
    **{f"f_distill {kind}": partial(_f_distill, kind) for kind in DIVERGENCES if kind != "pearson"},
    "sid_lsg": lambda: SiDLSG(**UNGUIDED),
    "sida": lambda: SiDLSG(**UNGUIDED, discriminator=heads()),
    "sim": lambda: SIM(**UNGUIDED),
    "uni_instruct": lambda: UniInstruct(heads(), **UNGUIDED),
    "tdm": lambda: TDM(1.0),
}  # fmt: skip


def distance(student: LinearStudent) -> float:
    """Squared Wasserstein distance of the two Gaussians, mean of the texts 0 and 1."""
    means = [(student.mean + student.shift * text - MEAN - SHIFT * text).item() ** 2 for text in (0, 1)]
    return sum(means) / 2 + (student.scale.abs().item() - STD) ** 2


@pytest.mark.parametrize("name", METHODS)
def test_the_distance_falls(name: str, make_scores: Any, text: Any, schedule: NoiseSchedule) -> None:
    scores = make_scores(real=(MEAN, STD, SHIFT), fake=(MEAN, STD, SHIFT))
    student, objective = LinearStudent(), METHODS[name]()
    objective.build(TeacherFacts(schedule, SHAPE, Steps((999,)), lambda layer: SHAPE))
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr=0.03, betas=(0.5, 0.99)),
        "fake_score": torch.optim.Adam(
            [*scores.fake.parameters(), *objective.parameters_of("fake_score")], lr=0.1, betas=(0.5, 0.99)
        ),
    }
    start = distance(student)
    for step in range(UPDATES):
        for turn in objective.turns(step):
            random = StepRandom(turn.batch, step, torch.arange(B))
            texts, noise = torch.arange(B) % 2.0, torch.randn(2, B, *SHAPE)
            condition = text(texts)
            real = Real(MEAN + SHIFT * texts[:, None, None, None] + STD * noise[1], condition, random)
            x0, t = student(noise[0], condition), torch.full((B,), 999)
            sample = StudentSample(x0, condition, x_t=noise[0], t=t, real=real)
            optimizer = optimizers[turn.role]
            optimizer.zero_grad()
            torch.stack([*objective.loss(turn.role, sample, scores, random).losses.values()]).sum().backward()
            optimizer.step()
        scores.calls.clear()
        if step == UPDATES // 3:
            third = distance(student)
    assert start > 1 and third < start / 2 and distance(student) < 0.05
