"""What every distillation objective has in common: what it is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class StudentSample:
    """What the student made of a batch of prompts.

    Attributes:
        x0: latents at unit scale, [B, C, H, W]; carries the student's graph in the student's turn only.
        condition: the B prompts it was made from.
        negative: a negative prompt for each of them, for objectives that use some.
    """

    x0: Tensor
    condition: Condition
    negative: Condition | None = None


class ScoreFunction(Protocol):
    """(x_t [B, …], t [B], condition, κ, negative) -> :class:`Prediction`; see ``guided_prediction``."""

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        negative: Condition | None = None,
    ) -> Prediction: ...


class Scores(Protocol):
    """The two score models, as functions. The objective decides where gradients flow through them."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule both are read with."""

    @property
    def teacher(self) -> ScoreFunction:
        """The frozen score of real images."""

    @property
    def fake_score(self) -> ScoreFunction:
        """The trained score of the student's images."""


class Objective(nn.Module, ABC):
    """The mathematics of a method: losses of the student's and of the fake score's turn.

    An objective knows nothing of ranks, loggers or optimizers. Losses are dicts of named scalar terms, each
    already weighted: their sum is what is minimised, and each is a mean over the samples at hand.

    Attributes:
        diagnostics: numbers or scalar tensors worth logging, each as of the last call that set it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.diagnostics: dict[str, float | Tensor] = {}

    @abstractmethod
    def student_loss(self, sample: StudentSample, scores: Scores, random: StepRandom) -> dict[str, Tensor]:
        """Loss terms of the student's turn; gradients reach ``sample.x0`` and no weight of a score model."""

    @abstractmethod
    def fake_score_loss(self, sample: StudentSample, scores: Scores, random: StepRandom) -> dict[str, Tensor]:
        """Loss terms of the fake score's turn; ``sample.x0`` is detached."""

    @property
    def uses_negatives(self) -> bool:
        """Whether samples need negative prompts; not by default."""
        return False

    def student_negative_scale(self, random: StepRandom) -> float | None:
        """α of NASA in the student's forward pass of this step; None (the default): the pass is plain."""
        return None

    def check_schedule(self, schedule: NoiseSchedule) -> None:  # noqa: B027 - optional
        """Raise ValueError if the settings do not fit the teacher's schedule; called before training."""

    def extra_parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups of networks the objective owns (a discriminator …); none by default."""
        return []
