"""`generate`: one-step pictures from a checkpoint, an exported folder or any one- or few-step pipeline."""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, SchedulerMixin, TCDScheduler
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import check_output_folder, written_at_once
from datamodules.prompts import read_prompts as read_prompts_file
from lightning_modules.generator import make_generator, pipeline_images, stock_pipeline
from lightning_modules.guidance.methods import METHODS, Method, make_method
from lightning_modules.guidance.prompting import attention_layers, negative_prompting, pipeline_network
from lightning_modules.networks.backbones import is_own_class
from lightning_modules.networks.loading import find_model, pipeline_folder, read_json
from lightning_modules.networks.student import is_checkpoint, load_student, student_path

DEFAULT_MODEL = "assets/emoji-sd-swiftbrush"
MANIFEST, GRID = "generation.json", "grid.png"
BATCH_SIZE = 8
GRID_IMAGES = 64  # most pictures shown in grid.png

Draw = Callable[[list[str], list[int]], Tensor]  # B prompts, B seeds -> pictures [B, 3, H, W] in [0, 1]


@dataclass(frozen=True)
class Guidance:
    """What `negative` acts by: "none", attention ("nasa", "nag"), or guidance in kappa form ("cfg").

    A scale of None is the network's default.
    """

    method: str = "none"
    scale: float | None = None
    negative: str | None = None

    @property
    def by_attention(self) -> bool:
        """Whether the negative prompt acts through attention."""
        return self.method in METHODS

    @property
    def guidance_scale(self) -> float:
        """Kappa of guidance; 1.0 is off."""
        return float(self.scale) if self.method == "cfg" and self.scale is not None else 1.0

    def facts(self, network: nn.Module) -> dict[str, Any]:
        """What the list of pictures says about it; nothing if it is off."""
        if self.method == "none":
            return {}
        settings = {"scale": self.scale} if not self.by_attention else asdict(self.rule(network))
        named = {f"negative_{name}": value for name, value in settings.items()}
        return {"negative_prompt": self.negative, "negative_guidance": self.method, **named}

    def rule(self, network: nn.Module) -> Method:
        """The method by attention, with the network's defaults."""
        return make_method(self.method, network, self.scale)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `generate`."""
    add = parser.add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        help="a run folder (its best.ckpt, else last.ckpt), a .ckpt file, a diffusers pipeline folder or a "
        "hub name; the last two may end in @REVISION and #VARIANT (default: %(default)s)",
    )
    add("--prompt", action="append", default=[], help="what to draw; may be given several times")
    add("--prompts-file", type=Path, help="text file with one prompt a line (UTF-8)")
    add("--negative-prompt", help="what not to draw")
    add(
        "--negative-guidance",
        choices=["none", *METHODS, "cfg"],
        help="how the negative prompt acts: nasa and nag by attention; cfg by guidance, with a second "
        "evaluation of the network, which one-step models are not made for (default: nasa if there is one)",
    )
    add(
        "--negative-scale",
        type=float,
        help="strength; 0 is off (default: the model's); for cfg the guidance scale, 1 is off",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the first picture; picture i has seed + i (default: %(default)s)",
    )
    add("--num-images", type=int, default=1, help="pictures per prompt (default: %(default)s)")
    add(
        "--steps",
        type=int,
        default=1,
        help="network steps; above 1 the stock pipeline draws (default: %(default)s)",
    )
    add(
        "--output", type=Path, default=Path("outputs/generate"), help="folder to write (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    """Draw the pictures and write them with grid.png and generation.json.

    Raises:
        UserError: no prompts, an unusable option, model or output folder; nothing is written then.
    """
    prompts = read_prompts(options.prompt, options.prompts_file)
    _check_counts(options)
    guidance = read_guidance(options)
    target = check_output_folder(options.output, own_names)
    draw, facts = _drawer(student_path(options.model), options.steps, guidance)
    jobs = [prompt for prompt in prompts for _ in range(options.num_images)]
    with written_at_once(target) as folder:
        write_pictures(draw, jobs, options.seed, folder, facts)
    print(f"{len(jobs)} pictures in {options.output}, all in {options.output / GRID}")


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts of the options, then those of the file, one a line; empty lines are left out.

    Raises:
        UserError: there are none, or the file is missing, unreadable or not UTF-8 (names the line).
    """
    prompts = [prompt.strip() for prompt in given]
    if any(not prompt for prompt in prompts):
        raise UserError("A --prompt is empty. Say what to draw.")
    if file is not None:
        prompts += read_prompts_file(file)
    if not prompts:
        raise UserError("There is no prompt. Give --prompt 'a red apple' or --prompts-file FILE.")
    return prompts


def read_guidance(options: argparse.Namespace) -> Guidance:
    """Guidance that the options ask for.

    Raises:
        UserError: options are missing, out of range or without effect.
    """
    negative, scale = options.negative_prompt, options.negative_scale
    if negative is not None and not negative.strip():
        raise UserError("The --negative-prompt is empty. Say what not to draw, or leave it out.")
    method = options.negative_guidance or ("none" if negative is None else "nasa")
    if method == "none":
        if negative is not None or scale is not None:
            raise UserError(
                "--negative-prompt and --negative-scale have no effect without guidance. "
                "Add --negative-prompt, another --negative-guidance than none, or leave them out."
            )
        return Guidance()
    if scale is not None and (not math.isfinite(scale) or scale < 0):
        raise UserError(f"--negative-scale {scale} is not a finite number of at least 0. Give e.g. 0.5.")
    if method != "cfg" and negative is None:
        raise UserError(f"--negative-guidance {method} needs --negative-prompt.")
    if method == "cfg" and scale is None:
        raise UserError("--negative-guidance cfg needs --negative-scale, such as 1.5 (1 is off).")
    if method == "cfg" and options.steps > 1 and scale <= 1:
        raise UserError(
            f"--negative-scale {scale:g} has no effect with --steps above 1. Give a scale above 1."
        )
    return Guidance(method, scale, negative)


def own_names(folder: Path) -> set[str]:
    """Names in a folder that a former `generate` wrote, as its generation.json lists them."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {MANIFEST, GRID, *(str(entry["file"]) for entry in entries)}
    except (OSError, ValueError, TypeError, KeyError):
        return set()  # no readable list: then nothing in the folder counts as ours


def write_pictures(
    draw: Draw, prompts: list[str], seed: int, folder: Path, facts: dict[str, Any] | None = None
) -> None:
    """Draw one picture per prompt, picture i with seed + i, and write the whole result into `folder`.

    `facts` stand beside each picture in the list.
    """
    digits = max(4, len(str(len(prompts) - 1)))
    entries: list[dict[str, Any]] = []
    shown: list[Tensor] = []
    with tqdm(total=len(prompts), unit="image", desc="generate") as bar:
        for start in range(0, len(prompts), BATCH_SIZE):
            part = prompts[start : start + BATCH_SIZE]
            seeds = [seed + start + i for i in range(len(part))]
            began = time.perf_counter()
            pictures = draw(part, seeds).cpu()
            milliseconds = 1000 * (time.perf_counter() - began) / len(part)
            for i, picture in enumerate(pictures):
                name = f"{start + i:0{digits}d}.png"
                to_pillow(picture).save(folder / name)
                entries.append(
                    {
                        "prompt": part[i],
                        "seed": seeds[i],
                        "file": name,
                        "milliseconds": round(milliseconds, 3),
                        **(facts or {}),
                    }
                )
            shown += list(pictures[: max(0, GRID_IMAGES - len(shown))])
            bar.update(len(part))
    draw_grid(shown).save(folder / GRID)
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def to_pillow(picture: Tensor) -> Image.Image:
    """Picture [3, H, W] in [0, 1] with 8 bits per channel, rounded as diffusers does."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


def draw_grid(pictures: list[Tensor], gap: int = 2) -> Image.Image:
    """Pictures of one size [3, H, W] in rows of about the square root of their number, on white."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width = (size + gap for size in pictures[0].shape[1:])
    grid = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, picture in enumerate(pictures):
        grid.paste(to_pillow(picture), (gap + i % columns * width, gap + i // columns * height))
    return grid


def _drawer(model: str, steps: int, guidance: Guidance) -> tuple[Draw, dict[str, Any]]:
    """Load the model: our generator for one step of a known family, else the stock pipeline.

    Also returns what the list of pictures says about the guidance.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not is_checkpoint(model) and not is_own_family(model):
        return _pipeline_drawer(load_any_pipeline(model).to(device), steps, guidance)
    student = load_student(model)
    if steps > 1 or has_few_step_sampler(student.parts.scheduler):
        return _pipeline_drawer(stock_pipeline(student.parts).to(device), steps, guidance)
    generator = make_generator(student.parts, student.start_timestep).eval().to(device)

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        return generator.images(
            prompts,
            seeds,
            guidance_scale=guidance.guidance_scale,
            negative_prompt=guidance.negative,
            negative_method=guidance.rule(generator.student) if guidance.by_attention else None,
        )

    return draw, guidance.facts(generator.student)


def _pipeline_drawer(
    pipeline: DiffusionPipeline, steps: int, guidance: Guidance
) -> tuple[Draw, dict[str, Any]]:
    """The same with a stock pipeline."""
    if not guidance.by_attention:
        facts = guidance.facts(nn.Identity())
        return lambda prompts, seeds: pipeline_images(
            pipeline, prompts, seeds, steps, guidance.guidance_scale, negative_prompt=guidance.negative
        ), facts

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        with negative_prompting(pipeline, guidance.negative, guidance.method, guidance.scale):
            return pipeline_images(pipeline, prompts, seeds, steps, 1.0)

    network = pipeline_network(pipeline)
    attention_layers(network)  # raises before anything is drawn
    return draw, guidance.facts(network)


def has_few_step_sampler(scheduler: SchedulerMixin) -> bool:
    """Whether the folder's own scheduler takes the one step (LCM, SD-Turbo …) rather than our conversion.

    The schedulers of multi-step models are made for many steps: in one, most of them start near t = 1.
    """
    trailing = scheduler.config.get("timestep_spacing") == "trailing"
    return isinstance(scheduler, (LCMScheduler, TCDScheduler)) or (
        trailing and not isinstance(scheduler, DDIMScheduler)
    )


def is_own_family(model: str) -> bool:
    """Whether a folder's pipeline is one whose student we draw with ourselves."""
    return is_own_class(read_json(pipeline_folder(model) / "model_index.json"))


def load_any_pipeline(model: str) -> DiffusionPipeline:
    """A stock pipeline of any other class, in float32, as all models here."""
    try:
        # cast here: transformers keeps the dtype of the files, diffusers does not
        found = find_model(model)
        pipeline = DiffusionPipeline.from_pretrained(found.name, variant=found.variant).to(torch.float32)
    except UserError:
        raise
    except Exception as error:  # loaders raise many kinds; the cause stays attached
        raise UserError(f"The pipeline {model} can't be loaded: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_counts(options: argparse.Namespace) -> None:
    if options.num_images < 1 or options.steps < 1:
        raise UserError("--num-images and --steps must be at least 1.")
    if options.seed < 0:
        raise UserError("--seed must not be negative.")
