"""How much memory the parts of a distillation take, before activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning_modules.distillation import OneStepDistillation

Part = tuple[int, int, bool]
"""Number of values, bytes, and whether they are weights that an optimizer trains."""

EMA, GRADIENTS, OPTIMIZERS = "student's moving average", "gradients", "optimizer states (estimate)"
NOT_WEIGHTS = (EMA, GRADIENTS, OPTIMIZERS)
"""Parts that follow from the trained weights and are neither trained nor frozen themselves."""


def size(tensors: Iterable[Tensor], trained: bool = False) -> Part:
    """Values and bytes of these tensors, each counted once."""
    unique = {id(tensor): tensor for tensor in tensors}.values()
    return sum(t.numel() for t in unique), sum(t.numel() * t.element_size() for t in unique), trained


def memory_by_part(module: OneStepDistillation) -> dict[str, Part]:
    """What takes memory in a training, activations apart, by name; parts that are empty are left out.

    Gradients: those of the larger turn, because a turn's are freed before the next one begins. Optimizer
    states: what each optimizer keeps of a small matrix, times the number of weights.
    """
    assert module.student is not None
    student = size((p for p in module.student.parameters() if p.requires_grad), trained=True)
    fake = size(module.scores.fake_parameters(), trained=True)
    own = size(module.objective.parameters(), trained=True)
    turns = (student[:2], (fake[0] + own[0], fake[1] + own[1]))
    roles = (module.student_optimization, module.fake_score_optimization)
    kept = [role.state_per_weight(module.device) for role in roles]
    states = [
        sum(round(weights * each[place]) for (weights, _), each in zip(turns, kept, strict=True))
        for place in (0, 1)
    ]
    frozen = {
        "teacher": size(p for p in module.scores.base.parameters() if not p.requires_grad),
        "text encoders": size(module.generator.prompt_encoder.text_encoders.parameters()),
        "autoencoder": size(module.parts.vae.parameters()),
    }
    if module.student_lora is not None:
        frozen["student's base"] = size(p for p in module.student.parameters() if not p.requires_grad)
    if module.image_terms is not None:
        shared = {id(p) for p in module.parts.vae.parameters()}
        frozen["image losses' networks"] = size(
            p for p in module.image_terms.parameters() if id(p) not in shared
        )
    kind = "full copy" if module.lora is None else "LoRA adapter"
    parts = {
        "student" if module.student_lora is None else "student (LoRA adapter)": student,
        f"fake score ({kind})": fake,
        "objective's networks": own,
        **frozen,
        EMA: size(module.ema.shadow.values() if module.ema is not None else ()),
        GRADIENTS: (*max(turns, key=lambda turn: turn[1]), False),
        OPTIMIZERS: (states[0], states[1], False),
    }
    return {name: part for name, part in parts.items() if part[0]}
