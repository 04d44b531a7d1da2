"""`export`: a training checkpoint becomes a complete diffusers pipeline folder."""

import argparse
from pathlib import Path

from lightning_modules.networks.export import DTYPES, export_student
from lightning_modules.networks.student import load_student, resolve_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `export`."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a .ckpt file, or best or last: that of the newest distillation under runs/",
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


def run(options: argparse.Namespace) -> None:
    """Write the folder and print the snippet that uses it.

    Raises:
        UserError: the checkpoint is missing or not one of ours, or the output can't be written.
    """
    checkpoint = resolve_checkpoint(options.checkpoint)
    if options.checkpoint in ("best", "last"):
        print(f"Newest {options.checkpoint}.ckpt: {checkpoint}")
    student = load_student(checkpoint, options.weights)
    folder = export_student(
        student.parts.denoiser,
        student.parts,
        student.start_timestep,
        options.output,
        DTYPES[options.dtype],
        student.facts,
    )
    print(
        f"Exported the {student.weights} weights to {folder}. Use them with\n"
        f'  pipe = DiffusionPipeline.from_pretrained("{options.output}")\n'
        "  pipe(prompt, num_inference_steps=1, guidance_scale=1.0)"
    )
