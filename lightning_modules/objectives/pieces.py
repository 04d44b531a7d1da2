"""What several methods do alike: noised samples, the fake score's own loss, normalisers, mixing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.diffusion.broadcast import at_least_float32, expand_like
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.timesteps import UniformTimesteps, own_timesteps
from lightning_modules.objectives.base import Networks, StudentSample, TeacherFacts


class Noised(NamedTuple):
    """x̂ in float32 at least, x_t = α_t x̂ + σ_t ε, both [B, C, H, W], t [B] and ε."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    noise: Tensor


def noised(
    x0: Tensor, networks: Networks, random: StepRandom, name: str, timesteps: UniformTimesteps
) -> Noised:
    """Samples with noise of their own; the random numbers are ``NAME_timestep`` and ``NAME_noise``."""
    x0 = at_least_float32(x0)
    t = timesteps.draw(random.uniform(f"{name}_timestep")).to(x0.device)
    noise = random.normal(f"{name}_noise", x0.shape[1:]).to(x0)
    return Noised(x0, networks.schedule.add_noise(x0, noise, t), t, noise)


OwnTimesteps = Mapping[int, Sequence[UniformTimesteps]]
"""The part of a range of timesteps that is each step's own, by a sample's `told` and `k`; empty: no parts."""


def own_timesteps_of(facts: TeacherFacts, low: int, high: int) -> OwnTimesteps:
    """Matching in phases: each step of the student at its own noise alone.

    Where new noise comes between the steps, x̂ of step k noised to t, from t_{k+1} on, has the distribution
    of what step k + 1 is given, noised on to t: both are α_t x̂ + σ_t n. Below t_{k+1} the next steps are at
    work, above t_k the former ones were. As t tells which step it is, one fake score is one for each step.

    Raises:
        ValueError: a step has no timesteps of its own.
    """
    return {count: own_timesteps(steps, low, high) for count, steps in facts.steps.by_count().items()}


def timesteps_of(sample: StudentSample, whole: UniformTimesteps, own: OwnTimesteps) -> UniformTimesteps:
    """Where a loss looks at a sample: anywhere, or at its step's own timesteps."""
    return own[sample.told][sample.k] if own else whole


def check_timesteps(timesteps: UniformTimesteps, schedule: NoiseSchedule, name: str = "max_timestep") -> None:
    """Raise ValueError if timesteps lie past the schedule."""
    if timesteps.high > schedule.num_timesteps:
        raise ValueError(
            f"{name} is {timesteps.high}, but the teacher's schedule has only "
            f"{schedule.num_timesteps} timesteps: lower {name}"
        )


def denoising_loss(
    sample: StudentSample, networks: Networks, random: StepRandom, own: OwnTimesteps = MappingProxyType({})
) -> Tensor:
    """MSE of what the fake score says about noised samples, by what its network puts out: ε, v, x0 or flow.

    Without guidance and text dropout, t uniform over the whole schedule, as in DMD2's code (there ε), or over
    the step's own part of it.
    """
    at = timesteps_of(sample, UniformTimesteps(0, networks.schedule.num_timesteps), own)
    x0, x_t, t, noise = noised(sample.x0.detach(), networks, random, "fake", at)
    prediction = networks.fake_score(x_t, t, sample.condition)
    alpha, sigma = (expand_like(value, x0) for value in networks.schedule.alpha_sigma(t))
    targets = {
        "epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0
    }  # fmt: skip
    return (at_least_float32(prediction.output) - targets[prediction.kind]).square().mean()


def mean_distance(x0: Tensor, real: Tensor) -> Tensor:
    """ω = max(mean |x̂ − x0_real|, 1e-5) of each sample, [B, 1, 1, 1]: DMD's normaliser, without gradient."""
    distance = (x0 - real).detach().abs().mean(tuple(range(1, x0.ndim)), keepdim=True)
    return distance.clamp(min=1e-5)


def normalised(weights: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights [B] with mean 1 over the samples of one pass of all processes."""
    return weights / mean(weights.mean())


@torch.no_grad()
def mix_towards_student(networks: Networks, share: float) -> None:
    """Fake score ← (1 − share) fake score + share student, weight by weight (SenseFlow, arXiv 2506.00523).

    Raises:
        ValueError: the two don't have the same weights: one of them is an adapter.
    """
    fake, student = dict(networks.fake_score.weights()), dict(networks.student.weights())
    if fake.keys() != student.keys():
        raise ValueError("the fake score is mixed with the student, so both must be full copies: set "
                         "model.fake_score.lora and model.student_lora to null")  # fmt: skip
    for name, weight in fake.items():
        weight.lerp_(student[name].to(weight.dtype), share)
