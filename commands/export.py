"""`export`: a training checkpoint, or a network that others trained, becomes a complete diffusers folder."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from common.errors import UserError, first_line
from common.files import asset_path

if TYPE_CHECKING:
    from lightning_modules.networks.cards import RunNotes
    from lightning_modules.networks.student import LoadedStudent


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `export`.

    Args:
        checkpoint: a run folder (its best.ckpt, else last.ckpt), a .ckpt file, best or last (of the newest
            finished run under runs/), or an exported folder; or a network alone (.safetensors, .bin), as DMD2
            publishes it, with --base and --start-timestep or --timesteps
        output: folder to write; a former export is replaced
        weights: averaged or last weights (ema if the run had it)
        dtype: of the written weights
        base: for a network alone, the model whose other parts it needs
        start_timestep: for a network alone of one step, where it takes it, e.g. 399 for DMD2's SDXL
        timesteps: for a network alone of several steps, where it takes them, e.g. '[999, 749, 499, 249]'
        step_noise: for a network alone of several steps, what comes between them: fresh noise (DMD2, LCM,
            Flash), or none (SDXL-Lightning, Hyper-SD by DDIM)
        prediction_type: for a network alone, what it predicts (as the base; sample is x0, as SDXL-Lightning's
            one-step network)
        schedule: for a network alone, a scheduler_config.json (the base's)
        teacher: of a checkpoint, where its teacher lies now (where it was in training)
        steps: in how many of its steps the student draws, of those it was trained for (all); one that takes
            their number as a condition becomes a stock network for this number
        push_to_hub: also upload the folder to this model of the Hugging Face hub, owner/name; one that is not
            there yet is made private
    """

    checkpoint: str
    output: Path
    weights: Literal["ema", "online"] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    base: str | None = None
    start_timestep: NonNegativeInt | None = None
    timesteps: list[NonNegativeInt] | None = None
    step_noise: Literal["fresh", "none"] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    schedule: Path | None = None
    teacher: str | None = None
    steps: PositiveInt | None = None
    push_to_hub: str | None = None


def run(options: Options) -> None:
    """Write the folder and print the snippet that uses it.

    Raises:
        UserError: the checkpoint is missing or not one of ours, or the output can't be written.
    """
    import torch

    from lightning_modules.networks.pipeline_folder import LORA, export_student, load_words, student_call

    if options.push_to_hub is not None:
        check_hub(options.push_to_hub)
    student, notes = _student(options)
    if options.steps is not None:
        student.steps = student.steps.fewer(options.steps)
    folder = export_student(
        student.parts.denoiser, student.parts, student.steps, options.output,
        getattr(torch, options.dtype), student.facts, student.adapter, notes,
        options.push_to_hub,
    )  # fmt: skip
    print(
        f"Exported the {student.weights} weights to {folder}. Use them with\n"
        f'  pipe = DiffusionPipeline.from_pretrained("{options.output}"{load_words(student.parts)})\n'
        f"  pipe(prompt, {student_call(student.parts, student.steps)})"
    )
    if student.adapter is not None:
        print(f"The LoRA by itself is in {options.output / LORA}; README.md says how to load it.")
    if options.push_to_hub is not None:
        push(folder, options.push_to_hub)


def check_hub(name: str) -> None:
    """Make sure, before any work, that the name is one of the hub and that somebody is logged in."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--push-to-hub {name} is no name of the hub: give owner/name.")
    try:
        HfApi().whoami(token=True)
    except LocalTokenNotFoundError as error:
        raise UserError("--push-to-hub needs a login: run `hf auth login` first, or set HF_TOKEN.") from error
    except Exception as error:  # the hub client raises many kinds; the cause stays attached
        raise UserError(
            f"--push-to-hub: the hub can't be asked: {first_line(error)} Check the token."
        ) from error


def push(folder: Path, name: str) -> None:
    """Upload an exported folder; a new model of the hub is private."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="One-step student")
    except Exception as error:  # as above
        raise UserError(
            f"{folder} is written, but can't be pushed to {name}: {first_line(error)} "
            f"Go on with `hf upload {name} {folder}`."
        ) from error
    print(f"Pushed to https://huggingface.co/{name}")


def _student(options: Options) -> tuple["LoadedStudent", "RunNotes"]:
    """What is to be exported, and what the card says of the run that trained it."""
    from lightning_modules.diffusion.steps import as_steps
    from lightning_modules.networks.cards import RunNotes, run_notes
    from lightning_modules.networks.pipeline_folder import is_own_export
    from lightning_modules.networks.student import (
        is_checkpoint,
        is_network_file,
        load_network_file,
        load_student,
        resolve_checkpoint,
        student_path,
    )

    name = options.checkpoint
    places = (options.start_timestep, options.timesteps, options.step_noise)
    if not is_network_file(name):
        if any(
            value is not None for value in (options.base, options.prediction_type, options.schedule, *places)
        ):
            raise UserError(
                "--base, --start-timestep, --timesteps, --step-noise, --prediction-type and --schedule are "
                "for a network alone (.safetensors, .bin, .pt)."
            )
        path = student_path(name)
        if not is_checkpoint(path) and not is_own_export(asset_path(path)):
            path = str(resolve_checkpoint(path))  # which is not there, or no student
        student = load_student(path, options.weights, options.teacher)
        return student, run_notes(Path(path), student.facts) if is_checkpoint(path) else RunNotes()
    if options.base is None or (options.start_timestep is None) == (options.timesteps is None):
        raise UserError(
            f"{name} is a network alone: give --base MODEL and --start-timestep T, or --timesteps of several "
            "steps."
        )
    if options.step_noise is not None and options.timesteps is None:
        raise UserError("--step-noise has no effect with one step: give --timesteps, or leave it out.")
    if options.weights is not None or options.teacher is not None:
        raise UserError(f"{name} has one set of weights and no teacher; leave --weights and --teacher out.")
    steps = as_steps(options.timesteps or options.start_timestep or 0, options.step_noise or "fresh")
    student = load_network_file(
        resolve_checkpoint(name), options.base, steps, options.prediction_type, options.schedule
    )
    return student, RunNotes()
