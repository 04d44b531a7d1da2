"""Trajectory distribution matching (TDM, arXiv 2503.06674): matching at each step's own noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_modules.diffusion.broadcast import at_least_float32, expand_like
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.timesteps import UniformTimesteps
from lightning_modules.guidance.scales import GuidanceScale, as_guidance
from lightning_modules.objectives.base import (
    Networks,
    Objective,
    StudentSample,
    TeacherFacts,
    Terms,
    Turn,
)
from lightning_modules.objectives.pieces import check_timesteps, mean_distance


class Diffused(NamedTuple):
    """x_τ [B, C, H, W] on the way from where step k arrives, τ [B], and its noise relative to x̂."""

    x_t: Tensor
    t: Tensor
    noise: Tensor


class TDM(Objective):
    """TDM (Luo et al., arXiv 2503.06674), as in the official demonstration code, for a K-step student.

    Step k goes from t_k to t_{k+1} (the last one to 0) without new noise (``model.step_noise: none``):
    x_{k+1} = α x̂ + σ ε̂, with ε̂ = (x_k − α_k x̂) / σ_k. From there it is diffused on to τ, uniform over the
    step's own interval [max(min_timestep, t_{k+1}), t_k − margin), where it acts::

        x_τ = (α_τ / α_{k+1}) x_{k+1} + sqrt(σ_τ² − (α_τ / α_{k+1})² σ_{k+1}²) ε = α_τ x̂ + σ_τ n
        L = mean ρ(x̂ − sg[x̂ + x0_teacher^κ(x_τ) − x0_fake(x_τ)]) / mean |x̂ − x0_teacher^κ|

    with ρ(d) = ½ d², or sqrt(d² + c²) − c for c above 0 (pseudo-Huber); the gradient goes through x̂ alone.

    The fake score learns x0 at the same kind of x_τ, with min(SNR, 5) as a weight. The noise n in it is not
    unit normal given x̂ (ε̂ belongs to x̂), hence a sample's importance, with ε the new noise::

        w = exp(−½ mean n²) / exp(−½ mean ε²)

    (with sums in place of the means it is the ratio of the two densities, up to a factor that is one for all
    samples of a τ; the means temper it, as thousands of numbers would make it zero or huge).

    TDM-unify is ``model.step_counts``: for each number of steps that is drawn the intervals are other ones.

    Where this differs from the official code: the normaliser is at least 1e-5; the point where the trajectory
    is left is the interval's end and is not drawn; the code has no TDM-unify.

    Args:
        guidance_scale: κ of the teacher, a number or a rule.
        huber: c; 0 is the squared error. The code's demonstration has 1e-3.
        intervals: own: τ in the step's own interval; whole: up to the schedule's end.
        min_timestep: least τ.
        margin: timesteps left out at the interval's upper end.
        importance: weigh the fake score's samples by w.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        guidance_scale: float | GuidanceScale = 4.5,
        huber: float = 1e-3,
        intervals: Literal["own", "whole"] = "own",
        min_timestep: int = 20,
        margin: int = 10,
        importance: bool = True,
    ) -> None:
        super().__init__()
        if huber < 0 or margin < 0 or min_timestep < 0:
            raise ValueError(f"huber={huber}, margin={margin}, min_timestep={min_timestep}: none is below 0")
        self.guidance, self.huber, self.importance = as_guidance(guidance_scale), huber, importance
        self.intervals, self.min_timestep, self.margin = intervals, min_timestep, margin
        self.ends: dict[int, list[int | None]] = {}  # by the sample's told, and k
        self.ranges: dict[int, list[UniformTimesteps]] = {}

    def build(self, facts: TeacherFacts) -> None:
        """Cut the schedule into the steps' intervals.

        Raises:
            ValueError: there is noise between the steps, or one's interval is empty.
        """
        if len(facts.steps) > 1 and facts.steps.noise != "none":
            raise ValueError(
                f"step_noise is {facts.steps.noise}: the trajectory is deterministic, set it to none"
            )
        for count, steps in facts.steps.by_count().items():
            times = steps.timesteps
            self.ends[count] = [*times[1:], None]
            tops = times if self.intervals == "own" else [facts.schedule.num_timesteps] * len(times)
            self.ranges[count] = [
                UniformTimesteps(max(self.min_timestep, end or 0), top - self.margin)
                for end, top in zip(self.ends[count], tops, strict=True)
            ]
        check_timesteps(self.ranges[0][0], facts.schedule)

    def turns(self, step: int) -> Sequence[Turn]:
        """The fake score first, on the same samples."""
        return [Turn("fake_score"), Turn("student")]

    def diffused(
        self, sample: StudentSample, schedule: NoiseSchedule, random: StepRandom, name: str
    ) -> tuple[Diffused, Tensor]:
        """From where the sample's step arrives on to τ; and the new noise ε. Without gradient."""
        assert sample.x_t is not None and sample.t is not None
        x0 = at_least_float32(sample.x0.detach())
        t = self.ranges[sample.told][sample.k].draw(random.uniform(f"{name}_timestep")).to(x0.device)
        fresh = random.normal(f"{name}_noise", x0.shape[1:]).to(x0)
        alpha, sigma = (expand_like(value, x0) for value in schedule.alpha_sigma(t))
        end = self.ends[sample.told][sample.k]
        if end is None:  # the last step arrives at x̂ itself
            return Diffused(alpha * x0 + sigma * fresh, t, fresh), fresh
        at = [expand_like(value, x0) for value in schedule.alpha_sigma(sample.t)]
        seen = (at_least_float32(sample.x_t.detach()) - at[0] * x0) / at[1]  # ε̂
        to = [expand_like(value, x0) for value in schedule.alpha_sigma(torch.full_like(sample.t, end))]
        kept = alpha / to[0] * to[1]  # of σ_τ, what is ε̂'s
        noise = (kept * seen + (sigma**2 - kept**2).clamp(min=0).sqrt() * fresh) / sigma
        return Diffused(alpha * x0 + sigma * noise, t, noise), fresh

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        """``{"matching": L}``, its gradient at ``sample.x0``."""
        x0 = at_least_float32(sample.x0)
        at, _ = self.diffused(sample, networks.schedule, random, "student")
        with torch.no_grad():
            kappa = self.guidance.draw(random)
            real = networks.teacher(at.x_t, at.t, sample.condition, kappa).x0
            fake = networks.fake_score(at.x_t, at.t, sample.condition).x0
            target = x0 + real - fake
        error = x0 - target
        c = self.huber
        error = (error.square() + c**2).sqrt() - c if c else 0.5 * error.square()
        numbers: dict[str, float | Tensor] = {
            "student_timestep": at.t.float().mean(),
            "student_step": float(sample.k),
            **({"student_steps": float(sample.told)} if sample.told else {}),
            "nonfinite_score_gradients": (~torch.isfinite(target)).sum(),
        }
        return Terms({"matching": (error / mean_distance(x0, real)).mean()}, numbers)

    def fake_score_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        """``{"denoising": mean w min(SNR, 5) |x0_fake(x_τ) − x̂|²}``, without guidance."""
        at, fresh = self.diffused(sample, networks.schedule, random, "fake")
        x0 = at_least_float32(sample.x0.detach())
        alpha, sigma = networks.schedule.alpha_sigma(at.t)
        weight = (alpha / sigma).square().clamp(max=5)
        if self.importance:
            squares = [noise.square().flatten(1).mean(1) for noise in (at.noise, fresh)]
            weight = weight * torch.exp(0.5 * (squares[1] - squares[0]))
        said = networks.fake_score(at.x_t, at.t, sample.condition).x0
        return Terms({"denoising": (expand_like(weight, x0) * (said - x0).square()).mean()})
