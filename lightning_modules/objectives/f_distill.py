"""f-divergence distribution matching (f-distill, arXiv 2502.15681): DMD2 with a weight for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.diffusion.broadcast import expand_like
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.objectives.base import Networks, StudentSample, TeacherFacts
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.divergences import DIVERGENCES, check_divergence
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.pieces import Noised, normalised


class FDistill(DMD2):
    """f-distill (Xu et al., arXiv 2502.15681): DMD2's gradient times h(r), r = p_real(x_t) / p_fake(x_t).

    r is exp of the discriminator's logit, within ``ratio_range``, and divided by its mean among the samples
    of its tenth of the schedule (E_q r = 1 at every t); then h(r) by its mean. Means are over the samples of
    one pass of all processes; the paper keeps running ones. The reverse KL (h = 1) is DMD2. Timesteps, the
    order of updates and the noise of the discriminator's own samples are DMD2's; the public code has t over
    the whole schedule, updates either student or fake score, and has one x_t for score and discriminator.

    r is of the pictures that the discriminator is given. Samples of a teacher that was guided by another κ
    than ``guidance_scale`` (draw-teacher: 4.5) are not quite what the score is of.

    Args:
        discriminator: its heads are on the teacher in the public code; not hinge.
        divergence: reverse_kl, forward_kl, jensen_shannon, softened_reverse_kl, squared_hellinger, jeffreys,
            neyman, pearson.
        ratio_range: least and largest r.
        settings: those of DMD2.

    Raises:
        ValueError: an unknown divergence, a hinge loss, or as DMD2.
    """

    bins = 10

    def __init__(
        self,
        discriminator: Discriminator,
        divergence: str = "forward_kl",
        ratio_range: tuple[float, float] = (0.1, 20.0),
        **settings: Any,
    ) -> None:
        super().__init__(discriminator=discriminator, **settings)
        check_divergence(divergence, discriminator)
        self.weight, self.ratio_range = DIVERGENCES[divergence][0], ratio_range

    def build(self, facts: TeacherFacts) -> None:
        """As DMD2."""
        super().build(facts)
        self.num_timesteps = facts.schedule.num_timesteps

    def score_gradient(
        self, at: Noised, sample: StudentSample, networks: Networks, random: StepRandom
    ) -> Tensor:
        """g [B, C, H, W], weighted."""
        assert self.discriminator is not None
        ratio = self.discriminator.log_ratio(at.x_t, at.t, sample.condition, networks).exp()
        weights = normalised(self.weight(self._balanced(ratio.clamp(*self.ratio_range), at.t)), self.mean)
        return expand_like(weights, at.x0) * super().score_gradient(at, sample, networks, random)

    def _balanced(self, ratio: Tensor, t: Tensor) -> Tensor:
        """r [B] by its mean among the samples of its part of the schedule."""
        places = (t * self.bins / self.num_timesteps).long()
        sums = ratio.new_zeros(2, self.bins).index_add(
            1, places, torch.stack([ratio, torch.ones_like(ratio)])
        )
        total, count = self.mean(sums)
        return ratio * (count / total)[places]
