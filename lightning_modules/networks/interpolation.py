"""Weight interpolation of two students of one architecture: theta = lambda theta_A + (1 - lambda) theta_B.

(SwiftBrush v2, arXiv 2408.14176, which merges a full and a LoRA student with lambda = 0.5.)
"""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.networks.backbones import backbone_of
from lightning_modules.networks.loading import find_model, noise_schedule, read_json, weight_files
from lightning_modules.networks.pipeline_folder import one_step_scheduler
from lightning_modules.networks.student import LoadedStudent, is_checkpoint
from lightning_modules.networks.student_start import other_setting

_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
_HALF_ROUNDING = 2.0**-8  # of bfloat16, the coarser one: copies of one network differ by that at most


def merge_students(
    first: LoadedStudent, second: LoadedStudent, weight: float, dtype: torch.dtype = torch.float32
) -> LoadedStudent:
    """The student weight * first + (1 - weight) * second, with the first one's other parts.

    A model without a start timestep of its own (a multi-step teacher) takes that of the other.

    Args:
        first: as `load_student` gives it; not changed.
        second: the same.
        weight: lambda; 1 is the first bit for bit and 0 the second, outside [0, 1] extrapolates (warned).
        dtype: the merged weights are rounded to it (and held in float32), so that a later export in this
            dtype loses nothing. See `stored_dtype`.

    Raises:
        UserError: the weight is not finite, the models do not fit together (see `check_mergeable`), or a
            merged weight is not finite.
    """
    check_weight(weight)
    if not 0 <= weight <= 1:
        warnings.warn(
            f"The merging weight {weight:g} lies outside [0, 1]: that extrapolates beyond both models.",
            stacklevel=2,
        )
    start = check_mergeable(first, second)
    student = copy.deepcopy(first.parts.denoiser)
    student.load_state_dict(merged_weights(first.parts.denoiser, second.parts.denoiser, weight, dtype))
    scheduler = one_step_scheduler(first.parts.scheduler, start)
    facts = {
        "teacher": first.facts.get("teacher", first.parts.path),
        "weights": "merged",
        "merged": f"{weight:g} * first + {1 - weight:g} * second",
        "merge_weight": weight,
        **_origin("first", first),
        **_origin("second", second),
    }
    parts = replace(first.parts, denoiser=student, scheduler=scheduler)
    return LoadedStudent(parts, start, "merged", facts)


def merged_weights(
    first: nn.Module, second: nn.Module, weight: float, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """State dict of weight * first + (1 - weight) * second, computed in float64 and rounded to `dtype`.

    The tensors have the first one's dtype. Both networks must be of one architecture.

    Raises:
        UserError: a merged weight is not finite; names the first.
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


def check_weight(weight: float) -> None:
    """Refuse a lambda that is not finite.

    Raises:
        UserError: it is NaN or infinite.
    """
    if not math.isfinite(weight):
        raise UserError(f"The merging weight is {weight}; it must be a finite number, as a rule from 0 to 1.")


# --- what fits together -------------------------------------------------------------------------------


def check_mergeable(first: LoadedStudent, second: LoadedStudent) -> int:
    """The start timestep of the merged student, if the two can be merged at all.

    Warns where a difference is harmless: another autoencoder of the same latent scale, another picture size
    (the first one's is kept), a multi-step model that takes the other's start timestep.

    Raises:
        UserError: architecture (names the first weight or setting), prediction type, start timestep, noise
            schedule, text encoder, tokenizer or scale of the latents differ.
    """
    _check_architecture(first, second)
    kinds = [side.parts.scheduler.config.get("prediction_type", "epsilon") for side in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"The first model predicts {kinds[0]}, the second {kinds[1]} (prediction_type in scheduler/"
            "scheduler_config.json), so a mixture of their weights means nothing. Merge models of one kind."
        )
    start = _start_timestep(first, second)
    tables = [noise_schedule(side.parts.scheduler).alphas_cumprod[: start + 1] for side in (first, second)]
    if len(tables[0]) != len(tables[1]) or not torch.allclose(tables[0], tables[1], 1e-4, 0.0):
        raise UserError(
            f"The two models have different noise schedules up to timestep {start}: alphas_cumprod ends in "
            f"{tables[0][-1]:.4g} for the first and {tables[1][-1]:.4g} for the second. "
            "Merge models that were trained with one schedule."
        )
    _check_text(first, second)
    _check_autoencoder(first, second)
    return start


def _start_timestep(first: LoadedStudent, second: LoadedStudent) -> int:
    """Where both start; a plain multi-step folder (no facts) starts wherever the other does."""
    students = [side for side in (first, second) if side.facts] or [first, second]
    starts = [side.start_timestep for side in students]
    if len(set(starts)) > 1:
        raise UserError(
            f"The first model starts at timestep {starts[0]}, the second at {starts[1]}: their weights "
            "answer different questions. Merge students that were trained with one start_timestep."
        )
    for word, side in (("first", first), ("second", second)):
        if side.start_timestep != starts[0]:
            warnings.warn(
                f"The {word} model is a multi-step model without a start timestep of its own; "
                f"it is started at {starts[0]}, as the other one.",
                stacklevel=4,
            )
    return starts[0]


def _check_architecture(first: LoadedStudent, second: LoadedStudent) -> None:
    networks = [side.parts.denoiser for side in (first, second)]
    shapes = [{name: list(tensor.shape) for name, tensor in net.state_dict().items()} for net in networks]
    sizes = [network.config.sample_size for network in networks]
    odd = _first_difference(*shapes)
    if odd is None and (
        found := other_setting(networks[0], networks[1], {"sample_size", "upcast_attention"})
    ):
        odd = f"{found.name} is {found.own} in the first and {found.wanted} in the second"
    if odd is not None:
        raise UserError(
            f"The two networks are of different architectures: {odd}. "
            "Only models of one architecture can be merged."
        )
    if sizes[0] != sizes[1]:
        warnings.warn(
            f"The models are for latents of {sizes[0]} (first) and {sizes[1]} (second) per side; "
            "the merged one is for the first's.",
            stacklevel=4,
        )


def _check_text(first: LoadedStudent, second: LoadedStudent) -> None:
    """Raise if prompts reach the two networks in different ways."""
    encoders = zip(first.parts.text_encoders, second.parts.text_encoders, strict=True)
    tokenizers = zip(first.parts.tokenizers, second.parts.tokenizers, strict=True)
    for texts, words in zip(encoders, tokenizers, strict=True):
        odd = _first_difference(*map(_text_settings, texts, words))
        odd = odd or _first_unequal(*(encoder.state_dict() for encoder in texts))
        if odd is None and words[0].get_vocab() != words[1].get_vocab():
            odd = "the tokenizers have different vocabularies"
        if odd is not None:
            raise UserError(
                f"The two models have different text encoders: {odd}. "
                "Merge students that were distilled with one text encoder."
            )


def _text_settings(encoder: Any, tokenizer: Any) -> dict[str, Any]:
    """What else than weights and vocabulary decides how text is encoded."""
    config = encoder.config
    return {
        "model_max_length (tokenizer)": tokenizer.model_max_length,
        "hidden_act": getattr(config, "hidden_act", None) or getattr(config, "feed_forward_proj", None),
        "use_attention_mask": bool(getattr(config, "use_attention_mask", False)),
    }


def _check_autoencoder(first: LoadedStudent, second: LoadedStudent) -> None:
    vaes = [side.parts.vae for side in (first, second)]
    names = ("latent_channels", "scaling_factor", "shift_factor")
    if odd := _first_difference(*({name: vae.config.get(name) for name in names} for vae in vaes)):
        raise UserError(
            f"The autoencoders (vae) of the two models have different latents: {odd}. "
            "Merge models with one autoencoder."
        )
    if odd := _first_unequal(*(vae.state_dict() for vae in vaes)):
        warnings.warn(
            f"The two models have different autoencoders (vae): {odd}. The merged one keeps the first's.",
            stacklevel=4,
        )


def _first_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """The first name, in the first one's order, with another value in the second, as part of a sentence."""
    for name in dict.fromkeys([*first, *second]):
        values = [side.get(name, "missing") for side in (first, second)]
        if values[0] != values[1]:
            return f"{name} is {values[0]} in the first and {values[1]} in the second"
    return None


def _first_unequal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str | None:
    """As `_first_difference`, for weights, which may differ by a rounding to half precision."""
    shapes = [{name: list(tensor.shape) for name, tensor in side.items()} for side in (first, second)]
    if odd := _first_difference(*shapes):
        return odd
    for name, tensor in first.items():
        if not torch.allclose(tensor, second[name], rtol=_HALF_ROUNDING, atol=1e-6):
            return f"{name} differs by up to {(tensor - second[name]).abs().max():.2g}"
    return None


def _origin(word: str, student: LoadedStudent) -> dict[str, Any]:
    """What is known about one of the two, for the model card."""
    known = {"weights": student.weights, "student_steps": student.facts.get("student_steps")}
    return {f"{word}_{name}": value for name, value in known.items() if value is not None}


# --- what the user names ------------------------------------------------------------------------------


def stored_dtype(path: str) -> torch.dtype:
    """The dtype a model's network is stored in: float16, bfloat16, or float32 for everything else.

    Raises:
        UserError: it is no model folder.
    """
    if is_checkpoint(path):
        return torch.float32  # trained weights are
    model = find_model(path)
    folder = Path(model.name)
    name = backbone_of(read_json(folder / "model_index.json"), folder).denoiser[0]
    dtypes: set[torch.dtype | None] = set()
    for file in weight_files(folder / name, model.variant):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                dtypes |= {_HALVES.get(content.get_slice(key).get_dtype()) for key in content.keys()}  # noqa: SIM118
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            dtypes |= {tensor.dtype for tensor in weights.values()}
    return next((half for half in _HALVES.values() if dtypes == {half}), torch.float32)
