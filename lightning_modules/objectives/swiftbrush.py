"""SwiftBrush: variational score distillation of a one-step generator, without images (arXiv 2312.05239)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.diffusion.broadcast import at_least_float32, expand_like
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.timesteps import UniformTimesteps
from lightning_modules.diffusion.weighting import alpha_squared, sigma_squared
from lightning_modules.guidance.scales import GuidanceScale, as_guidance
from lightning_modules.objectives.base import Objective, Scores, StudentSample


class SwiftBrush(Objective):
    """SwiftBrush (Nguyen and Tran, CVPR 2024, arXiv 2312.05239), weights and ranges as in the official code.

    Student, with t ~ U{min_timestep … max_timestep − 1} per sample, fresh ε, x_t = α_t x̂ + σ_t ε, no gradient
    through either score, and the same κ and ∅ in both::

        g = σ_t² (ε_teacher^κ(x_t, t, y) − ε_fake^κ(x_t, t, y))
        L = ½ MSE(x̂, sg[x̂ − g]),  ∂L/∂x̂ = g / numel

    Fake score, on the same x̂ detached, with new ε, t ~ U{0 … T − 1}, no guidance, text dropped now and then::

        L = MSE(α_t ε_fake(x_t, t, y or ∅), α_t ε)

    Where this differs from the official code:

    - α_T and σ_T of the student's start come from the teacher's schedule (ᾱ_999 = 0.00466 for Stable
      Diffusion), outside this class, and the start timestep is a setting; the code has 0.0047 written in.
    - Any prediction type works, each network is read as ε; the code takes its output for ε.
    - ᾱ, x_t, noises, score difference and losses are in float32; the code keeps ᾱ, x_t and the noises in the
      half type and has only the final squared error in float32.
    - Non-finite entries of g are counted (``diagnostics["nonfinite_score_gradients"]``) and left in, so that
      the loss is non-finite too and the caller can skip the update visibly; the code sets them to zero.
    - ε and t follow from (seed, step, sample), not from a global generator: different in every process, equal
      for any number of them. The code gives all processes one seed.
    - The dropout decision is one per student step for the global batch, whatever the number of processes and
      micro-batches; in the code it is one per batch of a process.
    - κ may be a rule (see ``GuidanceScale``) and dropout may be per sample; neither is in the code.

    Args:
        guidance_scale: κ of both scores in the student's turn, a number or a rule.
        min_timestep: least t of the student's turn.
        max_timestep: one more than its largest t.
        prompt_dropout: probability that the fake score is trained with ∅ in place of the prompts.
        dropout_per_sample: decide per sample rather than once for the global batch.

    Raises:
        ValueError: on timesteps or a probability out of range (``max_timestep`` past the schedule:
            in ``check_schedule`` and at use).
    """

    def __init__(
        self,
        guidance_scale: float | GuidanceScale = 4.5,
        min_timestep: int = 20,
        max_timestep: int = 980,
        prompt_dropout: float = 0.1,
        dropout_per_sample: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout is a probability, got {prompt_dropout}")
        self.guidance = as_guidance(guidance_scale)
        self.student_timesteps = UniformTimesteps(min_timestep, max_timestep)
        self.prompt_dropout = prompt_dropout
        self.dropout_per_sample = dropout_per_sample

    def student_loss(self, sample: StudentSample, scores: Scores, random: StepRandom) -> dict[str, Tensor]:
        """``{"vsd": ½ MSE(x̂, sg[x̂ − g])}``: gradient g / numel at ``sample.x0``, value mean(g²) / 2."""
        self.check_schedule(scores.schedule)
        x0 = at_least_float32(sample.x0)
        kappa = self.guidance.draw(random)
        with torch.no_grad():
            gradient, t = self._score_gradient(x0, sample.condition, scores, random, kappa)
        self.diagnostics.update(
            guidance_scale=kappa.mean() if isinstance(kappa, Tensor) else kappa,
            student_timestep=t.float().mean(),
            score_gradient_rms=gradient.square().mean().sqrt(),
            nonfinite_score_gradients=(~torch.isfinite(gradient)).sum(),
        )
        # ½ MSE(x̂, sg[x̂ − g]): the gradient is g / numel, because d/dx̂ of ½ (x̂ − c)² is x̂ − c = g.
        return {"vsd": 0.5 * F.mse_loss(x0, (x0 - gradient).detach())}

    def _score_gradient(
        self, x0: Tensor, condition: Condition, scores: Scores, random: StepRandom, kappa: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """g [B, C, H, W], which points from the teacher's x0 towards the fake score's, and t [B]."""
        t = self.student_timesteps.draw(random.uniform("student_timestep")).to(x0.device)
        noise = random.normal("student_noise", x0.shape[1:]).to(x0)
        x_t = scores.schedule.add_noise(x0, noise, t)
        teacher = scores.teacher(x_t, t, condition, guidance_scale=kappa)
        fake = scores.fake_score(x_t, t, condition, guidance_scale=kappa)
        # The paper's VSD gradient, weighted as in the official code: g = σ_t² (ε_teacher^κ − ε_fake^κ).
        weight = sigma_squared(*scores.schedule.alpha_sigma(t))
        return expand_like(weight, x0) * (teacher.epsilon - fake.epsilon), t

    def fake_score_loss(self, sample: StudentSample, scores: Scores, random: StepRandom) -> dict[str, Tensor]:
        """``{"denoising": MSE(α_t ε_fake, α_t ε)}`` at the detached sample: trains the fake score only."""
        x0 = at_least_float32(sample.x0.detach())
        timesteps = UniformTimesteps(0, scores.schedule.num_timesteps)
        t = timesteps.draw(random.uniform("fake_timestep")).to(x0.device)
        noise = random.normal("fake_noise", x0.shape[1:]).to(x0)
        x_t = scores.schedule.add_noise(x0, noise, t)
        condition = self._with_dropout(sample.condition, random)
        prediction = scores.fake_score(x_t, t, condition, guidance_scale=1.0)
        # MSE(α_t ε_fake, α_t ε) = mean of α_t² (ε_fake − ε)², in float32.
        weight = expand_like(alpha_squared(*scores.schedule.alpha_sigma(t)), x0)
        return {"denoising": (weight * (prediction.epsilon - noise).square()).mean()}

    def _with_dropout(self, condition: Condition, random: StepRandom) -> Condition:
        """``condition`` with ∅ in place of prompts: for the whole global batch, or sample by sample."""
        if self.dropout_per_sample:
            mask = random.uniform("prompt_dropout") < self.prompt_dropout
            self.diagnostics["dropped_prompts"] = mask.float().mean()
            return condition.without_text(mask)
        drop = random.shared_uniform("prompt_dropout") < self.prompt_dropout
        self.diagnostics["dropped_prompts"] = float(drop)
        return condition.without_text() if drop else condition

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raise ValueError if ``max_timestep`` lies past the schedule."""
        if self.student_timesteps.high > schedule.num_timesteps:
            raise ValueError(
                f"max_timestep is {self.student_timesteps.high}, but the teacher's schedule has only "
                f"{schedule.num_timesteps} timesteps: lower max_timestep"
            )
