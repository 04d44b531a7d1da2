"""Weight interpolation of two students of one architecture: theta = lambda theta_A + (1 - lambda) theta_B.

(SwiftBrush v2, arXiv 2408.14176, which merges a full and a LoRA student with lambda = 0.5.)
"""

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.hashing import hash_json
from lightning_modules.diffusion.steps import Steps
from lightning_modules.networks.backbones import backbone_of
from lightning_modules.networks.loading import find_model, read_json, read_weights, weight_files
from lightning_modules.networks.pipeline_folder import student_scheduler
from lightning_modules.networks.student import LoadedStudent, is_checkpoint, mismatch
from lightning_modules.networks.weights import difference, other_value

_WORDS = ("first", "second")
_HALF_ROUNDING = 2.0**-8  # of bfloat16, the coarser one: copies of one network differ by that at most


def merge_students(
    first: LoadedStudent, second: LoadedStudent, weight: float, dtype: torch.dtype = torch.float32
) -> LoadedStudent:
    """The student weight * first + (1 - weight) * second, with the first one's other parts.

    A model without a start timestep of its own (a multi-step teacher) takes that of the other.

    Args:
        first, second: as `load_student` gives them; not changed.
        weight: lambda; 1 is the first bit for bit and 0 the second, outside [0, 1] extrapolates (warned).
        dtype: the merged weights are rounded to it (and held in float32), so that a later export in this
            dtype loses nothing. See `stored_dtype`.
    """
    if not math.isfinite(weight):
        raise UserError(f"The merging weight is {weight}; it must be a finite number, as a rule from 0 to 1.")
    if not 0 <= weight <= 1:
        warnings.warn(
            f"The merging weight {weight:g} lies outside [0, 1]: that extrapolates beyond both models.",
            stacklevel=2,
        )
    steps = check_mergeable(first, second)
    student = copy.deepcopy(first.parts.denoiser)
    student.load_state_dict(merged_weights(first.parts.denoiser, second.parts.denoiser, weight, dtype))
    scheduler = student_scheduler(first.parts.scheduler, steps)
    facts = {
        "teacher": first.facts.get("teacher", first.parts.path),
        "weights": "merged",
        "merged": f"{weight:g} * first + {1 - weight:g} * second",
        "merge_weight": weight,
    }
    for word, side in zip(_WORDS, (first, second), strict=True):
        known = {"weights": side.weights, "student_steps": side.facts.get("student_steps")}
        facts |= {f"{word}_{name}": value for name, value in known.items() if value is not None}
    parts = replace(first.parts, denoiser=student, scheduler=scheduler)
    return LoadedStudent(parts, steps, "merged", facts)


def merged_weights(
    first: nn.Module, second: nn.Module, weight: float, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """State dict of weight * first + (1 - weight) * second, computed in float64 and rounded to `dtype`.

    The tensors have the first one's dtype. Both networks must be of one architecture.
    """
    others = second.state_dict()
    merged = {}
    for name, tensor in first.state_dict().items():
        value = interpolate(tensor, others[name], weight).to(dtype)
        if not bool(value.isfinite().all()):
            raise UserError(
                f"With weight {weight:g} the merged {name} is not finite in "
                f"{str(dtype).removeprefix('torch.')}. Take a weight nearer to [0, 1]."
            )
        merged[name] = value.to(tensor.dtype)
    return merged


def interpolate(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """weight * first + (1 - weight) * second in float64; the tensors themselves at the ends 1 and 0."""
    if weight == 1:  # the sum would make +0 of -0
        return first
    if weight == 0:
        return second
    # theta = lambda theta_A + (1 - lambda) theta_B                        SwiftBrush v2, arXiv 2408.14176
    mixed = weight * first.double() + (1 - weight) * second.double()
    # equal weights stay as they are, the sign of zero included, however far lambda is from [0, 1]
    return torch.where(first == second, first.double(), mixed)


def check_mergeable(first: LoadedStudent, second: LoadedStudent) -> Steps:
    """The steps of the merged student, if the two can be merged at all.

    Warns where a difference is harmless: another autoencoder of the same latent scale, another picture size
    (the first one's is kept), a multi-step model that takes the other's start timestep.

    Raises:
        UserError: architecture (names the first weight or setting), prediction type, steps, noise
            schedule, text encoder, tokenizer or scale of the latents differ.
    """
    steps = _steps(first, second)
    odd = mismatch(first.parts, second.parts, steps.start, _WORDS)
    odd = odd or _other_text(first, second) or _other_latents(first, second)
    if odd is not None:
        raise UserError(
            f"The two models can't be merged: {odd}. A mixture of their weights means something only if all "
            "but the weights of the network is the same."
        )
    sizes = [side.parts.latent_shape[1] for side in (first, second)]
    if sizes[0] != sizes[1]:
        _warn(
            f"The models are for latents of {sizes[0]} (first) and {sizes[1]} (second) per side; "
            "the merged one is for the first's."
        )
    if found := _other_weights(first.parts.vae, second.parts.vae):
        _warn(f"The two models have different autoencoders (vae): {found}. The merged one keeps the first's.")
    return steps


def _steps(first: LoadedStudent, second: LoadedStudent) -> Steps:
    """Where both are called; a plain multi-step folder (no facts) is called wherever the other is."""
    own = [side.steps for side in (first, second) if side.facts] or [first.steps, second.steps]
    if own[0].start != own[-1].start:
        raise UserError(
            f"The first model starts at timestep {own[0].start}, the second at {own[1].start}: their weights "
            "answer different questions. Merge students that were trained with one start_timestep."
        )
    if own[0] != own[-1]:
        raise UserError(
            f"The first model is called at {list(own[0].timesteps)} with {own[0].noise} noise, the second at "
            f"{list(own[1].timesteps)} with {own[1].noise} noise: merge students of the same steps."
        )
    for word, side in zip(_WORDS, (first, second), strict=True):
        if side.start_timestep != own[0].start:
            _warn(
                f"The {word} model is a multi-step model without a start timestep of its own; "
                f"it is started at {own[0].start}, as the other one."
            )
    return own[0]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)  # where the merging was asked for


def _other_text(first: LoadedStudent, second: LoadedStudent) -> str | None:
    """The first thing that makes prompts reach the two networks in different ways."""
    encoders = zip(first.parts.text_encoders, second.parts.text_encoders, strict=True)
    tokenizers = zip(first.parts.tokenizers, second.parts.tokenizers, strict=True)
    for texts, words in zip(encoders, tokenizers, strict=True):
        settings = [_text_settings(text, word) for text, word in zip(texts, words)]
        if odd := other_value(settings[0], settings[1], _WORDS) or _other_weights(*texts):
            return f"they have different text encoders, where {odd}"
    return None


def _text_settings(encoder: Any, tokenizer: Any) -> dict[str, Any]:
    """What else than weights decides how text is encoded."""
    config = encoder.config
    return {
        "model_max_length (tokenizer)": tokenizer.model_max_length,
        "the hash of the vocabulary": hash_json(tokenizer.get_vocab())[:12],
        "hidden_act": getattr(config, "hidden_act", None) or getattr(config, "feed_forward_proj", None),
        "use_attention_mask": bool(getattr(config, "use_attention_mask", False)),
    }


def _other_latents(first: LoadedStudent, second: LoadedStudent) -> str | None:
    names = ("latent_channels", "scaling_factor", "shift_factor")
    sides = [{n: side.parts.vae.config.get(n) for n in names} for side in (first, second)]
    odd = other_value(sides[0], sides[1], _WORDS)
    return odd and f"their autoencoders (vae) have different latents, where {odd}"


def _other_weights(first: nn.Module, second: nn.Module) -> str | None:
    """The first weight that differs by more than a rounding to half precision."""
    weights = [side.state_dict() for side in (first, second)]
    if odd := difference(weights[0], weights[1], _WORDS):
        return odd
    for name, tensor in weights[0].items():
        if not torch.allclose(tensor, weights[1][name], rtol=_HALF_ROUNDING, atol=1e-6):
            return f"{name} differs by up to {(tensor - weights[1][name]).abs().max():.2g}"
    return None


def stored_dtype(path: str) -> torch.dtype:
    """The dtype a model's network is stored in: float16, bfloat16, or float32 for everything else."""
    if is_checkpoint(path):
        return torch.float32  # trained weights are
    model = find_model(path)
    folder = Path(model.name)
    name = backbone_of(read_json(folder / "model_index.json"), folder).denoiser[0]
    files = weight_files(folder / name, model.variant)
    dtypes = {tensor.dtype for file in files for tensor in read_weights(file).values()}
    return next((half for half in (torch.float16, torch.bfloat16) if dtypes == {half}), torch.float32)
