"""Writes the cache of text embeddings that `prompt_cache.py` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from common.errors import UserError, first_line
from common.files import check_output_folder
from lightning_modules.networks.prompt_cache.cache import (
    CHECKS,
    ENDS,
    FORMAT,
    KEYS,
    MANIFEST,
    MASK,
    TOKENS,
    Keys,
    Layout,
    PromptCache,
    Rows,
    check_sum,
    type_name,
)

SHARD_BYTES = 256 * 2**20
"""Size of a shard: what a killed process has to do again, and what damage to a file costs."""
_LOCK, _PARTIAL = ".lock", ".partial"


@contextmanager
def cache_writer(
    folder: Path,
    encoder: Mapping[str, Any],
    layout: Layout,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[PromptCacheWriter]:
    """Yield a writer that begins a cache or goes on with one; at the end, however it comes, all is on disk.

    Args:
        folder: of the cache; no other process may be writing there.
        encoder: what to note of the encoder; its ``hash`` has to be that of the texts already there.
        layout: what to keep of its output.
        shard_bytes: size of a file; the last one is smaller.

    Raises:
        UserError: the folder holds other things, or a cache of another encoder, type or shape; it can't be
            written; another process is writing there; a file of it is damaged.
    """
    target = check_output_folder(folder, own_names)
    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target / _LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process is writing the cache {folder}; wait for it to end") from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        for leftover in target.glob(f"*{_PARTIAL}"):  # of a process that was killed
            leftover.unlink()
        writer = PromptCacheWriter(target, encoder, layout, shard_bytes)
        try:
            yield writer
        finally:
            writer.flush()
    finally:
        lock.release()


class PromptCacheWriter:
    """Adds texts to a cache folder, a shard at a time; see `cache_writer`."""

    def __init__(self, folder: Path, encoder: Mapping[str, Any], layout: Layout, shard_bytes: int) -> None:
        self.folder, self.encoder, self.layout, self.shard_bytes = folder, encoder, layout, shard_bytes
        self._known: Keys = np.empty(0, "S16")
        self._next = 0
        self._pending: list[tuple[Keys, dict[str, Tensor]]] = []
        self._pending_bytes = 0
        if (folder / MANIFEST).exists():
            cache = PromptCache(folder)
            self._check_same(cache)
            self._known = cache.keys
            self._next = 1 + max((int(s.path.stem.split("-")[1]) for s in cache.shards), default=-1)

    def missing(self, keys: Keys) -> Rows:
        """Places of the hashes that the cache lacks, in order, each hash once."""
        places = np.unique(keys, return_index=True)[1]
        places.sort()
        return places[~np.isin(keys[places], self._known)]

    def check_space(self, size: float) -> str:
        """Size and free space, as a sentence.

        Raises:
            UserError: so much doesn't fit on the disk.
        """
        free = shutil.disk_usage(self.folder).free
        sizes = f"{readable(size)} of {readable(free)} free in {self.folder}"
        if size > free:
            raise UserError(f"the cache takes {sizes}; make room, or give another --output or fewer prompts")
        return sizes

    def add(self, keys: Keys, embeddings: Mapping[str, Tensor]) -> None:
        """Take the output [n, …] of the encoder for texts of these hashes [n], which the cache lacks.

        Raises:
            UserError: a number doesn't fit the type; writing raises what `flush` raises.
        """
        if Layout.of(embeddings, torch.float32).shapes != self.layout.shapes:
            raise ValueError("the encoder's tensors have changed their names or shapes")
        kept = self._kept(embeddings)
        for name, tensor in kept.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"{name} has values that are not finite in {type_name(tensor.dtype)}, whose largest "
                    f"number is {torch.finfo(tensor.dtype).max:.4g}; run encode-prompts with another --dtype"
                )
        self._pending.append((keys, kept))
        self._pending_bytes += sum(tensor.nbytes for tensor in kept.values())
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added as a shard, at once or not at all.

        Raises:
            UserError: the disk is full, or the folder can't be written.
        """
        if not self._pending:
            return
        keys = np.concatenate([keys for keys, _ in self._pending])
        tensors = {name: torch.cat([kept[name] for _, kept in self._pending]) for name in self._pending[0][1]}
        tensors[KEYS] = torch.from_numpy(keys.view(np.uint8).reshape(len(keys), -1).copy())
        tensors[CHECKS] = self._checks(tensors)
        path = self.folder / f"shard-{self._next:05d}.safetensors"
        partial = path.with_suffix(_PARTIAL)
        try:
            if not (self.folder / MANIFEST).exists():
                self._write_manifest()
            partial.write_bytes(save(tensors))  # save_file would make it readable by its owner only
            _settle(partial, path)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        finally:
            partial.unlink(missing_ok=True)
        # only now: what was interrupted before is written when the interruption is handled
        self._next += 1
        self._known = np.concatenate([self._known, keys])
        self._pending, self._pending_bytes = [], 0

    def _kept(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of the encoder's output, on the CPU: with a mask, the unmasked tokens in one row."""
        kept = {name: x.detach().to("cpu", self.layout.dtypes[name]) for name, x in embeddings.items()}
        if self.layout.masked:
            mask = kept[MASK].bool()
            kept[TOKENS] = kept[TOKENS][mask]
            kept[ENDS] = mask.sum(1)  # lengths; ends once the shard is complete
        return {name: tensor.contiguous() for name, tensor in kept.items()}

    def _checks(self, tensors: dict[str, Tensor]) -> Tensor:
        """Check sums [n]; turns lengths of texts into their ends."""
        count = len(tensors[KEYS])
        whole = {name: x for name, x in tensors.items() if name in self.layout.shapes}
        texts: list[Tensor] = []
        if self.layout.masked:
            texts = list(whole.pop(TOKENS).split(tensors[ENDS].tolist()))
            tensors[ENDS] = tensors[ENDS].cumsum(0)
        keys, checks = tensors[KEYS].numpy(), []
        for number in range(count):
            row = {name: tensor[number] for name, tensor in whole.items()}
            checks.append(check_sum(keys[number], row | ({TOKENS: texts[number]} if texts else {})))
        return torch.tensor(checks)

    def _write_manifest(self) -> None:
        content = {"format": FORMAT, "encoder": dict(self.encoder), "tensors": self.layout.to_json()}
        partial = self.folder / f"{MANIFEST}{_PARTIAL}"
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        _settle(partial, self.folder / MANIFEST)

    def _check_same(self, cache: PromptCache) -> None:
        """Raise unless the folder's cache is of the same encoder and kind."""
        cache.check_encoder(self.encoder)
        if cache.layout != self.layout:
            raise UserError(
                f"the cache {self.folder} keeps {_described(cache.layout)}, and wanted is "
                f"{_described(self.layout)}; give the same --dtype, or another --output"
            )


def readable(size: float) -> str:
    """A number of bytes: 190.9 GiB."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def _described(layout: Layout) -> str:
    return ", ".join(
        f"{name} {list(shape)} {type_name(layout.dtypes[name])}" for name, shape in layout.shapes.items()
    )


def own_names(folder: Path) -> set[str]:
    """What a cache, also an unfinished one, may hold."""
    own = (MANIFEST, _LOCK, f"*{_PARTIAL}", "shard-*.safetensors")
    return {path.name for pattern in own for path in folder.glob(pattern)}


def _settle(partial: Path, path: Path) -> None:
    """Give a file its name once its contents are on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache {folder} can't be written: {first_line(error)}; make room or mend that, and run the same "
        "command again: it goes on where this one ended"
    )
