"""How a model draws, answered once for `generate`, `evaluate` and `app`; also pictures that exist already."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError, first_line
from common.hashing import hash_file, hash_texts
from common.processes import from_every_rank, rank_and_world_size
from datamodules.picture_files import Frame, read_pictures
from lightning_modules.diffusion.steps import step_facts
from lightning_modules.generator import OneStepGenerator, make_generator
from lightning_modules.guidance import negative_prompting
from lightning_modules.guidance.methods import METHODS, Method, make_method
from lightning_modules.guidance.prompting import NegativePrompts, pipeline_network
from lightning_modules.networks.backbones.calling import takes_guidance
from lightning_modules.networks.loading import asset_path, model_hash
from lightning_modules.networks.student import LoadedStudent, Weights, is_checkpoint, load_student
from lightning_modules.pipelines import (
    has_few_step_sampler,
    is_own_family,
    load_any_pipeline,
    pipeline_images,
    stock_pipeline,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Guidance:
    """What a negative prompt acts by.

    Attributes:
        method: "nasa" or "nag" by attention; "cfg" by guidance in kappa form, with the empty prompt where
            there is no negative one; "none".
        scale: its strength, of cfg kappa (1 is off); None: the network's default.
        steps: nasa and nag in the first steps only; None: in all.
    """

    method: Literal["none", "nasa", "nag", "cfg"] = "none"
    scale: float | None = None
    steps: int | None = None

    @property
    def by_attention(self) -> bool:
        """Whether the negative prompt acts through attention."""
        return self.method in METHODS

    @property
    def kappa(self) -> float:
        """The guidance scale; 1.0 is off."""
        return float(self.scale) if self.method == "cfg" and self.scale is not None else 1.0

    def rule(self, network: nn.Module) -> Method | None:
        """The method by attention, with the network's defaults.

        Raises:
            UserError: the scale is out of range.
        """
        return make_method(self.method, network, self.scale) if self.by_attention else None

    def facts(self, network: nn.Module) -> dict[str, Any]:
        """The method and its settings, by name; nothing if it is off."""
        if self.method == "none":
            return {}
        rule = self.rule(network)
        settings = {"scale": self.scale} if rule is None else asdict(rule)
        settings |= {} if self.steps is None else {"steps": self.steps}
        return {"negative_guidance": self.method} | {f"negative_{k}": v for k, v in settings.items()}


OFF = Guidance()


class Model:
    """A model that draws.

    The steps that a student of ours was trained for, and one step of any model of a known family, are taken
    by our own generator, from the student's start (a stock folder's last timestep). More steps, models that
    come with a few-step sampler, and other pipelines are drawn by the stock pipeline with its own sampler.

    Args:
        source: what draws.
        steps: network steps; None: all that the student was trained for, 1 of any other model.
        device: where.

    Attributes:
        facts: what is known of it: `weights`, `student_steps`, `sampler`, `start_timestep`.

    Raises:
        UserError: a student of several steps was trained for fewer.
    """

    def __init__(
        self,
        source: LoadedStudent | DiffusionPipeline,
        steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.steps = steps or 1
        self.generator: OneStepGenerator | None = None
        self.facts: dict[str, Any] = {"weights": "as stored"}
        if isinstance(source, LoadedStudent):
            student = source
            self.facts = {"weights": student.weights, "student_steps": student.facts.get("student_steps")}
            several, own = len(student.steps) > 1, student.steps
            if several:
                own = own.fewer(steps or len(own))
            if several or (self.steps == 1 and not has_few_step_sampler(student.parts.scheduler)):
                self.steps = len(own)
                self.generator = make_generator(student.parts, own).eval().to(device)
                sampler = "one step" if len(own) == 1 else "few steps"
                self.facts |= {"sampler": sampler, **step_facts(own)}
                return
            source = stock_pipeline(student.parts)
        self.pipeline = source.to(device)
        self.facts["sampler"] = type(source.scheduler).__name__

    @property
    def network(self) -> nn.Module:
        """The denoising network.

        Raises:
            UserError: the pipeline has none.
        """
        return self.generator.student if self.generator is not None else pipeline_network(self.pipeline)

    def check(self, guidance: Guidance, negative: str | Sequence[str | None] | None) -> None:
        """Refuse negative prompts that have no place in the network's guidance.

        Raises:
            UserError: guidance was distilled into the network.
        """
        if guidance.method != "cfg" or NegativePrompts(negative).empty:
            return
        own = self.generator
        network = getattr(self.pipeline, "transformer", None) if own is None else own.student
        if network is not None and takes_guidance(network):
            raise UserError(
                f"--negative-guidance cfg: guidance was distilled into this {type(network).__name__}, which "
                "takes the scale as an input and has no place for negative prompts beside it. Give "
                "--negative-guidance nasa or nag, or leave the negative prompts out."
            )

    def draw(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        guidance: Guidance = OFF,
        negative: str | Sequence[str | None] | None = None,
    ) -> Tensor:
        """Pictures [B, 3, H, W], float32 in [0, 1], one per prompt and seed.

        A negative prompt (one for all, or one for each picture) has no effect without guidance.

        Raises:
            UserError: the guidance does not fit the network, or the number of negative prompts the pictures.
        """
        unwanted = None if guidance.method == "none" else negative
        if self.generator is not None:
            return self.generator.images(
                prompts,
                seeds,
                guidance_scale=guidance.kappa,
                negative_prompt=unwanted,
                negative_method=guidance.rule(self.network),
                negative_steps=guidance.steps,
            )
        if guidance.by_attention:
            with negative_prompting(
                self.pipeline, unwanted, guidance.method, guidance.scale, steps=guidance.steps
            ):
                return pipeline_images(self.pipeline, prompts, seeds, self.steps, 1.0)
        return pipeline_images(
            self.pipeline, prompts, seeds, self.steps, guidance.kappa, negative_prompt=unwanted
        )


def open_model(
    name: str,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    weights: Weights | None = None,
    teacher: str | None = None,
) -> Model:
    """Load a checkpoint, an exported folder, or any stock pipeline, to draw in that many steps.

    Args:
        name: a .ckpt file, a folder or a hub name.
        steps: network steps; None: see `Model`.
        device: where it draws.
        weights: which of a checkpoint's; None: the average if there is one.
        teacher: where a checkpoint's teacher lies now; None: where it was in training.

    Raises:
        UserError: the model can't be loaded, or has no such weights.
    """
    if is_checkpoint(name) or is_own_family(name):
        return Model(load_student(name, weights, teacher), steps, device)
    if weights is not None or teacher is not None:
        raise UserError(f"{name} is a folder, which is complete; leave --weights and --teacher out")
    return Model(load_any_pipeline(name), steps, device)


@dataclass(frozen=True)
class Recipe:
    """How an evaluation draws with a model.

    Attributes:
        model: a .ckpt file, a folder or a hub name.
        steps: network steps; None: see `Model`. guidance_scale: kappa form, 1 is off.
        weights: which of a checkpoint's; None: the average if there is one.
        teacher: where a checkpoint's teacher lies now; None: where it was in training.
        dtype: "float32", or "bfloat16": the networks run under autocast.
        negative_guidance, negative_scale, negative_steps: what the negative prompts act by, see `Guidance`.
    """

    model: str
    steps: int | None = None
    guidance_scale: float = 1.0
    weights: Weights | None = None
    teacher: str | None = None
    dtype: str = "float32"
    negative_guidance: Literal["none", "nasa", "nag", "cfg"] = "none"
    negative_scale: float | None = None
    negative_steps: int | None = None

    @property
    def guidance(self) -> Guidance:
        """Guidance of every picture."""
        if self.negative_guidance != "none":
            return Guidance(self.negative_guidance, self.negative_scale, self.negative_steps)
        return Guidance("cfg", self.guidance_scale) if self.guidance_scale != 1 else OFF

    def check(self, has_negatives: bool) -> None:
        """Refuse what would have no effect or no meaning.

        Raises:
            UserError: it says what to give instead.
        """
        if self.negative_steps is not None and self.negative_guidance not in METHODS:
            raise UserError("--negative_steps has no effect without --negative_guidance nasa or nag")
        if self.negative_guidance == "none":
            if self.negative_scale is not None:
                raise UserError("--negative_scale has no effect without --negative_guidance nasa, nag or cfg")
            return
        if not has_negatives:
            raise UserError(
                f"--negative_guidance {self.negative_guidance} needs negative prompts: give "
                "--negative_prompt, or a set of prompt pairs"
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
            first = "" if self.negative_steps is None else f" in {self.negative_steps} steps"
            parts.append(f"negative prompts by {self.negative_guidance}{scale}{first}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Drawer:
    """Where the pictures of an evaluation come from.

    Attributes:
        draw: places in the list of captions to pictures [3, H, W] in [0, 1], which may differ in size.
        title: for the table. ``model``: what the user named.
        weights: "ema", "online", "as stored" or "given pictures".
        step: student updates, where they are known.
        identity: all that the pictures depend on beside captions and seeds, for manifest and resuming.
        seeded: whether seeds mean anything.
    """

    draw: Callable[[list[int]], Tensor | Sequence[Tensor]]
    title: str
    model: str
    weights: str
    step: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    seeded: bool = True


def given_pictures(folder: str, files: Sequence[Path], frame: Frame | None) -> Drawer:
    """Existing pictures, one for each caption; crop and resize happen as they are read. Collective.

    Raises:
        UserError: a picture can't be read.
    """
    root = Path(folder)
    return Drawer(
        draw=lambda places: read_pictures([files[i] for i in places], frame),
        title=f"pictures in {root.name or root}",
        model=folder,
        weights="given pictures",
        identity={"folder": root.name, "count": len(files), "hash_of_pictures": _pictures_hash(files)},
        seeded=False,
    )


def _pictures_hash(files: Sequence[Path]) -> str:
    """Of the files' contents, in this order; each process reads its share."""
    rank, world = rank_and_world_size()
    # a bar only where it takes a while
    own = tqdm(files[rank::world], desc="hashing the pictures", unit="image", delay=2, disable=rank > 0)
    try:
        digests = [hash_file(path) for path in own]
    except OSError as error:
        raise UserError(f"the picture {error.filename} can't be read: {first_line(error)}") from error
    shares = from_every_rank(digests)
    return hash_texts([shares[i % world][i // world] for i in range(len(files))])


def model_drawer(
    recipe: Recipe,
    captions: Sequence[str],
    seeds: Sequence[int],
    negatives: Sequence[str] | None,
    device: torch.device,
) -> Drawer:
    """Pictures of a checkpoint, an exported folder, or a stock pipeline at chosen steps and guidance.

    Args:
        recipe: the model and how it draws.
        captions, seeds: the evaluation's; negatives: the negative prompt of each caption, or None.
        device: where.

    Raises:
        UserError: the model can't be loaded, or an option does not fit it.
    """
    recipe.check(negatives is not None)
    model = open_model(recipe.model, recipe.steps, device, recipe.weights, recipe.teacher)
    recipe = replace(recipe, steps=model.steps)
    # a guidance scale by itself is against the empty prompt, whatever the set's negative prompts
    unwanted = None if recipe.negative_guidance == "none" else negatives
    model.check(recipe.guidance, unwanted)

    def draw(places: list[int]) -> Tensor:
        precision = DTYPES[recipe.dtype]
        autocast = torch.autocast(device.type, precision) if precision != torch.float32 else nullcontext()
        with torch.no_grad(), autocast:
            prompts, numbers = [captions[i] for i in places], [seeds[i] for i in places]
            away = None if unwanted is None else [unwanted[i] for i in places]
            return model.draw(prompts, numbers, recipe.guidance, away).float()

    facts = dict(model.facts)
    settings = {k: v for k, v in asdict(recipe).items() if k not in ("model", "weights", "teacher")}
    return Drawer(
        draw=draw,
        title=recipe.title,
        model=recipe.model,
        weights=facts.pop("weights"),
        step=facts.pop("student_steps", None),
        identity=facts | settings | {"hash": _content_hash(recipe.model)},
    )


def _content_hash(model: str) -> str:
    """Of a checkpoint file or a model folder."""
    if is_checkpoint(model):
        return hash_file(asset_path(model))
    return model_hash(model)
