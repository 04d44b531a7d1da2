"""The student at the start of training: a copy of the teacher, or any one-step model that fits it."""

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from common.errors import UserError
from lightning_modules.networks.loading import TextToImageParts, noise_schedule
from lightning_modules.networks.lora import LoraSettings, StudentBase, add_adapter
from lightning_modules.networks.student import architecture, load_student
from lightning_modules.networks.weights import content_hash, difference, other_value


def make_student(
    parts: TextToImageParts,
    teacher: str,
    start_timestep: int,
    init: str | None = None,
    lora: LoraSettings | None = None,
) -> tuple[nn.Module, StudentBase | None]:
    """The network to train, in float32, and for a LoRA student the frozen weights under it.

    Args:
        parts: the teacher's, without adapters; not changed.
        teacher: the name the parts were read by.
        start_timestep: T of the run.
        init: one-step model to start from (a .ckpt, an export, a diffusers folder); None: the teacher.
        lora: train an adapter of this kind on frozen weights; None: train all weights.

    Raises:
        UserError: ``init`` can't be read, or doesn't fit the teacher; names the first difference.
    """
    if init is None:
        student: nn.Module = copy.deepcopy(parts.denoiser)
    else:
        loaded = load_student(init)
        # students of this project start at one timestep; any other model is taken to know its whole schedule
        if loaded.facts and loaded.start_timestep != start_timestep:
            found: str | None = f"it starts at timestep {loaded.start_timestep}, this run at {start_timestep}"
        else:
            found = mismatch(loaded.parts, parts, start_timestep, ("student", "teacher"))
        if found:
            raise UserError(
                f"student_init {init} does not fit the teacher {teacher}: {found}. Give a one-step model of "
                "the teacher's architecture, prediction type and schedule, and its start_timestep."
            )
        student = loaded.parts.denoiser
    student.requires_grad_(True).train()
    if lora is None:
        return student, None
    base = StudentBase(init or teacher, content_hash(student))
    add_adapter(student, lora)
    return student, base


def mismatch(
    own: TextToImageParts, wanted: TextToImageParts, start_timestep: int, words: tuple[str, str]
) -> str | None:
    """The first thing that makes the weights of two networks those of different functions, in words.

    Args:
        own, wanted: the models.
        start_timestep: both must know it.
        words: what the two are called in the sentence.
    """
    if found := difference(own.denoiser.state_dict(), wanted.denoiser.state_dict(), words):
        return found
    if odd := other_value(_settings(own.denoiser), _settings(wanted.denoiser), words):
        return odd
    sides = [noise_schedule(parts.scheduler) for parts in (own, wanted)]
    if odd := other_value(*({"prediction_type": side.prediction_type} for side in sides), words):
        return odd
    shared = min(side.num_timesteps for side in sides)  # an export's schedule ends where it starts
    if shared <= start_timestep:
        return f"one schedule has {shared} timesteps, start_timestep is {start_timestep}"
    bars = [side.alpha[:shared].square() for side in sides]
    close = torch.isclose(*bars, rtol=1e-3, atol=1e-5)
    if bool(close.all()):
        return None
    t = int((~close).nonzero()[0])
    return other_value(*({f"alpha_bar at timestep {t}": f"{bar[t]:.4g}"} for bar in bars), words)


def _settings(network: nn.Module) -> dict[str, Any]:
    """The settings that change the network's function; an absent one is false, 8 for every block is 8."""
    settings = architecture(network)
    settings.pop("upcast_attention", None)  # an old remedy for float16
    if isinstance(network, UNet2DConditionModel):
        settings.pop(
            "sample_size"
        )  # of pictures by default; that of a transformer changes its position codes
    for name, value in settings.items():
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        settings[name] = value or False
    return settings
