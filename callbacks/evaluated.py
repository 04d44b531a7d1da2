"""What the evaluating callbacks ask of the module they watch, and how they run it outside of the loops."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from common.errors import UserError
from datamodules.evaluation_sets import EvaluationSet
from datamodules.picture_files import Frame
from lightning_modules.diffusion.steps import Steps


class Decoder(Protocol):
    """The autoencoder; ``encode`` gives latents [B, C, h, w] of pictures [B, 3, H, W] in [0, 1]."""

    def encode(self, images: Tensor) -> Tensor: ...


class Generator(Protocol):
    """Draws pictures [B, 3, H, W] in [0, 1], one for each prompt and seed; in fewer of its steps, too."""

    @property
    def decoder(self) -> Decoder: ...

    def images(self, prompts: list[str], seeds: list[int]) -> Tensor: ...

    def taking(self, count: int) -> AbstractContextManager[None]: ...


class Parts(Protocol):
    """The teacher's parts; ``path`` is the folder they were read from."""

    @property
    def path(self) -> str: ...


class Student(Protocol):
    """A distillation module, as the callbacks see it; ``score_views`` takes the evaluation weights itself."""

    generator: Generator
    parts: Parts
    student_steps: int
    steps: Steps

    def evaluation_weights(self) -> AbstractContextManager[str]: ...

    def score_views(self, prompts: list[str], seeds: list[int]) -> dict[str, Tensor]: ...


def as_student(module: nn.Module) -> Student:
    """The module under the name of what it offers (no check, for type checkers only)."""
    return cast(Student, module)


def weights_of(student: Student) -> str:
    """Which weights it is evaluated with: "ema" or "online"."""
    with student.evaluation_weights() as name:
        return name


@contextmanager
def evaluating(trainer: Trainer, module: nn.Module, own_weights: bool = False) -> Iterator[str]:
    """Evaluation mode, no gradients, the run's precision and, unless the module sees to them itself
    (``own_weights``), the evaluation weights; yields "ema", "online" or, for own weights, "".

    Moves the module to the run's device first: when ``on_fit_end`` comes, Lightning has moved it to the CPU.
    """
    module.to(trainer.strategy.root_device)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        weights = nullcontext("") if own_weights else as_student(module).evaluation_weights()
        with torch.no_grad(), trainer.precision_plugin.forward_context(), weights as name:
            yield name
    finally:
        for part, training in modes.items():
            part.training = training


def evaluation_captions(trainer: Trainer) -> list[str]:
    """All evaluation captions of the run's data module: those that reports are about.

    Raises:
        UserError: the run has no data module with ``eval_captions``.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    captions = getattr(data, "eval_captions", None)
    if not isinstance(captions, list) or not captions:
        raise UserError(
            f"the run's data module ({type(data).__name__}) has no list `eval_captions` to evaluate on: "
            "use datamodules.prompts.PromptDataModule, or give yours that attribute"
        )
    return captions


def measured_captions(trainer: Trainer) -> list[str]:
    """All captions of the present stage: of validations the data module's ``val_captions``, if any."""
    captions = evaluation_captions(trainer)
    if trainer.validating or trainer.sanity_checking:
        return getattr(trainer.datamodule, "val_captions", captions)  # type: ignore[attr-defined]
    return captions


def evaluation_set(
    trainer: Trainer, size: int | None = None, seed: int = 0, frame: Frame | None = None
) -> EvaluationSet:
    """The first captions of the stage (None, or no more than that: all), as many of each group.

    Caption i of them is drawn from seed ``seed + i``. Group and negative prompt of each of the data module's
    ``eval_captions`` are its ``eval_groups`` and ``eval_negatives``, if it has these. Name and published
    protocol are those of its ``eval_set``, where these are its captions and this is its ``frame``.

    Raises:
        UserError: they can't be shared out equally among the groups.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    captions = measured_captions(trainer)
    are_reported = captions is data.eval_captions
    groups, negatives = (
        getattr(data, name, None) if are_reported else None for name in ("eval_groups", "eval_negatives")
    )
    own: EvaluationSet | None = getattr(data, "eval_set", None)
    if own is None or not are_reported or own.frame != frame:
        own = EvaluationSet("run", [], [])
    seeds = [seed + i for i in range(len(captions))]
    whole = replace(
        own, captions=captions, seeds=seeds, negatives=negatives, groups=groups, frame=frame, told=None
    )
    if size is None or size >= len(captions):
        return whole
    return replace(whole.first(size, "Evaluation.final_size"), seeds=seeds[:size])


def shown_set(trainer: Trainer, frame: Frame | None = None) -> EvaluationSet:
    """The captions to which the ``indices`` of the present stage refer.

    Of validations they are those of the data module's ``val_set``, if it has one: not the first ones of all,
    but as many of each group.
    """
    whole = evaluation_set(trainer, frame=frame)
    chosen: EvaluationSet | None = getattr(trainer.datamodule, "val_set", None)  # type: ignore[attr-defined]
    if chosen is None or not (trainer.validating or trainer.sanity_checking):
        return whole
    return replace(
        whole,
        captions=chosen.captions,
        seeds=list(range(len(chosen))),
        negatives=chosen.negatives,
        groups=chosen.groups,
    )
