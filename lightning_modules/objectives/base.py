"""What every distillation objective has in common: what it plans, what it is given, and what it returns."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.steps import Steps

NEGATIVE_PROMPTS, REAL_PICTURES = "negative_prompts", "real_pictures"
"""What an objective may need besides prompts (`Objective.needs`)."""


class Turn(NamedTuple):
    """One update within a student step.

    Attributes:
        role: whose weights move: student, fake_score, or another role that the objective names.
        batch: which of the step's batches of prompts; turns on one batch share its samples.
    """

    role: str
    batch: int = 0


@dataclass(frozen=True)
class Real:
    """Given pictures as latents at unit scale, with the captions they belong to.

    Attributes:
        x0: [R, C, H, W].
        condition: the R captions.
        random: random numbers of the step for these pictures.
        noise: where each is the end of the teacher's trajectory, its beginning, [R, C, H, W].
    """

    x0: Tensor
    condition: Condition
    random: StepRandom
    noise: Tensor | None = None


@dataclass(frozen=True)
class Inputs:
    """What a batch is sampled from: B prompts, and a negative prompt each if there are some."""

    condition: Condition
    negative: Condition | None = None


@dataclass(frozen=True)
class StudentSample:
    """What the student made of a batch of prompts.

    Attributes:
        x0: latents at unit scale, [B, C, H, W]; a leaf that asks for its gradient in the student's turn,
            without a gradient in the others.
        condition: the B prompts it was made from.
        negative: a negative prompt for each of them, for objectives that need some.
        x_t: what the step that carries the gradient was given, [B, C, H, W].
        t: the timesteps of that step, [B].
        k: its number among the student's steps.
        told: in how many steps, where the student knows several numbers of them and one was drawn; else 0.
        real: given pictures, for objectives that need some.
    """

    x0: Tensor
    condition: Condition
    negative: Condition | None = None
    x_t: Tensor | None = None
    t: Tensor | None = None
    k: int = 0
    told: int = 0
    real: Real | None = None


class StepInput(NamedTuple):
    """What step k of the student is given: x_t [B, C, H, W], without a gradient, and t [B].

    `told` is that of :class:`StudentSample`.
    """

    x_t: Tensor
    t: Tensor
    k: int
    told: int = 0


class Sampler(Protocol):
    """The student in `Objective.sample`: one call is one step to x0 [B, C, H, W]."""

    steps: Steps
    latent_shape: tuple[int, int, int]

    def arrive(
        self,
        condition: Condition,
        random: StepRandom,
        negative: Condition | None = None,
        negative_scale: float | None = None,
    ) -> StepInput:
        """Input of the step whose turn it is, which is drawn, the same for the whole global batch.

        The steps before it are taken without a gradient, with the negative prompts as in a call. Of a
        one-step student it is the start noise. One that takes the number of its steps is told one of them.
        """

    def __call__(
        self,
        x_t: Tensor,
        condition: Condition,
        t: Tensor | None = None,
        negative: Condition | None = None,
        negative_scale: float | None = None,
    ) -> Tensor:
        """x0 from x_t [B, C, H, W] at timesteps t [B] (None: the start timestep).

        With a negative prompt for each sample, attention goes away from it by NASA at α = `negative_scale`.
        """


class Network(Protocol):
    """(x_t [B, …], t [B], condition, κ, negative) -> :class:`Prediction`; see ``guided_prediction``.

    ``features`` names layers of the network whose outputs the prediction brings along, of the pass with text.
    """

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        negative: Condition | None = None,
        *,
        features: Sequence[str] = (),
    ) -> Prediction: ...

    def weights(self) -> Mapping[str, Tensor]:
        """The network's weights by name, to be changed in place after an update at most."""


class Networks(Protocol):
    """All networks of a run, as functions. The objective decides where gradients flow through them."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule they are read with."""

    @property
    def student(self) -> Network:
        """The generator; a term that calls it here reaches its weights directly."""

    @property
    def teacher(self) -> Network:
        """The frozen score of real images."""

    @property
    def fake_score(self) -> Network:
        """The trained score of the student's images."""


@dataclass(frozen=True)
class TeacherFacts:
    """What an objective may know of the teacher before training.

    Attributes:
        schedule: of the teacher.
        latent_shape: (C, h, w).
        steps: of the student.
        feature_shape: the shape [C, …] of one sample's output of a layer, by the layer's name; raises
            ValueError if there is none of that name.
    """

    schedule: NoiseSchedule
    latent_shape: tuple[int, ...]
    steps: Steps
    feature_shape: Callable[[str], tuple[int, ...]]


class Terms(NamedTuple):
    """What a turn minimises, and what it tells.

    Attributes:
        losses: named scalar terms, each already weighted and a mean over the samples at hand; their sum is
            minimised.
        numbers: worth logging; those called nonfinite… or truncated… are counts.
    """

    losses: dict[str, Tensor]
    numbers: Mapping[str, float | Tensor] = {}


class Objective(nn.Module, ABC):
    """The mathematics of a method. It knows nothing of ranks, loggers or optimizers.

    A method has a function ``ROLE_loss(sample, networks, random) -> Terms`` for each role that it trains.

    Attributes:
        roles: networks that are trained; a role that is not named here is not built. Roles other than student
            and fake_score consist of networks that the objective owns.
        mean: mean of a tensor over all processes, set from outside.
    """

    roles: tuple[str, ...] = ("student", "fake_score")

    def __init__(self) -> None:
        super().__init__()
        self.mean: Callable[[Tensor], Tensor] = lambda value: value

    @property
    def needs(self) -> frozenset[str]:
        """What it takes besides prompts: NEGATIVE_PROMPTS, REAL_PICTURES; nothing by default."""
        return frozenset()

    def build(self, facts: TeacherFacts) -> None:  # noqa: B027 - optional
        """Check the settings against the teacher and make own networks; called once, before training.

        Raises:
            ValueError: the settings do not fit the teacher.
        """

    def turns(self, step: int) -> Sequence[Turn]:
        """The updates of one student step, in order; exactly one is the student's.

        By default the student's, then the fake score's on the same samples. The number of batches is that of
        step 0 in all steps.
        """
        return [Turn(role) for role in self.roles]

    def sample(self, student: Sampler, inputs: Inputs, random: StepRandom, role: str) -> StudentSample:
        """The student's samples for a turn of `role`; by default those of the step whose turn it is."""
        at = student.arrive(inputs.condition, random)
        x0 = student(at.x_t, inputs.condition, at.t)
        return StudentSample(x0, inputs.condition, inputs.negative, *at)

    def loss(self, role: str, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        """Loss terms of a turn of `role`.

        In the student's turn gradients reach the student alone: through ``sample.x0`` and through calls of
        ``networks.student``. In the other turns they reach the role's own weights alone.
        """
        terms: Terms = getattr(self, f"{role}_loss")(sample, networks, random)
        return terms

    def parameters_of(self, role: str) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """Own parameters (or parameter groups) that move in turns of `role`; all with the fake score's."""
        return self.parameters() if role == "fake_score" else ()

    def after_update(self, role: str, networks: Networks) -> None:  # noqa: B027 - optional
        """Called after each update of `role` that was not skipped; nothing by default."""
