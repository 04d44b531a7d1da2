"""What an evaluation looks at: pictures drawn by a checkpoint or a pipeline folder, or given ones."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from callbacks.hashing import hash_folder, hash_texts
from callbacks.measure import Draw, Generate
from datamodules.picture_files import Frame, read_pictures
from lightning_modules.commands.generate import has_few_step_sampler
from lightning_modules.errors import UserError, first_line
from lightning_modules.generator import make_generator, pipeline_images, stock_pipeline
from lightning_modules.networks.loading import asset_path, pipeline_folder, read_json
from lightning_modules.networks.student import Weights, is_checkpoint, load_student

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Drawer:
    """Where the pictures come from.

    Attributes:
        draw: places in the list of captions to pictures.
        title: for the table. ``model``: what the user named.
        weights: "ema", "online", "as stored" or "given pictures".
        step: student updates, where they are known.
        identity: all that the pictures depend on beside captions and seeds, for manifest and resuming.
        seeded: whether seeds mean anything.
    """

    draw: Draw
    title: str
    model: str
    weights: str
    step: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    seeded: bool = True


def given_pictures(folder: str, files: Sequence[Path], frame: Frame | None) -> Drawer:
    """Existing pictures, one for each caption; crop and resize happen as they are read."""
    root = Path(folder)
    facts = [f"{path.relative_to(root)} {path.stat().st_size}" for path in files]
    return Drawer(
        draw=lambda places: read_pictures([files[i] for i in places], frame),
        title=f"pictures in {root.name or root}",
        model=folder,
        weights="given pictures",
        identity={"folder": root.name, "count": len(files), "hash_of_names_and_sizes": hash_texts(facts)},
        seeded=False,
    )


def model_drawer(
    model: str,
    captions: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    weights: Weights | None,
    dtype: str,
    device: torch.device,
) -> Drawer:
    """Pictures of a checkpoint, an exported folder, or a stock pipeline at chosen steps and guidance.

    One step of a Stable Diffusion is taken by our generator (from the student's start, or the last timestep
    of a stock folder); more steps, and other pipelines, by the stock pipeline with the folder's own sampler.

    Args:
        model: a .ckpt file, a folder or a hub name.
        captions, seeds: the evaluation's.
        steps: network steps; guidance_scale: kappa form, 1 is off.
        weights: which of a checkpoint's.
        dtype: "float32", or "bfloat16": the networks run under autocast.
        device: where.

    Raises:
        UserError: the model can't be loaded, or an option does not fit it.
    """
    generate, facts = _open(model, steps, guidance_scale, weights, device)
    precision = DTYPES[dtype]

    def draw(places: list[int]) -> Tensor:
        autocast = nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=precision)
        with torch.no_grad(), autocast:
            return generate([captions[i] for i in places], [seeds[i] for i in places]).float()

    name = Path(model).name if not is_checkpoint(model) else Path(model).stem
    guided = f", guidance {guidance_scale:g}" if guidance_scale != 1 else ""
    return Drawer(
        draw=draw,
        title=f"{name}, {steps} step{'' if steps == 1 else 's'}{guided}",
        model=model,
        weights=facts.pop("weights"),
        step=facts.pop("student_steps", None),
        identity=facts
        | {"steps": steps, "guidance_scale": guidance_scale, "dtype": dtype, "hash": _content_hash(model)},
    )


def _open(
    model: str, steps: int, guidance_scale: float, weights: Weights | None, device: torch.device
) -> tuple[Generate, dict[str, Any]]:
    """How to draw with a model, and what is known of it."""
    if not is_checkpoint(model) and not _is_stable_diffusion(model):
        pipeline = _any_pipeline(model, weights).to(device)
        return _stock(pipeline, steps, guidance_scale), _sampler_of(pipeline) | {"weights": "as stored"}
    student = load_student(model, weights)
    facts: dict[str, Any] = {"weights": student.weights, "student_steps": student.facts.get("student_steps")}
    if steps > 1 or has_few_step_sampler(student.parts.scheduler):
        pipeline = stock_pipeline(student.parts).to(device)
        return _stock(pipeline, steps, guidance_scale), facts | _sampler_of(pipeline)
    generator = make_generator(student.parts, student.start_timestep).eval().to(device)

    def one_step(prompts: list[str], seeds: list[int]) -> Tensor:
        return generator.images(prompts, seeds, guidance_scale=guidance_scale)

    return one_step, facts | {"sampler": "one step", "start_timestep": student.start_timestep}


def _stock(pipeline: DiffusionPipeline, steps: int, guidance_scale: float) -> Generate:
    return lambda prompts, seeds: pipeline_images(pipeline, prompts, seeds, steps, guidance_scale)


def _sampler_of(pipeline: DiffusionPipeline) -> dict[str, str]:
    return {"sampler": type(pipeline.scheduler).__name__}


def _is_stable_diffusion(model: str) -> bool:
    index = read_json(pipeline_folder(model) / "model_index.json")
    return bool(index.get("_class_name", "StableDiffusionPipeline") == "StableDiffusionPipeline")


def _any_pipeline(model: str, weights: Weights | None) -> DiffusionPipeline:
    if weights is not None:
        raise UserError(f"{model} is a folder, which has one set of weights; leave --weights out")
    try:
        pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(model))
    except UserError:
        raise
    except Exception as error:  # loaders raise many kinds; the cause stays attached
        raise UserError(f"the pipeline {model} can't be loaded: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _content_hash(model: str) -> str:
    """Of a checkpoint file or a model folder."""
    if is_checkpoint(model):
        with asset_path(model).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hash_folder(pipeline_folder(model))
