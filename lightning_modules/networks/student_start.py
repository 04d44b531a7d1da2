"""The student at the start of training: a copy of the teacher, or any one-step model that fits it."""

import copy
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from common.errors import UserError
from lightning_modules.networks.loading import TextToImageParts, noise_schedule
from lightning_modules.networks.lora import LoraSettings, StudentBase, add_adapter
from lightning_modules.networks.student import LoadedStudent, architecture, load_student
from lightning_modules.networks.weights import content_hash, difference

# Settings of a UNet that change no formula: the default size of pictures, and an old remedy for float16.
_HARMLESS = {"sample_size", "upcast_attention"}


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
        if found := mismatch(loaded, parts, start_timestep):
            raise UserError(f"student_init {init} does not fit the teacher {teacher}: {found}")
        student = loaded.parts.denoiser
    student.requires_grad_(True).train()
    if lora is None:
        return student, None
    base = StudentBase(init or teacher, content_hash(student))
    add_adapter(student, lora)
    return student, base


def mismatch(student: LoadedStudent, teacher: TextToImageParts, start_timestep: int) -> str | None:
    """The first thing in which a student differs from what training it by this teacher needs, in words.

    Students of this project start at one timestep; any other model is taken to know all of its schedule.
    """
    words = ("student", "teacher")
    if found := difference(student.parts.denoiser.state_dict(), teacher.denoiser.state_dict(), words):
        return f"{found}; give a model of the teacher's architecture"
    # the size of a transformer changes its position codes
    harmless = _HARMLESS if isinstance(teacher.denoiser, UNet2DConditionModel) else set()
    if odd := other_setting(student.parts.denoiser, teacher.denoiser, harmless):
        return (
            f"its network has {odd.name} {odd.own}, the teacher's {odd.wanted}; give a model of the "
            "teacher's architecture"
        )
    own, wanted = noise_schedule(student.parts.scheduler), noise_schedule(teacher.scheduler)
    if own.prediction_type != wanted.prediction_type:
        return (
            f"the student predicts {own.prediction_type!r}, the teacher {wanted.prediction_type!r}; give one "
            "with the teacher's prediction_type"
        )
    if student.facts and student.start_timestep != start_timestep:
        return (
            f"the student starts at timestep {student.start_timestep}, this run at {start_timestep}; set "
            f"start_timestep to {student.start_timestep}"
        )
    if own.num_timesteps <= start_timestep:
        return f"the student's schedule has {own.num_timesteps} timesteps, start_timestep is {start_timestep}"
    shared = min(own.num_timesteps, wanted.num_timesteps)  # an export's schedule ends where it starts
    sides = (own.alpha[:shared].square(), wanted.alpha[:shared].square())
    close = torch.isclose(*sides, rtol=1e-3, atol=1e-5)
    if not bool(close.all()):
        t = int((~close).nonzero()[0])
        return (
            f"at timestep {t} the student's schedule has alpha_bar {sides[0][t]:.4g}, the teacher's "
            f"{sides[1][t]:.4g}; give a model trained with the teacher's schedule"
        )
    return None


class OtherSetting(NamedTuple):
    """A setting of two networks."""

    name: str
    own: Any
    wanted: Any


def other_setting(own: nn.Module, wanted: nn.Module, harmless: set[str]) -> OtherSetting | None:
    """The first setting, harmless ones apart, that makes the same weights another function."""
    sides = architecture(own), architecture(wanted)
    for name in sorted((sides[0].keys() | sides[1].keys()) - harmless):
        values = [side.get(name) for side in sides]
        if _plain(values[0]) != _plain(values[1]):
            return OtherSetting(name, *values)
    return None


def _plain(value: Any) -> Any:
    """One way to say the same: an absent setting counts as false, 8 for every block as 8."""
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        value = value[0]
    return value or None
