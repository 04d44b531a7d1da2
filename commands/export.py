"""`export`: a training checkpoint, or a network that others trained, becomes a complete diffusers folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import NonNegativeInt

from common.errors import UserError

if TYPE_CHECKING:
    from lightning_modules.networks.cards import RunNotes
    from lightning_modules.networks.student import LoadedStudent


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `export`.

    Args:
        checkpoint: a .ckpt file, or best or last, that of the newest distillation under runs/; or a network
            alone (.safetensors, .bin), as DMD2 publishes it, with --base and --start-timestep
        output: folder to write; a former export is replaced
        weights: averaged or last weights (ema if the run had it)
        dtype: of the written weights
        base: for a network alone, the model whose other parts it needs
        start_timestep: for a network alone, where it starts, e.g. 399 for DMD2's SDXL
    """

    checkpoint: str
    output: Path
    weights: Literal["ema", "online"] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    base: str | None = None
    start_timestep: NonNegativeInt | None = None


def run(options: Options) -> None:
    """Write the folder and print the snippet that uses it.

    Raises:
        UserError: the checkpoint is missing or not one of ours, or the output can't be written.
    """
    import torch

    from lightning_modules.networks.pipeline_folder import LORA, export_student, load_words, one_step_call

    student, notes = _student(options)
    folder = export_student(
        student.parts.denoiser, student.parts, student.start_timestep, options.output,
        getattr(torch, options.dtype), student.facts, student.adapter, notes,
    )  # fmt: skip
    print(
        f"Exported the {student.weights} weights to {folder}. Use them with\n"
        f'  pipe = DiffusionPipeline.from_pretrained("{options.output}"{load_words(student.parts)})\n'
        f"  pipe(prompt, {one_step_call(student.parts)})"
    )
    if student.adapter is not None:
        print(f"The LoRA by itself is in {options.output / LORA}; README.md says how to load it.")


def _student(options: Options) -> tuple["LoadedStudent", "RunNotes"]:
    """What is to be exported, and what the card says of the run that trained it."""
    from lightning_modules.networks.cards import RunNotes, run_notes
    from lightning_modules.networks.student import (
        is_network_file,
        load_network_file,
        load_student,
        resolve_checkpoint,
    )

    name, alone = options.checkpoint, (options.base, options.start_timestep)
    if not is_network_file(name):
        if alone != (None, None):
            raise UserError("--base and --start-timestep are for a network alone (.safetensors, .bin).")
        checkpoint = resolve_checkpoint(name)
        if name in ("best", "last"):
            print(f"Newest {name}.ckpt: {checkpoint}")
        student = load_student(checkpoint, options.weights)
        return student, run_notes(checkpoint, student.facts)
    if options.base is None or options.start_timestep is None:
        raise UserError(f"{name} is a network alone: give --base MODEL and --start-timestep T.")
    if options.weights is not None:
        raise UserError(f"{name} has one set of weights; leave --weights out.")
    return load_network_file(resolve_checkpoint(name), options.base, options.start_timestep), RunNotes()
