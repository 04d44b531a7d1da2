"""What an evaluation looks at: pictures drawn by a checkpoint or a pipeline folder, or given ones."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from callbacks.metrics.measure import Draw
from commands.generate import has_few_step_sampler, is_own_family, load_any_pipeline
from common.errors import UserError
from common.hashing import hash_file, hash_texts
from datamodules.picture_files import Frame, read_pictures
from lightning_modules.generator import make_generator, pipeline_images, stock_pipeline
from lightning_modules.guidance import negative_prompting
from lightning_modules.guidance.methods import METHODS, make_method
from lightning_modules.networks.loading import asset_path, model_hash
from lightning_modules.networks.student import Weights, is_checkpoint, load_student

GenerateWithNegatives = Callable[[list[str], list[int], list[str] | None], Tensor]
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


@dataclass(frozen=True)
class Recipe:
    """How a model draws.

    Attributes:
        model: a .ckpt file, a folder or a hub name.
        steps: network steps; guidance_scale: kappa form, 1 is off.
        weights: which of a checkpoint's; None: the average if there is one.
        dtype: "float32", or "bfloat16": the networks run under autocast.
        negative_guidance: what the negative prompts act by: none, nasa, nag (attention) or cfg (guidance).
        negative_scale: its strength, of cfg the guidance scale; None: the network's default.
    """

    model: str
    steps: int = 1
    guidance_scale: float = 1.0
    weights: Weights | None = None
    dtype: str = "float32"
    negative_guidance: str = "none"
    negative_scale: float | None = None

    def check(self, has_negatives: bool) -> None:
        """Refuse what would have no effect or no meaning.

        Raises:
            UserError: it says what to give instead.
        """
        if self.negative_guidance == "none":
            if self.negative_scale is not None:
                raise UserError("--negative_scale has no effect without --negative_guidance nasa, nag or cfg")
            return
        if not has_negatives:
            raise UserError(
                f"--negative_guidance {self.negative_guidance} needs negative prompts: give "
                "--negative_prompt, or a "
                "set of prompt pairs"
            )
        if self.guidance_scale != 1:
            raise UserError("--guidance_scale and --negative_guidance exclude each other; leave one out")
        if self.negative_guidance == "cfg" and (self.negative_scale is None or self.negative_scale <= 1):
            raise UserError("--negative_guidance cfg needs --negative_scale, a guidance scale above 1")

    @property
    def title(self) -> str:
        """For the table."""
        name = Path(self.model).stem if is_checkpoint(self.model) else Path(self.model).name
        parts = [name, f"{self.steps} step{'' if self.steps == 1 else 's'}"]
        if self.guidance_scale != 1:
            parts.append(f"guidance {self.guidance_scale:g}")
        if self.negative_guidance != "none":
            scale = "" if self.negative_scale is None else f" {self.negative_scale:g}"
            parts.append(f"negative prompts by {self.negative_guidance}{scale}")
        return ", ".join(parts)


def model_drawer(
    recipe: Recipe,
    captions: Sequence[str],
    seeds: Sequence[int],
    negatives: Sequence[str] | None,
    device: torch.device,
) -> Drawer:
    """Pictures of a checkpoint, an exported folder, or a stock pipeline at chosen steps and guidance.

    One step of a Stable Diffusion is taken by our generator (from the student's start, or the last timestep
    of a stock folder); more steps, and other pipelines, by the stock pipeline with the folder's own sampler.

    Args:
        recipe: the model and how it draws.
        captions, seeds: the evaluation's; negatives: the negative prompt of each caption, or None.
        device: where.

    Raises:
        UserError: the model can't be loaded, or an option does not fit it.
    """
    recipe.check(negatives is not None)
    generate, facts = _open(recipe, device)

    def draw(places: list[int]) -> Tensor:
        autocast = nullcontext()
        if recipe.dtype != "float32":
            autocast = torch.autocast(device.type, dtype=DTYPES[recipe.dtype])  # type: ignore[assignment]
        unwanted = None
        if negatives is not None and recipe.negative_guidance != "none":
            unwanted = [negatives[i] for i in places]
        with torch.no_grad(), autocast:
            return generate([captions[i] for i in places], [seeds[i] for i in places], unwanted).float()

    settings = {k: v for k, v in asdict(recipe).items() if k not in ("model", "weights")}
    return Drawer(
        draw=draw,
        title=recipe.title,
        model=recipe.model,
        weights=facts.pop("weights"),
        step=facts.pop("student_steps", None),
        identity=facts | settings | {"hash": _content_hash(recipe.model)},
    )


def _open(recipe: Recipe, device: torch.device) -> tuple[GenerateWithNegatives, dict[str, Any]]:
    """How to draw with a model, and what is known of it."""
    if not is_checkpoint(recipe.model) and not is_own_family(recipe.model):
        pipeline = _any_pipeline(recipe).to(device)
        return _stock(pipeline, recipe), _sampler_of(pipeline) | {"weights": "as stored"}
    student = load_student(recipe.model, recipe.weights)
    facts: dict[str, Any] = {"weights": student.weights, "student_steps": student.facts.get("student_steps")}
    if recipe.steps > 1 or has_few_step_sampler(student.parts.scheduler):
        pipeline = stock_pipeline(student.parts).to(device)
        return _stock(pipeline, recipe), facts | _sampler_of(pipeline)
    generator = make_generator(student.parts, student.start_timestep).eval().to(device)
    by_attention = recipe.negative_guidance in METHODS
    rule = (
        make_method(recipe.negative_guidance, generator.student, recipe.negative_scale)
        if by_attention
        else None
    )

    def one_step(prompts: list[str], seeds: list[int], negatives: list[str] | None) -> Tensor:
        return generator.images(
            prompts, seeds, guidance_scale=_kappa(recipe), negative_prompt=negatives, negative_method=rule
        )

    return one_step, facts | {"sampler": "one step", "start_timestep": student.start_timestep}


def _stock(pipeline: DiffusionPipeline, recipe: Recipe) -> GenerateWithNegatives:
    def draw(prompts: list[str], seeds: list[int], negatives: list[str] | None) -> Tensor:
        if recipe.negative_guidance in METHODS:
            with negative_prompting(pipeline, negatives, recipe.negative_guidance, recipe.negative_scale):
                return pipeline_images(pipeline, prompts, seeds, recipe.steps, 1.0)
        return pipeline_images(
            pipeline, prompts, seeds, recipe.steps, _kappa(recipe), negative_prompt=negatives
        )

    return draw


def _kappa(recipe: Recipe) -> float:
    """The guidance scale, which negative prompts by cfg name in their own option."""
    return float(recipe.negative_scale or 1.0) if recipe.negative_guidance == "cfg" else recipe.guidance_scale


def _sampler_of(pipeline: DiffusionPipeline) -> dict[str, str]:
    return {"sampler": type(pipeline.scheduler).__name__}


def _any_pipeline(recipe: Recipe) -> DiffusionPipeline:
    if recipe.weights is not None:
        raise UserError(f"{recipe.model} is a folder, which has one set of weights; leave --weights out")
    return load_any_pipeline(recipe.model)


def _content_hash(model: str) -> str:
    """Of a checkpoint file or a model folder."""
    if is_checkpoint(model):
        return hash_file(asset_path(model))
    return model_hash(model)
