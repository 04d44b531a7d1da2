"""Decoupled distribution matching distillation (arXiv 2511.22677): guidance and matching apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.timesteps import UniformTimesteps
from lightning_modules.objectives.base import Networks, StudentSample, TeacherFacts
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.pieces import Noised, check_timesteps, mean_distance, noised


class DecoupledDMD(DMD2):
    """Decoupled DMD (Liu et al., arXiv 2511.22677, equation 8; the method of Z-Image).

    DMD2's guided gradient is a sum of two. Matching keeps the samples from going astray, guidance does the
    work; each has a weight and timesteps of its own, τ_M and τ_G::

        g = [matching_weight (x0_fake,y − x0_teacher,y)(x_τM)
             − guidance_weight (κ − 1)(x0_teacher,y − x0_teacher,∅)(x_τG)] / ω

    The paper takes τ_G above the student's own t, and τ_M everywhere. One step from pure noise has none
    above, so that here the range is a setting, for all steps of a student alike. The paper has scores, and no
    normaliser; here each term is divided by ω = mean |x̂ − x0_teacher^κ| at its own noised samples, so that
    with equal settings it is DMD2.

    Args:
        guidance_scale: κ.
        guidance_timesteps: least τ_G, and one more than the largest; null: τ_G and its noise are τ_M's.
        guidance_weight: 1 in the paper.
        matching_weight: 1 in the paper.
        settings: those of DMD2; min_timestep and max_timestep are τ_M's.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        guidance_scale: float = 4.0,
        guidance_timesteps: tuple[int, int] | None = (500, 980),
        guidance_weight: float = 1.0,
        matching_weight: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(guidance_scale, **settings)
        self.kappa = guidance_scale
        self.guidance_timesteps = (
            None if guidance_timesteps is None else UniformTimesteps(*guidance_timesteps)
        )
        self.guidance_weight, self.matching_weight = guidance_weight, matching_weight

    def build(self, facts: TeacherFacts) -> None:
        """Raise ValueError if timesteps lie past the schedule."""
        super().build(facts)
        if self.guidance_timesteps is not None:
            check_timesteps(self.guidance_timesteps, facts.schedule, "the end of guidance_timesteps")

    def score_gradient(
        self, at: Noised, sample: StudentSample, networks: Networks, random: StepRandom
    ) -> Tensor:
        """g [B, C, H, W] (equation 8)."""
        real, guided = self._teacher(at, sample, networks)
        fake = networks.fake_score(at.x_t, at.t, sample.condition).x0
        matching = (fake - real) / mean_distance(at.x0, guided)
        if self.guidance_timesteps is not None:
            at = noised(sample.x0, networks, random, "guidance", self.guidance_timesteps)
            real, guided = self._teacher(at, sample, networks)
        # x0^κ − x0_y = (κ − 1)(x0_y − x0_∅)
        guidance = (real - guided) / mean_distance(at.x0, guided)
        return self.matching_weight * matching + self.guidance_weight * guidance

    def _teacher(self, at: Noised, sample: StudentSample, networks: Networks) -> tuple[Tensor, Tensor]:
        """The teacher's x0 with text, and guided."""
        real = networks.teacher(at.x_t, at.t, sample.condition).x0
        nothing = networks.teacher(at.x_t, at.t, sample.condition.without_text()).x0
        return real, nothing + self.kappa * (real - nothing)
