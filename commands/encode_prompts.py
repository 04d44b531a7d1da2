"""`encode-prompts`: a cache of text embeddings, so that a training needs no text encoders in memory."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from common.files import check_output_folder
from datamodules.order import Places, Texts
from datamodules.sources import PromptPools
from lightning_modules.networks.backbones.prompts import PromptEncoder
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.prompt_cache.cache import (
    SHARDS,
    Keys,
    Layout,
    cache_writer,
    own_names,
    readable,
    text_keys,
)
from lightning_modules.networks.prompt_cache.lookup import text_identity

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CHUNK = 65536  # texts read at a time
_SAMPLE = 1000  # texts whose tokens are counted for the estimate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `encode-prompts`."""
    add = parser.add_argument
    add("--model", required=True, help="the teacher: a diffusers folder or a hub name")
    add(
        "--prompts",
        required=True,
        nargs="+",
        metavar="FILE",
        help="files (.txt, .csv, .tsv, .jsonl, .parquet, also .gz or .zst), glob patterns, dataset folders",
    )
    add("--negative-prompts", nargs="+", default=[], metavar="FILE", help="the same for negative prompts")
    add("--column", help="column of the prompts in tables (default: prompt, caption or text)")
    add("--output", required=True, type=Path, help="folder of the cache; one that is there is gone on with")
    add("--dtype", choices=list(DTYPES), default="float16", help="of the numbers kept (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="prompts encoded at a time (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Encode what the cache lacks, the empty prompt included; an interrupted run goes on where it ended.

    Raises:
        UserError: a source or the model can't be read, the disk is too small, or the folder holds a cache of
            another encoder, type or something else.
    """
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; it must be at least 1")
    check_output_folder(options.output, own_names)
    texts = _read(options)
    parts = load_parts(options.model, without=("denoiser", "vae"))
    encoder = parts.backbone.prompt_encoder(parts)
    identity = text_identity(parts, encoder)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    layout = Layout.of(encoder.embed_texts([""]), DTYPES[options.dtype])
    keys = _keys(texts)
    with cache_writer(options.output, identity, layout) as writer:
        todo = writer.missing(keys)
        size = len(todo) * layout.bytes_per_text(_tokens(encoder, texts, todo) if layout.masked else None)
        total = len(np.unique(keys))
        print(
            f"{total:,} different texts, {total - len(todo):,} of them encoded already. The rest takes "
            f"{'about ' if layout.masked else ''}{writer.check_space(size)} ({options.dtype}).",
            flush=True,
        )
        encoder.truncated_prompts = 0
        try:
            with tqdm(total=total, initial=total - len(todo), unit="prompt", desc="Encoding prompts") as bar:
                for start in range(0, len(todo), options.batch_size):
                    rows = todo[start : start + options.batch_size]
                    writer.add(keys[rows], encoder.embed_texts(texts.take(rows)))
                    bar.update(len(rows))
        except KeyboardInterrupt:
            print("Stopped. The same command goes on where this one ended.", file=sys.stderr)
            raise
    written = sum(path.stat().st_size for path in options.output.glob(SHARDS))
    print(f"Wrote {options.output} ({readable(written)}). Train with --model.prompt_cache {options.output}")
    if encoder.truncated_prompts:
        print(f"{encoder.truncated_prompts:,} texts have more than {encoder.max_length} tokens and were cut.")


class _Joined:
    """Several texts as one, each after the other."""

    def __init__(self, parts: Sequence[Texts]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, rows: Places) -> list[str]:
        """Return the texts of these rows, which ascend."""
        cuts = np.searchsorted(rows, self.ends)
        begins = [0, *self.ends[:-1].tolist()]
        pieces = zip(self.parts, begins, np.split(rows, cuts[:-1]), strict=True)
        return [text for part, begin, piece in pieces if len(piece) for text in part.take(piece - begin)]


def _read(options: argparse.Namespace) -> _Joined:
    """The empty prompt, the prompts and the negative prompts."""
    prompts = [{"path": path, "column": options.column} for path in options.prompts]
    negatives = [{"path": path} for path in options.negative_prompts]
    pools = [PromptPools(prompts, key="--prompts")]
    if negatives:
        pools.append(PromptPools(negatives, key="--negative-prompts"))
    return _Joined([Texts([""]), *(texts for pool in pools for texts in pool.open())])


def _keys(texts: _Joined) -> Keys:
    places = np.arange(len(texts))
    chunks = [places[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]
    bar = tqdm(chunks, "Reading prompts", delay=2)
    return np.concatenate([text_keys(texts.take(chunk)) for chunk in bar])


def _tokens(encoder: PromptEncoder, texts: _Joined, rows: Places) -> float:
    """Mean number of unmasked tokens of these texts, counted on some of them."""
    if not len(rows):
        return 0.0
    chosen = rows[:: -(-len(rows) // _SAMPLE)]
    return float(encoder.tokens(texts.take(chosen))[1].sum(1).float().mean())
