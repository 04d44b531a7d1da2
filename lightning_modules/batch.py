"""The parts of a batch that fit into memory, and the negative prompts that go with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from common.errors import UserError
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.guidance import negative_attention
from lightning_modules.guidance.methods import Nasa

if TYPE_CHECKING:
    from lightning_modules.distillation import OneStepDistillation


class MicroBatch(NamedTuple):
    """What one pass takes.

    Attributes:
        prompts: b prompts.
        indices: their places in the global batch, [b].
        share: b as a share of this process's batch.
        negatives: b negative prompts, if the objective uses some.
    """

    prompts: list[str]
    indices: Tensor
    share: float
    negatives: list[str] | None


def micro_batches(module: OneStepDistillation, batch: dict[str, Any]) -> Iterator[MicroBatch]:
    """Cut this process's batch into parts of the data module's ``micro_batch_size``.

    Raises:
        UserError: the objective needs negative prompts and the data has none.
    """
    prompts, indices, negatives = batch["prompts"], batch["indices"], batch.get("negative_prompts")
    if not module.objective.uses_negatives:
        negatives = None
    elif negatives is None:
        raise UserError(
            f"{type(module.objective).__name__} is set to use negative prompts, and there are none: set "
            "data.negative_prompts, e.g. to assets/negative_prompts.txt"
        )
    size = getattr(module.trainer.datamodule, "micro_batch_size", None) or len(prompts)  # type: ignore[attr-defined]
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        chosen = None if negatives is None else negatives[part]
        yield MicroBatch(prompts[part], indices[part], len(prompts[part]) / len(prompts), chosen)


def student_negatives(
    module: OneStepDistillation, negative: Condition | None, random: StepRandom
) -> AbstractContextManager[None]:
    """NASA-T (SNOOPI, arXiv 2412.02687): the student's attention at the objective's alpha, if it has one.

    Gradient checkpointing draws again in the backward pass, so that it must happen inside.
    """
    alpha = module.objective.student_negative_scale(random)
    if negative is None or alpha is None:
        return nullcontext()
    assert module.student is not None
    return negative_attention(module.student, negative, Nasa(alpha))
