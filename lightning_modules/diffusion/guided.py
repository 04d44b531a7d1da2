"""Classifier-free guidance (arXiv 2207.12598), in the one form used everywhere: ε^κ = ε_∅ + κ (ε_y − ε_∅).

κ = 1 is the plain conditional prediction, κ = 0 the unconditional one. Papers that write ε_y + γ (ε_y − ε_∅)
(SwiftBrush v2, NAG) mean γ = κ − 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_modules.diffusion.broadcast import at_least_float32, expand_like
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.schedule import NoiseSchedule


class Network(Protocol):
    """A denoising network: noised samples [B, …], times [B], condition of B prompts -> output [B, …]."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition, /) -> Tensor: ...


Rescale = Callable[[Tensor, Tensor], Tensor]
"""A change of the guided raw output [B, …], given that with text, in families that were made with one."""


def guided_prediction(
    network: Network,
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    guidance_scale: float | Tensor = 1.0,
    negative: Condition | None = None,
    embedded: str | None = None,
    rescale: Rescale | None = None,
) -> Prediction:
    """The network's prediction at (``x_t``, ``t``) under guidance; differentiable.

    Args:
        network: see :class:`Network`; called once with B samples if ``guidance_scale`` is the number 1, else
            once with 2B (the first half without text).
        schedule: gives α_t, σ_t and the meaning of the network's output.
        x_t: noised samples, [B, …].
        t: timesteps of the schedule, [B]; the network is told what the schedule makes of them.
        condition: B prompts.
        guidance_scale: κ, a number or one per sample [B].
        negative: B prompts (or one for all) that take the place of ∅; without effect if κ is the number 1.
        embedded: for a network into which guidance was distilled, the name under which it takes κ with its
            condition, [B]: one pass whatever κ.
        rescale: what becomes of the guided raw output, given that with text; None: it stays.

    Raises:
        ValueError: if shapes do not fit the batch, or such a network is given negative prompts.
    """
    if condition.batch_size != len(x_t):
        raise ValueError(f"{condition.batch_size} prompts for a batch of {len(x_t)}")
    if embedded is not None:
        if negative is not None:
            raise ValueError("guidance was distilled into this network: it takes no negative prompts by it")
        kappa = torch.as_tensor(guidance_scale, dtype=torch.float32, device=x_t.device).expand(len(x_t))
        told = Condition({**condition.tensors, embedded: kappa}, {**condition.null, embedded: kappa[:1]})
        return schedule.read(network(x_t, schedule.network_time(t), told), x_t, t)
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
        return schedule.read(network(x_t, schedule.network_time(t), condition), x_t, t)
    base = condition.without_text() if negative is None else negative.expand(len(x_t))
    time = schedule.network_time(t)
    output = network(torch.cat([x_t, x_t]), torch.cat([time, time]), base.concat(condition))
    without, with_text = at_least_float32(output).chunk(2)
    scale = guidance_scale
    if isinstance(scale, Tensor):
        scale = expand_like(scale.to(without), without)
    # ε^κ = ε_∅ + κ (ε_y − ε_∅). ε, x0, v and flow are affine in one another at fixed (x_t, t) and the weights
    # 1 − κ and κ add up to one, so it may be applied to the raw outputs whatever they stand for.
    guided = without + scale * (with_text - without)
    return schedule.read(guided if rescale is None else rescale(guided, with_text), x_t, t)
