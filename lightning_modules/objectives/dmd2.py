"""Improved distribution matching distillation (DMD2, arXiv 2405.14867); with pairs it is DMD (2311.18828)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.timesteps import UniformTimesteps
from lightning_modules.guidance.scales import GuidanceScale, as_guidance
from lightning_modules.objectives.base import (
    REAL_PICTURES,
    Networks,
    Objective,
    StudentSample,
    TeacherFacts,
    Terms,
    Turn,
)
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.pieces import (
    Noised,
    OwnTimesteps,
    check_timesteps,
    denoising_loss,
    mean_distance,
    mix_towards_student,
    noised,
    own_timesteps_of,
    timesteps_of,
)


class DMD2(Objective):
    """DMD2 (Yin et al., arXiv 2405.14867), weights and ranges as in the official code.

    Student, with t ~ U{min_timestep … max_timestep − 1}, x_t = α_t x̂ + σ_t ε and no gradient through the
    scores; guidance in the teacher only::

        g = (x0_fake(x_t, y) − x0_teacher^κ(x_t, y)) / mean |x̂ − x0_teacher^κ|,  L = ½ MSE(x̂, sg[x̂ − g])

    Fake score, without guidance, ``fake_updates`` times a step: on the student's samples first, then on
    batches of their own. DMD (arXiv 2311.18828) is ``fake_updates`` = 1 with ``model.pair_regression``; its
    fake score's loss is of x0 in the paper, and that of DMD2 here.

    With a discriminator both have an adversarial term more (see there); its heads are trained together with
    the fake score, by one optimizer, and it needs real pictures (``data.real``).

    Where this differs from the official code: x0 is computed in float32 (there float64); the normaliser is at
    least 1e-5; non-finite gradients skip the update visibly (there they become zero).

    Args:
        guidance_scale: κ of the teacher, a number or a rule.
        fake_updates: updates of the fake score a step.
        min_timestep: least t of the student's turn.
        max_timestep: one more than its largest t.
        student_share: the fake score is moved towards the student by this share of the way after each of the
            student's updates (SenseFlow: 0.03, CDM: 0.001); needs full copies.
        discriminator: on features of the fake score's middle block in the paper; null: none.
        intervals: whole: t of all steps of the student alike, with one fake score for them all; own: t
            between a step's own timestep and the next one's, for the fake score, too (phases).

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        guidance_scale: float | GuidanceScale = 1.75,
        fake_updates: int = 5,
        min_timestep: int = 20,
        max_timestep: int = 980,
        student_share: float = 0.0,
        discriminator: Discriminator | None = None,
        intervals: Literal["whole", "own"] = "whole",
    ) -> None:
        super().__init__()
        if fake_updates < 1 or not 0 <= student_share <= 1:
            raise ValueError(
                f"fake_updates={fake_updates}, student_share={student_share}: the first is at least 1, the "
                "second from 0 to 1"
            )
        self.guidance, self.fake_updates = as_guidance(guidance_scale), fake_updates
        self.timesteps, self.student_share = UniformTimesteps(min_timestep, max_timestep), student_share
        self.discriminator, self.intervals = discriminator, intervals
        self.own: OwnTimesteps = {}
        self.fake_own: OwnTimesteps = {}

    @property
    def needs(self) -> frozenset[str]:
        """Real pictures, if there is a discriminator."""
        return frozenset() if self.discriminator is None else frozenset([REAL_PICTURES])

    def build(self, facts: TeacherFacts) -> None:
        """Make the discriminator's heads; raises ValueError if a setting does not fit the teacher."""
        check_timesteps(self.timesteps, facts.schedule)
        if self.intervals == "own":
            self.own = own_timesteps_of(facts, self.timesteps.low, self.timesteps.high)
            self.fake_own = own_timesteps_of(facts, 0, facts.schedule.num_timesteps)
        if self.discriminator is not None:
            self.discriminator.build(facts)

    def turns(self, step: int) -> Sequence[Turn]:
        """The student, then the fake score on the same samples and on further batches."""
        return [Turn("student"), *(Turn("fake_score", batch) for batch in range(self.fake_updates))]

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        """``{"matching": ½ MSE(x̂, sg[x̂ − g])}``: gradient g / numel at ``sample.x0``; and "adversarial"."""
        timesteps = timesteps_of(sample, self.timesteps, self.own)
        at = noised(sample.x0, networks, random, "student", timesteps)
        with torch.no_grad():
            gradient = self.score_gradient(at, sample, networks, random)
        numbers: dict[str, float | Tensor] = {
            "student_timestep": at.t.float().mean(),
            "score_gradient_rms": gradient.square().mean().sqrt(),
            "nonfinite_score_gradients": (~torch.isfinite(gradient)).sum(),
        }
        losses = {"matching": 0.5 * F.mse_loss(at.x0, (at.x0 - gradient).detach())}
        if self.discriminator is not None:
            losses["adversarial"] = self.discriminator.student_term(sample, networks, random)
        return Terms(losses, numbers)

    def score_gradient(
        self, at: Noised, sample: StudentSample, networks: Networks, random: StepRandom
    ) -> Tensor:
        """g [B, C, H, W], from the teacher's x0 towards the fake score's (DMD, equations 7 and 8)."""
        kappa = self.guidance.draw(random)
        real = networks.teacher(at.x_t, at.t, sample.condition, kappa).x0
        fake = networks.fake_score(at.x_t, at.t, sample.condition).x0
        return (fake - real) / mean_distance(at.x0, real)

    def fake_score_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        """``{"denoising": MSE}`` on the detached samples, and the discriminator's own terms."""
        losses = {"denoising": denoising_loss(sample, networks, random, self.fake_own)}
        if self.discriminator is not None:
            losses |= self.discriminator.own_terms(sample, networks, random)
        return Terms(losses)

    def after_update(self, role: str, networks: Networks) -> None:
        """Move the fake score towards the student, if that is asked for."""
        if role == "student" and self.student_share:
            mix_towards_student(networks, self.student_share)
