"""`draw-teacher`: the teacher's own samples as latents, for methods that want real pictures.

    python cli.py draw-teacher --model assets/emoji-sd --prompts assets/captions.txt --output outputs/samples
    torchrun --nproc_per_node 8 cli.py draw-teacher …

Under torchrun each process draws its share of the files.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jsonargparse.typing import NonNegativeInt, PositiveInt
from tqdm import tqdm

from common.errors import UserError
from common.files import check_output_folder
from common.hashing import hash_tensors, hash_texts
from datamodules.sources import PromptPools
from datamodules.teacher_samples import SHARD, keep_facts, own_names, shard_files, write_shard
from lightning_modules.networks.backbones import call_options
from lightning_modules.networks.loading import load_parts
from lightning_modules.pipelines import multistep_scheduler, stock_pipeline


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `draw-teacher`.

    Args:
        model: the teacher: a diffusers folder or a hub name
        prompts: files (.txt, .csv, .tsv, .jsonl, .parquet, also .gz or .zst), glob patterns, dataset folders
        column: column of the prompts in tables (prompt, caption or text if left out)
        output: folder of the samples; one that is there is gone on with
        count: samples (one for each prompt if left out)
        steps: DDIM steps
        guidance_scale: 1 is off
        seed: of the first sample; the next ones follow
        batch_size: samples drawn at a time
    """

    model: str
    prompts: list[str]
    column: str | None = None
    output: Path
    count: PositiveInt | None = None
    steps: PositiveInt = 25
    guidance_scale: float = 4.5
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
    parts, count = load_parts(options.model), options.count or len(texts)
    pipeline = stock_pipeline(parts, multistep_scheduler(parts.scheduler))
    pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
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
        "count": count, "seed": options.seed, "steps": options.steps,
        "guidance_scale": options.guidance_scale,
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
                    latents.append(_draw(pipeline, captions[part], seeds, options, parts.latent_shape))
                    bar.update(len(seeds))
                write_shard(files[number], torch.cat(latents), captions)
        except KeyboardInterrupt:
            print("Stopped. The same command goes on where this one ended.", file=sys.stderr)
            raise
    print(f"Wrote {options.output}. Train with --data.real.folder={options.output}")


def _draw(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    options: Options,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Latents at unit scale [n, C, h, w] in float16; the noise is that of `seeded_noise`."""
    output = pipeline(
        prompt=prompts, num_inference_steps=options.steps, guidance_scale=options.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="latent",
        **call_options(pipeline),
    )  # fmt: skip
    latents: torch.Tensor = output.images.half().cpu()
    if latents.shape[1:] != shape or not latents.isfinite().all():
        raise UserError(
            f"{options.model} draws latents of shape {tuple(latents.shape[1:])}, or not all are finite, "
            f"and {shape} in float16 was expected: draw-teacher is not for this model"
        )
    return latents
