"""The student as objectives sample it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.steps import Steps
from lightning_modules.guidance import negative_attention
from lightning_modules.guidance.methods import Nasa
from lightning_modules.networks.roles import RoleNetwork
from lightning_modules.networks.step_counts import tell
from lightning_modules.objectives.base import Inputs, Objective, StepInput


class StudentSampler:
    """One call is one step of the student to x0; implements the objectives' `Sampler`.

    Args:
        network: the student.
        role: the same as a function.
        schedule: of the teacher.
        steps: where the student is called.
        latent_shape: (C, h, w).
    """

    def __init__(
        self,
        network: nn.Module,
        role: RoleNetwork,
        schedule: NoiseSchedule,
        steps: Steps,
        latent_shape: tuple[int, int, int],
    ) -> None:
        self._network, self._role, self._schedule = network, role, schedule
        self.steps, self.latent_shape = steps, latent_shape
        self._attention = ExitStack()

    @contextmanager
    def turn(self) -> Iterator["StudentSampler"]:
        """What the last call did to the attention stays as it is until the end, backward pass included.

        Gradient checkpointing draws again there. So only the last call may be differentiated with it.
        """
        try:
            yield self
        finally:
            self._attention.close()

    def __call__(
        self,
        x_t: Tensor,
        condition: Condition,
        t: Tensor | None = None,
        negative: Condition | None = None,
        negative_scale: float | None = None,
    ) -> Tensor:
        """x0 [B, C, h, w], at least float32, from x_t [B, C, h, w] at timesteps t [B] (None: T).

        With `negative` and a scale, attention goes away from those prompts by NASA (arXiv 2412.02687).
        """
        t = self.steps.at(0, x_t) if t is None else t
        return self._predict(x_t, condition, t, negative, negative_scale).x0

    @torch.no_grad()
    def arrive(
        self,
        condition: Condition,
        random: StepRandom,
        negative: Condition | None = None,
        negative_scale: float | None = None,
    ) -> StepInput:
        """What a step is given that is drawn for the whole global batch, by way of the student's own steps.

        Backward simulation (DMD2, arXiv 2405.14867, section 4.5): what the student sees in training is what
        it sees in use. Of a student that takes the number of its steps that is drawn, too, from those that it
        knows (TDM-unify, arXiv 2503.06674).
        """
        steps, count = self.steps, 0
        if steps.counts:
            count = steps.counts[int(random.shared_uniform("step_count") * len(steps.counts))]
            steps = steps.fewer(count)
            tell(self._network, count)
        k = int(random.shared_uniform("student_step") * len(steps))
        x_t = start = random.normal("start", self.latent_shape)
        for i in range(k):
            said = self._predict(x_t, condition, steps.at(i, start), negative, negative_scale)
            x_t = steps.next_input(
                i, said, self._schedule, start, lambda step: random.normal(f"step_{step}", self.latent_shape)
            )
        return StepInput(x_t, steps.at(k, start), k, count)

    def _predict(
        self,
        x_t: Tensor,
        condition: Condition,
        t: Tensor,
        negative: Condition | None,
        negative_scale: float | None,
    ) -> Prediction:
        self._attention.close()
        if negative is not None and negative_scale is not None:
            self._attention.enter_context(negative_attention(self._network, negative, Nasa(negative_scale)))
        return self._role(x_t, t, condition)


class _Recorder:
    """Takes note of the scales of negative prompts, and draws nothing."""

    steps, latent_shape = Steps((0,)), (1, 1, 1)

    def __init__(self) -> None:
        self.scales: list[float | None] = []

    def arrive(
        self,
        condition: Condition,
        random: StepRandom,
        negative: Condition | None = None,
        negative_scale: float | None = None,
    ) -> StepInput:
        noise = random.normal("start", self.latent_shape)
        return StepInput(noise, self.steps.at(0, noise), 0)

    def __call__(
        self,
        x_t: Tensor,
        condition: Condition,
        t: Tensor | None = None,
        negative: Condition | None = None,
        negative_scale: float | None = None,
    ) -> Tensor:
        self.scales.append(negative_scale)
        return x_t


def check_negative_scale(objective: Objective, seed: int) -> None:
    """Refuse to compile a student whose negative prompts' scale changes: each would be another graph.

    After a few of them torch.compile gives up without a word, and the student runs as it is.

    Raises:
        UserError: the scales of the first two steps differ.
    """
    nothing = Condition({"text": torch.zeros(1, 1)}, {"text": torch.zeros(1, 1)})
    recorders = _Recorder(), _Recorder()
    for step, recorder in enumerate(recorders):
        random = StepRandom(seed, step, torch.arange(1))
        objective.sample(recorder, Inputs(nothing, nothing), random, "student")
    if recorders[0].scales != recorders[1].scales:
        raise UserError(
            "compile does not work with a random student_negatives: the student would be compiled in every "
            "step. Set compile to false, or student_negatives to a number."
        )
