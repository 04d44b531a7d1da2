"""`export`: a training checkpoint, or a network that others trained, becomes a complete diffusers folder."""

import argparse
from pathlib import Path

from common.errors import UserError
from lightning_modules.networks.cards import run_sections
from lightning_modules.networks.network_file import is_network_file, load_network_file
from lightning_modules.networks.pipeline_folder import DTYPES, LORA, export_student, one_step_call
from lightning_modules.networks.student import LoadedStudent, load_student, resolve_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `export`."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a .ckpt file, or best or last: that of the newest distillation under runs/; or a network alone "
        "(.safetensors, .bin), as DMD2 publishes it, with --base and --start-timestep",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder to write; a former export is replaced"
    )
    parser.add_argument(
        "--weights",
        choices=["ema", "online"],
        help="averaged or last weights (default: ema if the run had it)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the written weights")
    parser.add_argument("--base", help="for a network alone: the model whose other parts it needs")
    parser.add_argument(
        "--start-timestep", type=int, help="for a network alone: where it starts, e.g. 399 for DMD2's SDXL"
    )


def run(options: argparse.Namespace) -> None:
    """Write the folder and print the snippet that uses it.

    Raises:
        UserError: the checkpoint is missing or not one of ours, or the output can't be written.
    """
    student, sections = _student(options)
    folder = export_student(
        student.parts.denoiser,
        student.parts,
        student.start_timestep,
        options.output,
        DTYPES[options.dtype],
        student.facts,
        student.adapter,
        sections,
    )
    print(
        f"Exported the {student.weights} weights to {folder}. Use them with\n"
        f'  pipe = DiffusionPipeline.from_pretrained("{options.output}")\n'
        f"  pipe(prompt, {one_step_call(student.parts)})"
    )
    if student.adapter is not None:
        print(f"The LoRA by itself is in {options.output / LORA}; README.md says how to load it.")


def _student(options: argparse.Namespace) -> tuple[LoadedStudent, str]:
    """What is to be exported, and what the card says of the run that trained it."""
    alone = (options.base, options.start_timestep)
    if not is_network_file(options.checkpoint):
        if alone != (None, None):
            raise UserError("--base and --start-timestep are for a network alone (.safetensors, .bin).")
        checkpoint = resolve_checkpoint(options.checkpoint)
        if options.checkpoint in ("best", "last"):
            print(f"Newest {options.checkpoint}.ckpt: {checkpoint}")
        student = load_student(checkpoint, options.weights)
        return student, run_sections(checkpoint, student.facts)
    if None in alone:
        raise UserError(f"{options.checkpoint} is a network alone: give --base MODEL and --start-timestep T.")
    if options.weights is not None:
        raise UserError(f"{options.checkpoint} has one set of weights; leave --weights out.")
    network = resolve_checkpoint(options.checkpoint)
    return load_network_file(network, options.base, options.start_timestep), ""
