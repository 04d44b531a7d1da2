"""`generate`: pictures from a checkpoint, an exported folder or any one- or few-step pipeline."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveInt

from commands.options import Count, Scale, Seed
from common.errors import UserError

if TYPE_CHECKING:
    from lightning_modules.drawing import Guidance, Model

NegativeGuidance = Literal["none", "nasa", "nag", "cfg"]
DEFAULT_MODEL = "assets/emoji-sd-swiftbrush"
MANIFEST, GRID = "generation.json", "grid.png"
BATCH_SIZE = 8
GRID_IMAGES = 64  # most pictures shown in grid.png


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `generate`.

    Args:
        model: a run folder (its best.ckpt, else last.ckpt), best or last (of the newest finished run), a
            .ckpt file, a diffusers pipeline folder or a hub name (these two: also @REVISION, #VARIANT)
        prompt: what to draw; may be given several times
        prompts_file: text file with one prompt a line (UTF-8)
        negative_prompt: what not to draw
        negative_guidance: how the negative prompt acts: nasa and nag by attention; cfg by guidance, with a
            second evaluation of the network, which one-step models are not made for (nasa if there is one)
        negative_scale: strength, 0 is off (the model's own if left out); for cfg the guidance scale, 1 is off
        negative_steps: nasa and nag in the first so many steps only (in all)
        seed: of the first picture; picture i has seed + i
        num_images: pictures per prompt
        steps: network steps (those the model was trained for; 1 of a multi-step model); above them the stock
            pipeline draws
        teacher: of a checkpoint, where its teacher lies now (where it was in training)
        output: folder to write
    """

    model: str = DEFAULT_MODEL
    prompt: list[str] = field(default_factory=list)
    prompts_file: Path | None = None
    negative_prompt: str | None = None
    negative_guidance: NegativeGuidance | None = None
    negative_scale: Scale | None = None
    negative_steps: PositiveInt | None = None
    seed: Seed = 0
    num_images: Count = 1
    steps: PositiveInt | None = None
    teacher: str | None = None
    output: Path = Path("outputs/generate")


def run(options: Options) -> None:
    """Draw the pictures and write them with grid.png and generation.json.

    Raises:
        UserError: no prompts, an unusable option, model or output folder; nothing is written then.
    """
    from common.files import check_output_folder, written_at_once

    prompts = read_prompts(options)
    method = guidance_method(options)
    target = check_output_folder(options.output, own_names)
    # below the checks, as these imports take seconds
    import torch

    from lightning_modules.drawing import Guidance, open_model
    from lightning_modules.networks.student import student_path

    guidance = Guidance(method, options.negative_scale, options.negative_steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_model(student_path(options.model), options.steps, device, teacher=options.teacher)
    model.check(guidance, options.negative_prompt)
    jobs = [prompt for prompt in prompts for _ in range(options.num_images)]
    with written_at_once(target) as folder:
        write_pictures(model, jobs, options.seed, guidance, options.negative_prompt, folder)
    drawn = f"{len(jobs)} pictures" if len(jobs) > 1 else "1 picture"
    print(f"{drawn} in {options.output}, all in {options.output / GRID}")


def read_prompts(options: Options) -> list[str]:
    """Prompts of the options, then those of the file, one a line; empty lines are left out.

    Raises:
        UserError: there are none, or the file is missing, unreadable or not UTF-8 (names the line).
    """
    prompts = [prompt.strip() for prompt in options.prompt]
    if any(not prompt for prompt in prompts):
        raise UserError("A --prompt is empty. Say what to draw.")
    if options.prompts_file is not None:
        from datamodules.prompts import read_prompts as read_file

        prompts += read_file(options.prompts_file)
    if not prompts:
        raise UserError("There is no prompt. Give --prompt 'a red apple' or --prompts-file FILE.")
    return prompts


def guidance_method(options: Options) -> NegativeGuidance:
    """How the negative prompt is to act.

    Raises:
        UserError: options are missing or without effect.
    """
    negative, scale = options.negative_prompt, options.negative_scale
    if negative is not None and not negative.strip():
        raise UserError("The --negative-prompt is empty. Say what not to draw, or leave it out.")
    method = options.negative_guidance or ("none" if negative is None else "nasa")
    if options.negative_steps is not None and method not in ("nasa", "nag"):
        raise UserError("--negative-steps has no effect without --negative-guidance nasa or nag.")
    if method == "none":
        if negative is not None or scale is not None:
            raise UserError(
                "--negative-prompt and --negative-scale have no effect without guidance. "
                "Add --negative-prompt, another --negative-guidance than none, or leave them out."
            )
    elif method != "cfg":
        if negative is None:
            raise UserError(f"--negative-guidance {method} needs --negative-prompt.")
    elif scale is None:
        raise UserError("--negative-guidance cfg needs --negative-scale, such as 1.5 (1 is off).")
    elif (options.steps or 1) > 1 and scale <= 1:
        raise UserError(
            f"--negative-scale {scale:g} has no effect with --steps above 1. Give a scale above 1."
        )
    return method


def own_names(folder: Path) -> set[str]:
    """Names in a folder that a former `generate` wrote, as its generation.json lists them."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {MANIFEST, GRID, *(str(entry["file"]) for entry in entries)}
    except (OSError, ValueError, TypeError, KeyError):
        return set()  # no readable list: then nothing in the folder counts as ours


def write_pictures(
    model: "Model", prompts: list[str], seed: int, guidance: "Guidance", negative: str | None, folder: Path
) -> None:
    """Draw one picture per prompt, picture i with seed + i, and write the whole result into `folder`."""
    import torch
    from tqdm import tqdm

    from reports.sheets import labelled_grid, to_pil

    facts: dict[str, Any] = {}
    if guidance.method != "none":
        facts = {"negative_prompt": negative} | guidance.facts(model.network)
    digits = max(4, len(str(len(prompts) - 1)))
    entries: list[dict[str, Any]] = []
    shown: list[torch.Tensor] = []
    with tqdm(total=len(prompts), unit="image", desc="generate") as bar:
        for start in range(0, len(prompts), BATCH_SIZE):
            part = prompts[start : start + BATCH_SIZE]
            seeds = [seed + start + i for i in range(len(part))]
            began = time.perf_counter()
            pictures = model.draw(part, seeds, guidance, negative).cpu()
            milliseconds = round(1000 * (time.perf_counter() - began) / len(part), 3)
            for i, picture in enumerate(pictures):
                name = f"{start + i:0{digits}d}.png"
                to_pil(picture).save(folder / name)
                entry = {"prompt": part[i], "seed": seeds[i], "file": name, "milliseconds": milliseconds}
                entries.append(entry | facts)
            shown += list(pictures[: max(0, GRID_IMAGES - len(shown))])
            bar.update(len(part))
    columns = math.ceil(math.sqrt(len(shown)))
    labelled_grid({"": torch.stack(shown)}, prompts[: len(shown)], columns).save(folder / GRID)
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
