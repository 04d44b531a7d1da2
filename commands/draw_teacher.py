"""`draw-teacher`: the teacher's own samples as latents, for methods that want real pictures.

    python cli.py draw-teacher --model assets/emoji-sd --prompts assets/captions.txt --output outputs/samples
    torchrun --nproc_per_node 8 cli.py draw-teacher …

Under torchrun each process draws its share of the files. A student of several steps draws in these, so that
it stands in for its teacher where one of fewer steps is made of it: four evaluations a sample, not fifty.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.files import check_output_folder
from common.hashing import hash_tensors, hash_texts
from datamodules.sources import PromptPools
from datamodules.teacher_samples import SHARD, keep_facts, own_names, shard_files, write_shard
from lightning_modules.generator import make_generator
from lightning_modules.networks.backbones import call_options
from lightning_modules.networks.student import LoadedStudent, load_student, student_path
from lightning_modules.pipelines import multistep_scheduler, stock_pipeline

TEACHER_STEPS, TEACHER_GUIDANCE = 25, 4.5


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `draw-teacher`.

    Args:
        model: the teacher: a diffusers folder or a hub name; or a student in its place
        prompts: files (.txt, .csv, .tsv, .jsonl, .parquet, also .gz or .zst), glob patterns, dataset folders
        column: column of the prompts in tables (prompt, caption or text if left out)
        output: folder of the samples; one that is there is gone on with
        count: samples (one for each prompt if left out)
        steps: 25 of a teacher (by DDIM or Euler's method), a student's own, if left out
        guidance_scale: 1 is off (4.5 of a teacher, off of a student, if left out)
        seed: of the first sample; the next ones follow
        batch_size: samples drawn at a time
    """

    model: str
    prompts: list[str]
    column: str | None = None
    output: Path
    count: PositiveInt | None = None
    steps: PositiveInt | None = None
    guidance_scale: float | None = None
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 64


def run(options: Options) -> None:
    """Draw what the folder lacks; an interrupted run goes on where it ended.

    Raises:
        UserError: prompts or model can't be read, the disk is too small, or the folder holds other samples.
    """
    folder = check_output_folder(options.output, own_names)
    pools = PromptPools(
        [{"path": path, "column": options.column} for path in options.prompts], key="--prompts"
    )
    texts = [text for part in pools.open() for text in part.take(np.arange(len(part)))]
    student, count = load_student(student_path(options.model)), options.count or len(texts)
    parts, (draw, how) = student.parts, _drawing(student, options)
    files, rank = shard_files(folder, count), int(os.environ.get("RANK", 0))
    mine = [n for n in range(len(files)) if n % int(os.environ.get("WORLD_SIZE", 1)) == rank]
    todo = [n for n in mine if not files[n].is_file()]
    size = 2 * prod(parts.latent_shape) * sum(min(SHARD, count - n * SHARD) for n in todo)
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    space = f"about {size / 2**20:.1f} MiB of {free / 2**20:,.0f} MiB free in {options.output}"
    if size > free:
        raise UserError(f"the samples take {space}; make room, or give another --output or a lower --count")
    print(
        f"{count:,} samples in {len(files)} files, {len(todo)} of them to be drawn here: {space}.", flush=True
    )
    facts = {
        "teacher": options.model, "codec": hash_tensors(parts.vae.state_dict()), "prompts": hash_texts(texts),
        "count": count, "seed": options.seed, **how,
    }  # fmt: skip
    keep_facts(folder, facts)
    with tqdm(total=sum(min(SHARD, count - n * SHARD) for n in todo), unit="sample", desc="Drawing") as bar:
        try:
            for number in todo:
                places = range(number * SHARD, min(count, (number + 1) * SHARD))
                captions = [texts[place % len(texts)] for place in places]
                latents = []
                for start in range(0, len(places), options.batch_size):
                    part = slice(start, start + options.batch_size)
                    seeds = [options.seed + place for place in places[part]]
                    latents.append(_checked(draw(captions[part], seeds), options.model, parts.latent_shape))
                    bar.update(len(seeds))
                write_shard(files[number], torch.cat(latents), captions)
        except KeyboardInterrupt:
            print("Stopped. The same command goes on where this one ended.", file=sys.stderr)
            raise
    print(f"Wrote {options.output}. Train with --data.real.folder={options.output}")


Draw = Callable[[list[str], list[int]], Tensor]


def _drawing(model: LoadedStudent, options: Options) -> tuple[Draw, dict[str, Any]]:
    """Prompts and seeds -> latents at unit scale [n, C, h, w], and the settings; noise as `seeded_noise`."""
    device, scale = "cuda" if torch.cuda.is_available() else "cpu", options.guidance_scale
    if model.facts:  # a student of this project
        own = model.steps.fewer(options.steps or len(model.steps))
        kappa, generator = 1.0 if scale is None else scale, make_generator(model.parts, own).eval().to(device)

        @torch.no_grad()
        def by_the_student(prompts: list[str], seeds: list[int]) -> Tensor:
            noise = partial(generator.noise, seeds)
            condition = generator.prompt_encoder.encode(prompts)
            return generator.latents(noise(), condition, kappa, fresh=noise)

        return by_the_student, {"steps": len(own), "guidance_scale": kappa}
    steps, kappa = options.steps or TEACHER_STEPS, TEACHER_GUIDANCE if scale is None else scale
    pipeline = stock_pipeline(model.parts, multistep_scheduler(model.parts.scheduler)).to(device)

    def by_the_teacher(prompts: list[str], seeds: list[int]) -> Tensor:
        output = pipeline(
            prompt=prompts, num_inference_steps=steps, guidance_scale=kappa, output_type="latent",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], **call_options(pipeline),
        )  # fmt: skip
        latents: Tensor = output.images
        return latents

    return by_the_teacher, {"steps": steps, "guidance_scale": kappa}


def _checked(latents: Tensor, model: str, shape: tuple[int, ...]) -> Tensor:
    """The latents in float16, on the CPU."""
    latents = latents.half().cpu()
    if latents.shape[1:] != shape or not latents.isfinite().all():
        raise UserError(
            f"{model} draws latents of shape {tuple(latents.shape[1:])}, or not all are finite, and {shape} "
            "in float16 was expected: draw-teacher is not for this model"
        )
    return latents
