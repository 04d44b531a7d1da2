"""Regression of the student on given pictures: SwiftBrush v2's optional image regularization ("Ours*").

The paper (arXiv 2408.14176) regularizes on captioned pictures in the manner of DMD (arXiv 2311.18828), whose
pairs are (noise, the teacher's picture of it), which samples of the teacher (`draw-teacher`) are. A given
picture has no noise; here it is the one that the teacher's ODE leads back to, so that picture and noise
belong together and the mean over noises is not blur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from lightning_modules.diffusion.broadcast import expand_like
from lightning_modules.diffusion.condition import Condition
from lightning_modules.objectives.base import Networks, Real


@dataclass(frozen=True)
class PairRegression:
    """The term weight * MSE(f(z, y), x0), z at the beginning of the teacher's ODE; goes with any objective.

    Attributes:
        weight: of the term; 0.25 in DMD, there of LPIPS between pictures.
        inversion_steps: teacher evaluations that find a given picture's noise.

    Raises:
        UserError: a number out of range.
    """

    weight: float = 0.25
    inversion_steps: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise UserError(f"pair_regression.weight is {self.weight}: it must be above 0")
        if self.inversion_steps < 1:
            raise UserError(
                f"pair_regression.inversion_steps is {self.inversion_steps}: it must be at least 1"
            )

    def loss(self, real: Real, networks: Networks, start_timestep: int) -> Tensor:
        """The term over the given pictures, scalar; its gradient reaches the student's weights."""
        noise = real.noise
        if noise is None:
            noise = ddim_inversion(real.x0, networks, real.condition, self.inversion_steps)
        t = torch.full((len(noise),), start_timestep, dtype=torch.long, device=noise.device)
        return self.weight * F.mse_loss(networks.student(noise, t, real.condition).x0, real.x0)


@torch.no_grad()
def ddim_inversion(x0: Tensor, networks: Networks, condition: Condition, steps: int) -> Tensor:
    """The noise [B, C, h, w] from which the unguided teacher's ODE arrives at x0 [B, C, h, w].

    DDIM backwards (arXiv 2010.02502, section 4.3): x_s = alpha_s x0(x_t, t) + sigma_s eps(x_t, t), s > t.
    """
    last = networks.schedule.num_timesteps - 1
    timesteps = torch.linspace(0, last, steps + 1).round().long().tolist()
    x = x0
    for now, then in zip(timesteps, timesteps[1:]):
        t = torch.full((len(x),), now, device=x.device)
        prediction = networks.teacher(x, t, condition)
        alpha, sigma = networks.schedule.alpha_sigma(torch.full_like(t, then))
        x = expand_like(alpha, x) * prediction.x0 + expand_like(sigma, x) * prediction.epsilon
    return x
