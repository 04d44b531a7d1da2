"""From settings to the networks of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.steps import Steps
from lightning_modules.generator import OneStepGenerator, make_generator
from lightning_modules.networks.backbones import TextToImageParts
from lightning_modules.networks.backbones.calling import run_network
from lightning_modules.networks.loading import load_parts, noise_schedule
from lightning_modules.networks.lora import LoraSettings, StudentBase, StudentLoraSettings
from lightning_modules.networks.pipeline_folder import student_scheduler
from lightning_modules.networks.prompt_cache import use_prompt_cache
from lightning_modules.networks.roles import RunNetworks, ScoreModels, captured
from lightning_modules.networks.step_counts import add_step_counts
from lightning_modules.networks.student import make_student
from lightning_modules.networks.weights import hide_from_state_dict
from lightning_modules.objectives.base import Objective, TeacherFacts


@dataclass(frozen=True)
class NetworkSettings:
    """What the networks of a run follow from; see the arguments of ``OneStepDistillation``."""

    teacher: str
    steps: Steps
    lora: LoraSettings | None
    student_init: str | None
    student_lora: StudentLoraSettings | None
    prompt_cache: str | None
    gradient_checkpointing: bool
    in_shards: bool = False


@dataclass(frozen=True)
class Built:
    """The networks of a run, on the CPU.

    Attributes:
        parts: of the teacher.
        student: the network in training.
        student_base: the frozen weights under a LoRA student.
        scores: teacher and fake score.
        networks: all three as functions.
        generator: the student with prompt encoder and decoder.
    """

    parts: TextToImageParts
    student: nn.Module
    student_base: StudentBase | None
    scores: ScoreModels
    networks: RunNetworks
    generator: OneStepGenerator


def build_networks(settings: NetworkSettings, objective: Objective) -> Built:
    """Load the teacher and make the other roles of it; what is not trained stays out of state dicts.

    With `in_shards`, weights of the teacher are not read yet: `parallel.shard_networks` does.

    Raises:
        UserError: the teacher or the start can't be used, or the objective doesn't fit the teacher.
    """
    if settings.steps.counts and (settings.lora or settings.student_lora or settings.in_shards):
        raise UserError(
            "model.step_counts: student and fake score are told the number of steps, and learn it with all "
            "of their weights. Set fake_score.lora and student_lora to null, and don't train in shards; or "
            "leave step_counts out."
        )
    offloaded = () if settings.prompt_cache is None else ("text_encoders",)
    parts = load_parts(settings.teacher, without=offloaded, in_shards=settings.in_shards)
    schedule = noise_schedule(parts.scheduler, parts.image_tokens, parts.backbone)
    student_scheduler(parts.scheduler, settings.steps)  # refuses steps that no scheduler of theirs takes
    student, student_base = make_student(
        parts, settings.teacher, settings.steps.start, settings.student_init, settings.student_lora
    )
    # before the fake score's adapter goes into the network
    scores = ScoreModels(parts.denoiser, schedule, settings.lora, "fake_score" in objective.roles)
    if settings.steps.counts:
        for network in (student, scores.full_copy):
            if network is not None:
                add_step_counts(network, settings.steps.counts)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()  # type: ignore[operator]
        scores.enable_gradient_checkpointing()
    generator = make_generator(parts, settings.steps, student)
    if settings.prompt_cache is not None:  # drops text encoders without weights, which Lightning can't move
        use_prompt_cache(generator.prompt_encoder, parts, settings.prompt_cache)
    hide_from_state_dict(generator)  # its student is stored as ``student``, the rest is frozen
    built = Built(parts, student, student_base, scores, scores.with_student(student), generator)
    try:
        objective.build(teacher_facts(built))
    except ValueError as error:
        raise UserError(f"{type(objective).__name__} does not fit {parts.path}: {error}") from error
    return built


class _Call(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return run_network(self.network, x_t, t, condition)


def teacher_facts(built: Built) -> TeacherFacts:
    """What the objective may know of the teacher."""
    shape = built.parts.latent_shape

    def feature_shape(name: str) -> tuple[int, ...]:
        call = _Call(built.scores.base)
        # shapes only: nothing is computed, however large the network
        weights = {n: x.to("meta") for n, x in [*call.named_parameters(), *call.named_buffers()]}
        condition = built.generator.prompt_encoder.encode([""]).to("meta")
        inputs = torch.empty(1, *shape, device="meta"), torch.zeros(1, device="meta"), condition
        with torch.no_grad(), captured(call.network, [name]) as outputs:
            torch.func.functional_call(call, weights, inputs)
        return tuple(outputs[name].shape[1:])

    return TeacherFacts(built.scores.schedule, shape, built.generator.steps, feature_shape)


def check_turns(objective: Objective, further: Sequence[str]) -> int:
    """Number of batches of a step, of an objective whose plan can be followed.

    Args:
        objective: with its plan.
        further: roles beside student and fake score whose optimization is configured.

    Raises:
        UserError: a step has not exactly one turn of the student, or roles and optimizations don't match.
    """
    name, turns = type(objective).__name__, objective.turns(0)
    if sum(turn.role == "student" for turn in turns) != 1:
        planned = ", ".join(turn.role for turn in turns)
        raise UserError(f"{name} plans the turns {planned}: exactly one must be the student's")
    if unknown := {turn.role for turn in turns} - set(objective.roles):
        raise UserError(f"{name} plans turns of {', '.join(sorted(unknown))}, which its roles don't name")
    own = [role for role in objective.roles if role not in ("student", "fake_score")]
    if set(own) != set(further):
        raise UserError(
            f"{name} trains {', '.join(own) or 'no role beside student and fake score'}, and "
            f"further_roles gives the optimization of {', '.join(further) or 'none'}: give one for each"
        )
    return 1 + max(turn.batch for turn in turns)
