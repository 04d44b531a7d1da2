"""How much memory the parts of a distillation take, before activations."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_modules.image_losses.terms import ImageTerms
from lightning_modules.networks.ema import StudentEMA
from lightning_modules.networks.roles import ScoreModels

Part = tuple[int, int, bool]
"""Number of values, bytes, and whether they are weights that an optimizer trains."""

EMA, GRADIENTS, OPTIMIZERS = "student's moving average", "gradients", "optimizer states (estimate)"
NOT_WEIGHTS = (EMA, GRADIENTS, OPTIMIZERS)
"""Parts that follow from the trained weights and are neither trained nor frozen themselves."""


def size(tensors: Iterable[Tensor], trained: bool = False) -> Part:
    """Values and bytes of these tensors, each counted once; of those in shards, this process's share."""
    unique = {id(tensor): tensor for tensor in tensors}.values()
    held = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in unique]
    return sum(t.numel() for t in held), sum(t.numel() * t.element_size() for t in held), trained


def memory_by_part(
    student: nn.Module,
    scores: ScoreModels,
    objective: nn.Module,
    autoencoder: nn.Module,
    text_encoders: nn.Module,
    image_terms: ImageTerms | None,
    ema: StudentEMA | None,
    kept: Mapping[str, tuple[float, float]],
) -> dict[str, Part]:
    """What takes memory in a training, activations apart, by name; parts that are empty are left out.

    Gradients: those of the larger turn, because a turn's are freed before the next one begins. Optimizer
    states: what each optimizer keeps of a small matrix, times the number of weights.

    Args:
        student, scores, objective, autoencoder, text_encoders, image_terms, ema: of the run.
        kept: by role, the values and bytes that its optimizer keeps for each weight.
    """
    is_lora = any(not p.requires_grad for p in student.parameters())
    trained = size((p for p in student.parameters() if p.requires_grad), trained=True)
    fake, own = size(scores.fake_parameters(), trained=True), size(objective.parameters(), trained=True)
    # networks of the objective move with the fake score, or else in turns of their own
    turns = {"student": trained[:2], "fake_score": (fake[0] + own[0], fake[1] + own[1])}
    states = [sum(round(turns[r][0] * each[at]) for r, each in kept.items() if r in turns) for at in (0, 1)]
    teacher = {id(x) for x in (*scores.base.parameters(), *scores.base.buffers())}
    frozen = {
        "teacher": size(
            [*(p for p in scores.base.parameters() if not p.requires_grad), *scores.base.buffers()]
        ),
        "text encoders": size(text_encoders.parameters()),
        "autoencoder": size(autoencoder.parameters()),
        "student's base": size(
            x
            for x in (*student.parameters(), *(student.buffers() if is_lora else ()))
            if not x.requires_grad and id(x) not in teacher
        ),
    }
    if image_terms is not None:
        shared = {id(p) for p in autoencoder.parameters()}
        frozen["image losses' networks"] = size(p for p in image_terms.parameters() if id(p) not in shared)
    table = {
        "student (LoRA adapter)" if is_lora else "student": trained,
        f"fake score ({'full copy' if scores.lora is None else 'LoRA adapter'})": fake,
        "objective's networks": own,
        **frozen,
        EMA: size(ema.shadow.values() if ema is not None else ()),
        GRADIENTS: (*max(turns.values(), key=lambda turn: turn[1]), False),
        OPTIMIZERS: (states[0], states[1], False),
    }
    return {name: part for name, part in table.items() if part[0]}
