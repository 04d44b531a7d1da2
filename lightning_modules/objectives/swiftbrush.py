"""SwiftBrush (arXiv 2312.05239), variational score distillation of a one-step generator without images.

With a random guidance scale it is PG-SB, with negative prompts NASA-T (both SNOOPI, arXiv 2412.02687).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.diffusion.broadcast import at_least_float32, expand_like
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.timesteps import UniformTimesteps
from lightning_modules.diffusion.weighting import alpha_squared, sigma_squared
from lightning_modules.guidance.scales import GuidanceScale, as_guidance
from lightning_modules.objectives.base import (
    NEGATIVE_PROMPTS,
    Inputs,
    Networks,
    Objective,
    Sampler,
    StudentSample,
    TeacherFacts,
    Terms,
)
from lightning_modules.objectives.pieces import (
    OwnTimesteps,
    check_timesteps,
    noised,
    own_timesteps_of,
    timesteps_of,
)


class SwiftBrush(Objective):
    """SwiftBrush (Nguyen and Tran, CVPR 2024, arXiv 2312.05239), weights and ranges as in the official code.

    Student, with t ~ U{min_timestep … max_timestep − 1} per sample, fresh ε, x_t = α_t x̂ + σ_t ε, no gradient
    through either score, and the same κ and ∅ in both::

        g = σ_t² (ε_teacher^κ(x_t, t, y) − ε_fake^κ(x_t, t, y))
        L = ½ MSE(x̂, sg[x̂ − g]),  ∂L/∂x̂ = g / numel

    Fake score, on the same x̂ detached, with new ε, t ~ U{0 … num_timesteps − 1}, no guidance, text dropped
    now and then::

        L = MSE(α_t ε_fake(x_t, t, y or ∅), α_t ε)

    On rectified flow, which the paper does not have, the fake score's loss is that of such models, without a
    weight: MSE(v_fake, ε − x̂). The weight α_t², with ε_fake − ε = α_t (v_fake − v), would leave nothing near
    σ = 1.

    Where this differs from the official code:

    - α_T and σ_T of the student's start come from the teacher's schedule (ᾱ_999 = 0.00466 for Stable
      Diffusion), outside this class, and the start timestep is a setting; the code has 0.0047 written in.
    - Any prediction type works, each network is read as ε; the code takes its output for ε.
    - ᾱ, x_t, noises, score difference and losses are in float32; the code keeps ᾱ, x_t and the noises in the
      half type and has only the final squared error in float32.
    - Non-finite entries of g are counted (number ``nonfinite_score_gradients``) and left in, so that
      the loss is non-finite too and the caller can skip the update visibly; the code sets them to zero.
    - ε and t follow from (seed, step, sample), not from a global generator: different in every process, equal
      for any number of them. The code gives all processes one seed.
    - The dropout decision is one per student step for the global batch, whatever the number of processes and
      micro-batches; in the code it is one per batch of a process.
    - κ may be a rule (see ``GuidanceScale``) and dropout may be per sample; neither is in the code.

    PG-SB is ``guidance_scale`` = UniformGuidance(0.5, 4): each step draws one κ, for both scores. Its
    ablation: ``guidance_scale`` random and ``fake_guidance_scale`` a number randomises the teacher only, the
    other way round the fake score only.

    NASA-T: the samples' negative prompts y⁻ take the place of ∅ in the teacher's guidance, and the student's
    forward pass runs with NASA at α ~ U(0, 1)::

        ε_teacher^κ = ε_teacher(x_t, t, y⁻) + κ (ε_teacher(x_t, t, y) − ε_teacher(x_t, t, y⁻))

    The paper's rows (negatives in student, teacher, fake score): none; teacher; teacher and fake score;
    student and teacher (NASA-T); all three.

    Args:
        guidance_scale: κ of both scores in the student's turn, a number or a rule.
        fake_guidance_scale: κ of the fake score; null: the teacher's, the same draw. Two random
            rules share one uniform number.
        teacher_negatives: the teacher's guidance goes away from y⁻ instead of ∅.
        fake_score_negatives: the fake score's, too.
        student_negatives: α of NASA in the student's forward pass, a number or a rule with one draw per step;
            null: it gets no negative prompts.
        min_timestep: least t of the student's turn.
        max_timestep: one more than its largest t.
        prompt_dropout: probability that the fake score is trained with ∅ in place of the prompts.
        dropout_per_sample: decide per sample rather than once for the global batch.
        intervals: whole: t of all steps of the student alike, with one fake score for them all; own: t
            between a step's own timestep and the next one's, for the fake score, too (phases).

    Raises:
        ValueError: on timesteps or a probability out of range (``max_timestep`` past the schedule:
            in ``build`` and at use).
    """

    def __init__(
        self,
        guidance_scale: float | GuidanceScale = 4.5,
        min_timestep: int = 20,
        max_timestep: int = 980,
        prompt_dropout: float = 0.1,
        dropout_per_sample: bool = False,
        fake_guidance_scale: float | GuidanceScale | None = None,
        teacher_negatives: bool = False,
        fake_score_negatives: bool = False,
        student_negatives: float | GuidanceScale | None = None,
        intervals: Literal["whole", "own"] = "whole",
    ) -> None:
        super().__init__()
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout is a probability, got {prompt_dropout}")
        if getattr(student_negatives, "per_sample", False):
            raise ValueError("student_negatives has one draw per step: set per_sample to false")
        self.guidance = as_guidance(guidance_scale)
        self.fake_guidance = None if fake_guidance_scale is None else as_guidance(fake_guidance_scale)
        self.teacher_negatives, self.fake_score_negatives = teacher_negatives, fake_score_negatives
        self.student_negatives = None if student_negatives is None else as_guidance(student_negatives)
        self.student_timesteps, self.intervals = UniformTimesteps(min_timestep, max_timestep), intervals
        self.own: OwnTimesteps = {}
        self.fake_own: OwnTimesteps = {}
        self.prompt_dropout = prompt_dropout
        self.dropout_per_sample = dropout_per_sample

    def build(self, facts: TeacherFacts) -> None:
        """Check the timesteps, and cut them into the steps' intervals if that is asked for.

        Raises:
            ValueError: ``max_timestep`` lies past the schedule, or a step has no timesteps of its own.
        """
        check_timesteps(self.student_timesteps, facts.schedule)
        if self.intervals == "own":
            self.own = own_timesteps_of(facts, self.student_timesteps.low, self.student_timesteps.high)
            self.fake_own = own_timesteps_of(facts, 0, facts.schedule.num_timesteps)

    def sample(self, student: Sampler, inputs: Inputs, random: StepRandom, role: str) -> StudentSample:
        """The drawn step; NASA-T: away from the negative prompts, at one α for batch and steps."""
        away = inputs.negative, self.student_negative_scale(random)
        at = student.arrive(inputs.condition, random, *away)
        x0 = student(at.x_t, inputs.condition, at.t, *away)
        return StudentSample(x0, inputs.condition, inputs.negative, *at)

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        """``{"vsd": ½ MSE(x̂, sg[x̂ − g])}``: gradient g / numel at ``sample.x0``, value mean(g²) / 2."""
        check_timesteps(self.student_timesteps, networks.schedule)
        x0 = at_least_float32(sample.x0)
        kappa = self.guidance.draw(random)
        kappas = kappa, kappa if self.fake_guidance is None else self.fake_guidance.draw(random)
        with torch.no_grad():
            gradient, t = self._score_gradient(x0, sample, networks, random, kappas)
        numbers: dict[str, float | Tensor] = {
            f"guidance_scale/{role}": value.mean() if isinstance(value, Tensor) else value
            for role, value in zip(("teacher", "fake_score"), kappas, strict=True)
        }
        if (alpha := self.student_negative_scale(random)) is not None:
            numbers["student_negative_scale"] = alpha
        numbers |= {
            "student_timestep": t.float().mean(),
            "score_gradient_rms": gradient.square().mean().sqrt(),
            "nonfinite_score_gradients": (~torch.isfinite(gradient)).sum(),
        }
        # ½ MSE(x̂, sg[x̂ − g]): the gradient is g / numel, because d/dx̂ of ½ (x̂ − c)² is x̂ − c = g.
        return Terms({"vsd": 0.5 * F.mse_loss(x0, (x0 - gradient).detach())}, numbers)

    def _score_gradient(
        self,
        x0: Tensor,
        sample: StudentSample,
        networks: Networks,
        random: StepRandom,
        kappas: tuple[float | Tensor, float | Tensor],
    ) -> tuple[Tensor, Tensor]:
        """g [B, C, H, W], which points from the teacher's x0 towards the fake score's, and t [B]."""
        if NEGATIVE_PROMPTS in self.needs and sample.negative is None:
            raise ValueError("the objective needs negative prompts, but the samples have none")
        timesteps = timesteps_of(sample, self.student_timesteps, self.own)
        _, x_t, t, _ = noised(x0, networks, random, "student", timesteps)
        text, teacher_kappa, fake_kappa = sample.condition, *kappas
        negative = sample.negative if self.teacher_negatives else None
        teacher = networks.teacher(x_t, t, text, guidance_scale=teacher_kappa, negative=negative)
        negative = sample.negative if self.fake_score_negatives else None
        fake = networks.fake_score(x_t, t, text, guidance_scale=fake_kappa, negative=negative)
        # The paper's VSD gradient, weighted as in the official code: g = σ_t² (ε_teacher^κ − ε_fake^κ).
        weight = sigma_squared(*networks.schedule.alpha_sigma(t))
        return expand_like(weight, x0) * (teacher.epsilon - fake.epsilon), t

    def fake_score_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        """``{"denoising": MSE(α_t ε_fake, α_t ε)}`` at the detached sample: trains the fake score only."""
        everywhere = UniformTimesteps(0, networks.schedule.num_timesteps)
        timesteps = timesteps_of(sample, everywhere, self.fake_own)
        x0, x_t, t, noise = noised(sample.x0.detach(), networks, random, "fake", timesteps)
        condition, dropped = self._with_dropout(sample.condition, random)
        prediction = networks.fake_score(x_t, t, condition, guidance_scale=1.0)
        if prediction.kind == "flow":
            error = (prediction.flow - (noise - x0)).square().mean()
            return Terms({"denoising": error}, {"dropped_prompts": dropped})
        # MSE(α_t ε_fake, α_t ε) = mean of α_t² (ε_fake − ε)², in float32.
        weight = expand_like(alpha_squared(*networks.schedule.alpha_sigma(t)), x0)
        loss = (weight * (prediction.epsilon - noise).square()).mean()
        return Terms({"denoising": loss}, {"dropped_prompts": dropped})

    def _with_dropout(self, condition: Condition, random: StepRandom) -> tuple[Condition, float | Tensor]:
        """``condition`` with ∅ in place of prompts, for the whole global batch or sample by sample; share."""
        if self.dropout_per_sample:
            mask = random.uniform("prompt_dropout") < self.prompt_dropout
            return condition.without_text(mask), mask.float().mean()
        drop = random.shared_uniform("prompt_dropout") < self.prompt_dropout
        return condition.without_text() if drop else condition, float(drop)

    @property
    def needs(self) -> frozenset[str]:
        """Negative prompts, if any of the three roles gets some."""
        used = self.teacher_negatives or self.fake_score_negatives or self.student_negatives is not None
        return frozenset([NEGATIVE_PROMPTS] if used else [])

    def student_negative_scale(self, random: StepRandom) -> float | None:
        """α of NASA in the student's forward pass: one draw per step, apart from κ's; None for none."""
        return None if self.student_negatives is None else float(self.student_negatives.draw(random, "alpha"))
