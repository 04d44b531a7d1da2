"""`encode-prompts`: a cache of text embeddings, so that a training needs no text encoders in memory."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from common.errors import UserError
from common.files import check_output_folder
from datamodules.order import Places, Texts
from datamodules.sources import PromptPools
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.prompt_cache import (
    SHARDS,
    Layout,
    cache_writer,
    own_names,
    text_identity,
    text_keys,
)

_CHUNK = 65536  # texts read at a time
_SAMPLE = 64  # texts that are encoded first, for the estimate


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `encode-prompts`.

    Args:
        model: the teacher: a diffusers folder or a hub name
        prompts: files (.txt, .csv, .tsv, .jsonl, .parquet, also .gz or .zst), glob patterns, dataset folders
        negative_prompts: the same for negative prompts
        column: column of the prompts in tables (prompt, caption or text if left out)
        output: folder of the cache; one that is there is gone on with
        dtype: of the numbers kept
        batch_size: prompts encoded at a time
    """

    model: str
    prompts: list[str]
    negative_prompts: list[str] = field(default_factory=list)
    column: str | None = None
    output: Path
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    batch_size: PositiveInt = 64


def run(options: Options) -> None:
    """Encode what the cache lacks, that for no prompt included; an interrupted run goes on where it ended.

    Raises:
        UserError: a source or the model can't be read, the disk is too small, or the folder holds a cache of
            another encoder, type or something else.
    """
    check_output_folder(options.output, own_names)
    pools = _pools(options)
    parts = load_parts(options.model, without=("denoiser", "vae"))
    encoder = parts.backbone.prompt_encoder(parts)
    texts = _Joined([Texts(list(dict.fromkeys(["", encoder.no_prompt]))), *pools])
    places = np.arange(len(texts))
    chunks = tqdm(np.split(places, places[_CHUNK::_CHUNK]), "Reading prompts", delay=2)
    keys = np.concatenate([text_keys(texts.take(chunk)) for chunk in chunks])
    identity = text_identity(parts, encoder)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    sample = encoder.embed_texts(texts.take(places[:: -(-len(texts) // _SAMPLE)]))
    layout = Layout.of(sample, options.dtype)
    sizes = [sum(map(len, row.values())) for row in layout.kept(sample)]
    with cache_writer(options.output, identity, layout) as writer:
        todo, total = writer.missing(keys), len(np.unique(keys))
        size, free = len(todo) * float(np.mean(sizes)), shutil.disk_usage(options.output).free
        space = f"about {_gib(size)} of {_gib(free)} free in {options.output}"
        if size > free:
            raise UserError(f"the cache takes {space}; make room, or give another --output or fewer prompts")
        done = total - len(todo)
        print(
            f"{total:,} different texts, {done:,} of them encoded already. The rest takes {space}.",
            flush=True,
        )
        encoder.truncated_prompts = 0
        bar = tqdm(total=total, initial=done, unit="prompt", desc="Encoding prompts")
        try:
            for start in range(0, len(todo), options.batch_size):
                rows = todo[start : start + options.batch_size]
                writer.add(keys[rows], encoder.embed_texts(texts.take(rows)))
                bar.update(len(rows))
        except KeyboardInterrupt:
            print("Stopped. The same command goes on where this one ended.", file=sys.stderr)
            raise
        finally:
            bar.close()
    written = sum(path.stat().st_size for path in options.output.glob(SHARDS))
    print(f"Wrote {options.output} ({_gib(written)}). Train with --model.prompt_cache {options.output}")
    if encoder.truncated_prompts:
        print(f"{encoder.truncated_prompts:,} texts have more than {encoder.max_length} tokens and were cut.")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _pools(options: Options) -> list[Texts]:
    """The prompts and the negative prompts."""
    prompts = [{"path": path, "column": options.column} for path in options.prompts]
    negatives = [{"path": path} for path in options.negative_prompts]
    pools = [PromptPools(prompts, key="--prompts")]
    if negatives:
        pools.append(PromptPools(negatives, key="--negative-prompts"))
    return [texts for pool in pools for texts in pool.open()]


class _Joined:
    """Several texts as one, each after the other."""

    def __init__(self, parts: Sequence[Texts]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, rows: Places) -> list[str]:
        """Return the texts of these rows, which ascend."""
        begins = [0, *self.ends[:-1].tolist()]
        pieces = zip(self.parts, begins, np.split(rows, np.searchsorted(rows, self.ends[:-1])), strict=True)
        return [text for part, begin, piece in pieces if len(piece) for text in part.take(piece - begin)]
