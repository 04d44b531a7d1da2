"""Text embeddings on disk: written once by `encode-prompts`, memory-mapped from then on.

A cache folder holds Arrow files, `shard-00000.arrow` and so on, with a row for each text: `key` (a hash of
the text), `check` (a check sum of the row), and each of the encoder's tensors as bytes. Shapes and types of
these, and what is known of the encoder, are JSON in the metadata of each file. Where the encoder gives a mask
of tokens, only the unmasked ones are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError, first_line
from common.files import check_output_folder, unfinished, written_whole

FORMAT = 2
"""Raised when caches of an older version of this file must not be used."""
SHARD_BYTES = 256 * 2**20
"""Size of a shard: what a killed process has to do again, and what damage to a file costs."""
SHARDS = "shard-*.arrow"
TOKENS, MASK = "encoder_hidden_states", "encoder_attention_mask"
KEY, CHECK = "key", "check"
_KEY_BYTES = 16
_LOCK = ".lock"
_METADATA = b"prompt_cache"
_FORMER_MANIFEST = "cache.json"  # of format 1, whose shards were safetensors

Keys = NDArray[np.bytes_]
Rows = NDArray[np.int64]


def text_keys(texts: Sequence[str]) -> Keys:
    """128-bit hashes of texts [n]; among a billion texts two are alike with a probability of 1e-21."""
    encoded = (text.encode("utf-8", "surrogatepass") for text in texts)
    return np.array([hashlib.blake2b(x, digest_size=_KEY_BYTES).digest() for x in encoded], "S16")


def check_sum(key: bytes, values: Mapping[str, Any]) -> int:
    """CRC-32 of a text's hash and the bytes of its tensors."""
    value = zlib.crc32(key)
    for name in sorted(values):
        value = zlib.crc32(values[name], value)
    return value


@dataclass(frozen=True)
class Layout:
    """What a cache keeps of each text.

    Attributes:
        shapes: of the encoder's tensors, without the batch.
        dtypes: in which they are kept.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, example: Mapping[str, Tensor], dtype: torch.dtype) -> Layout:
        """That of an encoder's output [B, …], numbers with a point kept in `dtype`."""
        kinds = {name: dtype if x.is_floating_point() else x.dtype for name, x in example.items()}
        return cls({name: tuple(x.shape[1:]) for name, x in example.items()}, kinds)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Layout:
        """From what `to_json` gave."""
        dtypes = {name: getattr(torch, tensor["dtype"]) for name, tensor in content.items()}
        return cls({name: tuple(tensor["shape"]) for name, tensor in content.items()}, dtypes)

    def to_json(self) -> dict[str, Any]:
        """Shape and type of each tensor, by name."""
        types = {name: str(dtype).removeprefix("torch.") for name, dtype in self.dtypes.items()}
        return {name: {"shape": list(self.shapes[name]), "dtype": types[name]} for name in self.shapes}

    def __str__(self) -> str:
        return ", ".join(f"{name} {kept['shape']} {kept['dtype']}" for name, kept in self.to_json().items())

    @property
    def masked(self) -> bool:
        """Whether only unmasked tokens are kept."""
        return MASK in self.shapes and TOKENS in self.shapes

    def bytes_per_text(self, tokens: float | None = None) -> float:
        """Size of a text with so many unmasked tokens (None: all)."""
        sizes = {name: math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()}
        if self.masked:
            longest = self.shapes[TOKENS][0]
            sizes[TOKENS] *= (longest if tokens is None else tokens) / longest  # type: ignore[assignment]
            sizes["where the tokens end"] = 8
        return sum(sizes.values()) + _KEY_BYTES + 8

    def schema(self, encoder: Mapping[str, Any]) -> pa.Schema:
        """Columns and metadata of a shard with the embeddings of this encoder."""
        told = {"format": FORMAT, "encoder": dict(encoder), "tensors": self.to_json()}
        columns = [pa.field(KEY, pa.binary(_KEY_BYTES)), pa.field(CHECK, pa.int64())]
        for name, shape in self.shapes.items():
            size = math.prod(shape) * self.dtypes[name].itemsize
            varies = self.masked and name == TOKENS
            columns.append(pa.field(name, pa.large_binary() if varies else pa.binary(size)))
        return pa.schema(columns, metadata={_METADATA: json.dumps(told)})

    def kept(self, embeddings: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What is kept of an encoder's output [n, …], for each text, on the CPU."""
        kept = {name: x.detach().to("cpu", self.dtypes[name]) for name, x in embeddings.items()}
        rows = [dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True)]
        if self.masked:
            for row in rows:
                row[TOKENS] = row[TOKENS][row[MASK].bool()]
        return rows

    def put_back(self, place: int, values: Mapping[str, Any], into: Mapping[str, Tensor]) -> None:
        """Write the bytes of a text's tensors to a place in tensors [n, …] of zeros."""
        for name, data in sorted(values.items()):  # the mask before the tokens
            whole = into[name][place]
            part = whole
            if self.masked and name == TOKENS:
                mask = into[MASK][place].bool()
                part = whole[mask]  # a copy
            if len(data):
                part.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
            if part is not whole:
                whole[mask] = part


class PromptCache:
    """The embeddings in a cache folder, found by text.

    Attributes:
        encoder: what is known of the encoder that made it; its `hash` names it.
        layout: what is kept of each text.
        table: all shards one after the other, memory-mapped.
        keys: hashes of all texts [n], in the order of the rows.

    Raises:
        UserError: there is no cache, another version wrote it, or a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = sorted(self.folder.glob(SHARDS))
        if not self.paths and not (self.folder / _FORMER_MANIFEST).exists():
            raise UserError(
                f"{self.folder} is no cache of prompts (it has no {SHARDS}); make one with cli.py "
                "encode-prompts"
            )
        tables = [_read(path) for path in self.paths]
        told = _told(tables[0].schema) if tables else {}
        if told.get("format") != FORMAT:
            raise UserError(
                f"{self.folder} was written by another version; delete it and run encode-prompts again"
            )
        for path, table in zip(self.paths, tables, strict=True):
            if not table.schema.equals(tables[0].schema, check_metadata=True):
                raise damaged(path, f"it holds other things than {self.paths[0].name}")
        self.encoder: dict[str, Any] = told["encoder"]
        self.layout = Layout.from_json(told["tensors"])
        self.table = pa.concat_tables(tables)
        chunks = [np.frombuffer(chunk.buffers()[1], "S16", len(chunk)) for chunk in self.table[KEY].chunks]
        self.keys: Keys = np.concatenate(chunks)
        self._ends = np.cumsum([len(table) for table in tables])
        self._order = np.argsort(self.keys, kind="stable")
        self._sorted = self.keys[self._order]

    def __len__(self) -> int:
        return len(self.keys)

    def check_encoder(self, encoder: Mapping[str, Any]) -> None:
        """Make sure that an encoder (see `text_identity`) is the one that made this cache.

        Raises:
            UserError: it is another; both are named.
        """
        made, model = self.encoder, encoder["model"]
        if made["hash"] != encoder["hash"]:
            raise UserError(
                f"the cache {self.folder} was made with the text encoder of {made['model']} "
                f"({made['hash'][:12]}); that of {model} ({encoder['hash'][:12]}) has other weights, another "
                f"tokenizer or length. Run encode-prompts --model {model} with another --output"
            )

    def find(self, keys: Keys) -> Rows:
        """Rows of these hashes [n]; -1 where there is none."""
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self) - 1)
        return np.where(self._sorted[places] == keys, self._order[places], -1)

    def take(self, rows: Rows) -> dict[str, Tensor]:
        """The embeddings [n, …] of these rows, in memory; zeros for masked tokens and for rows of -1.

        Raises:
            UserError: what is read is not what was written.
        """
        shapes, dtypes = self.layout.shapes, self.layout.dtypes
        taken = {name: torch.zeros(len(rows), *shape, dtype=dtypes[name]) for name, shape in shapes.items()}
        for place, row in enumerate(rows.tolist()):
            if row < 0:
                continue
            values = {name: self.table[name][row].as_buffer() for name in shapes}
            if check_sum(self.table[KEY][row].as_buffer(), values) != self.table[CHECK][row].as_py():
                path = self.paths[np.searchsorted(self._ends, row, side="right")]
                raise damaged(path, "the check sum of a text is another")
            self.layout.put_back(place, values, taken)
        return taken


def damaged(path: Path, reason: str) -> UserError:
    """The error to raise."""
    return UserError(
        f"{path} is damaged ({reason}); delete this file and run encode-prompts as before, which makes only "
        "what is missing"
    )


def _read(path: Path) -> pa.Table:
    """A shard, memory-mapped: nothing of its embeddings is read before it is asked for.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            table = reader.read_all()
        table.validate(full=True)  # what the file says of itself must lie in it
        told = _told(table.schema)
        if told["format"] == FORMAT:
            wanted = Layout.from_json(told["tensors"]).schema(told["encoder"])
            if not (len(table) and table.schema.equals(wanted, check_metadata=True)):
                raise ValueError("it is not what encode-prompts writes")
        return table
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(path, first_line(error)) from error


def _told(schema: pa.Schema) -> dict[str, Any]:
    """What a shard says of its layout and encoder."""
    told: dict[str, Any] = json.loads(schema.metadata[_METADATA])
    return told


# --- writing ----------------------------------------------------------------------------------------


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
        held = FileLock(target / _LOCK).acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process is writing the cache {folder}; wait for it to end") from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    with held:
        for leftover in unfinished(target):  # of a process that was killed
            leftover.unlink()
        writer = PromptCacheWriter(target, encoder, layout, shard_bytes)
        try:
            yield writer
        finally:
            writer.flush()


class PromptCacheWriter:
    """Adds texts to a cache folder, a shard at a time; see `cache_writer`."""

    def __init__(self, folder: Path, encoder: Mapping[str, Any], layout: Layout, shard_bytes: int) -> None:
        self.folder, self.encoder, self.layout, self.shard_bytes = folder, encoder, layout, shard_bytes
        self._known: Keys = np.empty(0, "S16")
        self._next = 0
        self._pending: dict[str, list[Any]] = {}
        self._pending_bytes = 0
        if own_names(folder) - {_LOCK}:
            cache = PromptCache(folder)
            self._check_same(cache)
            self.encoder, self._known = cache.encoder, cache.keys
            self._next = 1 + int(cache.paths[-1].stem.split("-")[1])

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
        rows = self.layout.kept(embeddings)
        for name, tensor in ((name, tensor) for row in rows for name, tensor in row.items()):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"{name} has values that are not finite in {str(tensor.dtype).removeprefix('torch.')}, "
                    f"whose largest number is {torch.finfo(tensor.dtype).max:.4g}; run encode-prompts with "
                    "another --dtype"
                )
        # a bytes string of numpy's has lost its zeros at the end
        for key, row in zip(keys.view("V16").tolist(), rows, strict=True):
            values: dict[str, Any] = {
                name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                for name, tensor in row.items()
            }
            for name, value in {KEY: key, CHECK: check_sum(key, values), **values}.items():
                self._pending.setdefault(name, []).append(value)
            self._pending_bytes += sum(map(len, values.values()))
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added as a shard, at once or not at all.

        Raises:
            UserError: the disk is full, or the folder can't be written.
        """
        if not self._pending:
            return
        table = pa.table(self._pending, schema=self.layout.schema(self.encoder))
        try:
            with (
                written_whole(self.folder / f"shard-{self._next:05d}.arrow") as partial,
                pa.OSFile(str(partial), "wb") as file,
                pa.ipc.new_file(file, table.schema) as shard,
            ):
                shard.write_table(table)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        # only now: what was interrupted before is written when the interruption is handled
        self._next += 1
        self._known = np.concatenate([self._known, np.array(self._pending[KEY], "S16")])
        self._pending, self._pending_bytes = {}, 0

    def _check_same(self, cache: PromptCache) -> None:
        """Raise unless the folder's cache is of the same encoder and kind."""
        cache.check_encoder(self.encoder)
        if cache.layout != self.layout:
            raise UserError(
                f"the cache {self.folder} keeps {cache.layout}, and wanted is {self.layout}; give the same "
                "--dtype, or another --output"
            )


def readable(size: float) -> str:
    """A number of bytes: 190.9 GiB."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def own_names(folder: Path) -> set[str]:
    """What a cache, also an unfinished or a former version's one, may hold."""
    own = ("shard-*", "cache.json", _LOCK, ".shard-*.partial")
    return {path.name for pattern in own for path in folder.glob(pattern)}


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache {folder} can't be written: {first_line(error)}; make room or mend that, and run the same "
        "command again: it goes on where this one ended"
    )
