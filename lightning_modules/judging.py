"""The loss terms of each turn: those of the objective, of image losses and of given pictures, all noted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from common.errors import UserError
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.objectives.base import StudentSample
from lightning_modules.optimization import StepNumbers
from lightning_modules.parallel import on_all_processes

if TYPE_CHECKING:
    from lightning_modules.distillation import OneStepDistillation

SHOWN_PROMPTS = 3


def student_terms(
    module: OneStepDistillation, sample: StudentSample, prompts: list[str], random: StepRandom, share: float
) -> dict[str, Tensor]:
    """Terms of the student's turn: the objective's, and those of image losses whose weight is not zero.

    Raises:
        UserError: two terms have one name.
    """
    terms = objective_terms(module, "student", sample, random, share)
    if module.image_terms is None:
        return terms
    whole = round(len(prompts) / share) * module.trainer.world_size
    max_steps = int(module.trainer.max_steps)
    images, numbers = module.image_terms.judge(sample.x0, prompts, random, whole, max_steps)
    if both := terms.keys() & images.keys():
        raise UserError(f"objective and image losses both have a term {sorted(both)[0]!r}: rename one")
    module.numbers.note_all("image_losses", numbers, share, module.trainer.world_size)
    return terms | _noted(module, "student", images, share)


def not_finite(numbers: StepNumbers, prompts: list[str], role: str) -> str:
    """Which terms of the update in progress are not finite, and its first prompts. Collective.

    Those of the first process that has such a term; where none has, the network's backward pass made it so.
    """
    kinds = (f"train/{role}_", *(["gradient_at_output/"] if role == "student" else []))
    names = [name.partition("/")[2] for name in numbers.nonfinite() if name.startswith(kinds)]
    terms = list(dict.fromkeys(name.removeprefix(f"{role}_") for name in names))
    found = on_all_processes((terms, prompts[:SHOWN_PROMPTS]))
    terms, shown = next((one for one in found if one[0]), found[0])
    what = f"terms: {', '.join(terms)}" if terms else "no term: in the network's backward pass"
    return f" ({what}; prompts: {', '.join(map(repr, shown))} …)"


def objective_terms(
    module: OneStepDistillation, role: str, sample: StudentSample, random: StepRandom, share: float
) -> dict[str, Tensor]:
    """The objective's terms for one role ("student", "fake_score"), noted together with its diagnostics."""
    module.objective.diagnostics.clear()
    terms = getattr(module.objective, f"{role}_loss")(sample, module.scores, random)
    module.numbers.note_all("objective", module.objective.diagnostics, share, module.trainer.world_size)
    return _noted(module, role, terms, share)


def pair_term(module: OneStepDistillation, step: int) -> Tensor | None:
    """The regression on given pictures with the student's graph; None where there are none."""
    if module.pair_regression is None:
        return None
    places = module.pair_regression.places(module.global_rank)
    random = StepRandom(module.seed, step, places, module.device)
    term = module.pair_regression.loss(module.generator, module.scores, random)
    return _noted(module, "student", {"pairs": term}, 1.0)["pairs"]


def _noted(
    module: OneStepDistillation, role: str, terms: dict[str, Tensor], share: float
) -> dict[str, Tensor]:
    """The terms; one that is not finite makes its gradient so: then every process skips the update."""
    for name, value in terms.items():
        module.numbers.note(f"train/{role}_{name}", value, share)
    return {name: term * (1 + 0 * term.detach()) for name, term in terms.items()}
