"""Score identity distillation with long and short guidance (SiD-LSG, arXiv 2406.01561)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.diffusion.broadcast import expand_like
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.timesteps import UniformTimesteps
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
from lightning_modules.objectives.pieces import Noised, check_timesteps, mean_distance, noised


class SiDLSG(Objective):
    """SiD-LSG (Zhou et al., arXiv 2406.01561): the gradient goes through both scores.

    Each step trains the fake score first, on a batch of its own, then the student. With t ~ U{min_timestep …
    max_timestep − 1}, x_t = α_t x̂ + σ_t ε and the x0-predictions y_real of the teacher and y_fake of the fake
    score at x_t, the student minimises::

        L = Σ (y_real^κ4 − y_fake^κ2,3) · [(y_real^κ4 − x̂) − a (y_real^κ4 − y_fake^κ2,3)] / ω
        ω = sg max(mean |x̂ − y_real^κ4|, 1e-5) per sample

    and the fake score, on x̂ detached, with κ1 in its own guided prediction and text dropped now and then::

        L = Σ (ε_fake^κ1 − ε)²;  v-prediction: Σ (v_fake^κ1 − v)² · SNR / (SNR + 1)

    Rectified flow takes the first, which is (1 − σ)² times the squared error of the flow: little near pure
    noise, as with v. Sums run over the values of a sample, means over the batch, as in the official code.

    Zero-CFG (few-step SiD, arXiv 2505.12674) is κ4 = 1 and κ1 = κ2,3 = 0, a fake score without text; Anti-CFG
    has κ1 and κ2,3 below 0.

    With a discriminator both have an adversarial term more (SiDA, arXiv 2410.14919): it needs real pictures.

    Where this differs from the official code:

    - the student's noise has unit variance (there it is multiplied by σ at the start, 0.93 at 625): all
      students of this project are drawn from, and exported with, unit noise;
    - NaN is not masked: such an update is counted and skipped.

    Args:
        train_fake_guidance: κ1, guidance of the fake score in its own training.
        fake_guidance: κ2 = κ3, guidance of the fake score in the student's loss.
        teacher_guidance: κ4, guidance of the teacher in the student's loss.
        a: weight of the squared difference; 1 for Stable Diffusion, 1.2 in SiD.
        min_timestep: least t of both losses.
        max_timestep: one more than their largest t.
        prompt_dropout: probability per sample that the fake score is trained with ∅; without effect where
            neither κ1 nor κ2 asks for a prediction without text.
        discriminator: on the fake score's middle block, without heads, in the paper; null: none.

    Raises:
        ValueError: on timesteps or a probability out of range.
    """

    def __init__(
        self,
        train_fake_guidance: float = 1.5,
        fake_guidance: float = 1.5,
        teacher_guidance: float = 1.5,
        a: float = 1.0,
        min_timestep: int = 20,
        max_timestep: int = 980,
        prompt_dropout: float = 0.1,
        discriminator: Discriminator | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout is a probability, got {prompt_dropout}")
        self.train_fake_guidance, self.fake_guidance = train_fake_guidance, fake_guidance
        self.teacher_guidance, self.a = teacher_guidance, a
        self.timesteps = UniformTimesteps(min_timestep, max_timestep)
        guided = train_fake_guidance != 1 or fake_guidance != 1
        self.prompt_dropout = prompt_dropout if guided else 0.0
        self.discriminator = discriminator

    @property
    def needs(self) -> frozenset[str]:
        """Real pictures, if there is a discriminator."""
        return frozenset() if self.discriminator is None else frozenset([REAL_PICTURES])

    def build(self, facts: TeacherFacts) -> None:
        """Make the discriminator's heads; raises ValueError if a setting does not fit the teacher."""
        check_timesteps(self.timesteps, facts.schedule)
        if self.discriminator is not None:
            self.discriminator.build(facts)

    def turns(self, step: int) -> Sequence[Turn]:
        """The fake score first, on prompts and noise of its own."""
        return [Turn("fake_score", batch=1), Turn("student")]

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        """``{"sid": L}``, whose gradient at ``sample.x0`` goes through both networks; and "adversarial"."""
        at = noised(sample.x0, networks, random, "student", self.timesteps)
        text = sample.condition
        real = networks.teacher(at.x_t, at.t, text, guidance_scale=self.teacher_guidance).x0
        fake = networks.fake_score(at.x_t, at.t, text, guidance_scale=self.fake_guidance).x0
        numbers = {
            "student_timestep": at.t.float().mean(),
            "score_difference_rms": (real - fake).detach().square().mean().sqrt(),
            "nonfinite_predictions": (~torch.isfinite(real - fake)).sum(),
        }
        losses = {"sid": self.divergence(at, real, fake, text, networks).flatten(1).sum(1).mean()}
        if self.discriminator is not None:
            losses["adversarial"] = self.discriminator.student_term(sample, networks, random)
        return Terms(losses, numbers)

    def divergence(
        self, at: Noised, real: Tensor, fake: Tensor, condition: Condition, networks: Networks
    ) -> Tensor:
        """What is summed over a sample's values, [B, C, H, W], of the predictions y_real and y_fake."""
        product = (real - fake) * ((real - at.x0) - self.a * (real - fake))
        return product / mean_distance(at.x0, real)

    def fake_score_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        """``{"denoising": L}``, which trains the fake score only, and the discriminator's own terms."""
        x0, x_t, t, noise = noised(sample.x0.detach(), networks, random, "fake", self.timesteps)
        condition, dropped = self._with_dropout(sample.condition, random)
        prediction = networks.fake_score(x_t, t, condition, guidance_scale=self.train_fake_guidance)
        alpha, sigma = (expand_like(value, x0) for value in networks.schedule.alpha_sigma(t))
        if prediction.kind == "v_prediction":
            # SNR / (SNR + 1) = α² where α² + σ² = 1
            error = alpha**2 / (alpha**2 + sigma**2) * (prediction.v - alpha * noise + sigma * x0).square()
        else:
            error = (prediction.epsilon - noise).square()
        losses = {"denoising": error.flatten(1).sum(1).mean()}
        if self.discriminator is not None:
            losses |= self.discriminator.own_terms(sample, networks, random)
        return Terms(losses, {"dropped_prompts": dropped})

    def _with_dropout(self, condition: Condition, random: StepRandom) -> tuple[Condition, Tensor]:
        mask = random.uniform("prompt_dropout") < self.prompt_dropout
        return condition.without_text(mask), mask.float().mean()


def check_no_a(objective: SiDLSG) -> None:
    """Raise ValueError if what is built on SiD at a = 1 was given another a, which it would not use."""
    if objective.a != 1:
        raise ValueError(f"a is {objective.a}, which {type(objective).__name__} has not: leave it out")
