"""Text embeddings on disk: written once by `encode-prompts`, memory-mapped from then on.

A cache folder holds `cache.json` (which encoder made it; names, shapes and types of its tensors) and shards,
`shard-00000.safetensors` and so on. A shard of n texts has, besides the encoder's tensors [n, …], `keys`
[n, 16] (a hash of each text) and `checks` [n] (a check sum of each text's numbers). Where the encoder gives a
mask of tokens, only the unmasked ones are kept, those of all texts in one row; `ends` [n] says up to where.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError, first_line

FORMAT = 1
"""Raised when caches of an older version of this file must not be used."""
MANIFEST = "cache.json"
TOKENS, MASK = "encoder_hidden_states", "encoder_attention_mask"
KEYS, CHECKS, ENDS = "keys", "checks", "ends"
_KEY_BYTES = 16

Keys = NDArray[np.bytes_]
Rows = NDArray[np.int64]


def text_keys(texts: Sequence[str]) -> Keys:
    """128-bit hashes of texts [n]; among a billion texts two are alike with a probability of 1e-21."""
    encoded = (text.encode("utf-8", "surrogatepass") for text in texts)
    return np.array([hashlib.blake2b(x, digest_size=_KEY_BYTES).digest() for x in encoded], "S16")


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
        return {
            name: {"shape": list(shape), "dtype": type_name(self.dtypes[name])}
            for name, shape in self.shapes.items()
        }

    @property
    def masked(self) -> bool:
        """Whether only unmasked tokens are kept."""
        return MASK in self.shapes and TOKENS in self.shapes

    def bytes_per_text(self, tokens: float | None = None) -> float:
        """Size of a text with so many unmasked tokens (None: all)."""
        sizes = {name: math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()}
        if not self.masked:
            return sum(sizes.values()) + _KEY_BYTES + 8
        longest = self.shapes[TOKENS][0]
        masked = sizes.pop(TOKENS) * (longest if tokens is None else tokens) / longest
        return sum(sizes.values()) + masked + _KEY_BYTES + 16


def type_name(dtype: torch.dtype) -> str:
    """As people write it: float16."""
    return str(dtype).removeprefix("torch.")


def check_sum(key: NDArray[np.uint8], row: Mapping[str, Tensor]) -> int:
    """CRC-32 of a text's hash and its numbers."""
    value = zlib.crc32(key.tobytes())
    for name in sorted(row):
        value = zlib.crc32(row[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `cache.json` says.

    Raises:
        UserError: there is none, it is damaged, or another version wrote it.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT and isinstance(manifest["encoder"]["hash"], str):
            Layout.from_json(manifest["tensors"])
            return manifest
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is no cache of prompts (it has no {MANIFEST}); make one with cli.py encode-prompts"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not what encode-prompts writes; bring it back, or delete {folder} and run "
            "encode-prompts again"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({first_line(error)}); bring it back, or delete {folder} and run "
            "encode-prompts again"
        ) from error
    raise UserError(f"{folder} was written by another version; delete it and run encode-prompts again")


class Shard:
    """One file of a cache, memory-mapped: nothing but hashes is read before it is asked for.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            self.keys: NDArray[np.uint8] = tensors.pop(KEYS).numpy()
            self.checks: Rows = tensors.pop(CHECKS).numpy()
            self.ends: Rows = tensors.pop(ENDS).numpy() if layout.masked else np.arange(len(self.keys))
        except (OSError, SafetensorError, KeyError) as error:
            raise self.damaged(first_line(error)) from error
        whole = {name: x for name, x in tensors.items() if not (layout.masked and name == TOKENS)}
        shapes = {name: (len(self.keys), *layout.shapes[name]) for name in layout.shapes if name in whole}
        if tensors.keys() != layout.shapes.keys() or shapes != {n: tuple(x.shape) for n, x in whole.items()}:
            raise self.damaged(f"its tensors are not those of {MANIFEST}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.keys)

    def row(self, number: int) -> dict[str, Tensor]:
        """The tensors of one text as they are kept (tokens [valid, D] where there is a mask), not copied.

        Raises:
            UserError: they are not what was written.
        """
        row = {name: tensor[number] for name, tensor in self.tensors.items() if name != TOKENS}
        if self.layout.masked:
            begin = 0 if number == 0 else int(self.ends[number - 1])
            row[TOKENS] = self.tensors[TOKENS][begin : int(self.ends[number])]
        elif TOKENS in self.tensors:
            row[TOKENS] = self.tensors[TOKENS][number]
        if check_sum(self.keys[number], row) != self.checks[number]:
            raise self.damaged(f"the check sum of text {number} is another")
        return row

    def damaged(self, reason: str) -> UserError:
        """The error to raise."""
        return UserError(
            f"{self.path} is damaged ({reason}); delete this file and run encode-prompts as before, which "
            "makes only what is missing"
        )


class PromptCache:
    """The embeddings in a cache folder, found by text.

    Attributes:
        encoder: what is known of the encoder that made it; its `hash` names it.
        layout: what is kept of each text.
        keys: hashes of all texts [n], in the order of the rows.

    Raises:
        UserError: there is no cache, another version wrote it, or a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.encoder: dict[str, Any] = manifest["encoder"]
        self.layout = Layout.from_json(manifest["tensors"])
        paths = sorted(self.folder.glob("shard-*.safetensors"))
        self.shards = [Shard(path, self.layout) for path in paths]
        hashes = [shard.keys.reshape(-1).view("S16") for shard in self.shards]
        self.keys: Keys = np.concatenate(hashes) if hashes else np.empty(0, "S16")
        self._ends = np.cumsum([len(shard) for shard in self.shards])
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
                f"the cache {self.folder} was made with the text encoder of {made.get('model')} "
                f"({made['hash'][:12]}); that of {model} ({encoder['hash'][:12]}) has other weights, another "
                f"tokenizer or length. Run encode-prompts --model {model} with another --output"
            )

    def find(self, keys: Keys) -> Rows:
        """Rows of these hashes [n]; -1 where there is none."""
        if not len(self):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self) - 1)
        return np.where(self._sorted[places] == keys, self._order[places], -1)

    def take(self, rows: Rows) -> dict[str, Tensor]:
        """The embeddings [n, …] of these rows, in memory; zeros for masked tokens and for rows of -1.

        Raises:
            UserError: a file is damaged.
        """
        shapes, dtypes = self.layout.shapes, self.layout.dtypes
        taken = {name: torch.zeros(len(rows), *shape, dtype=dtypes[name]) for name, shape in shapes.items()}
        shards = np.searchsorted(self._ends, rows, side="right").tolist()
        for place, (row, number) in enumerate(zip(rows.tolist(), shards, strict=True)):
            if row < 0:
                continue
            shard = self.shards[number]
            kept = shard.row(row - int(self._ends[number]) + len(shard))
            for name, tensor in kept.items():
                if self.layout.masked and name == TOKENS:
                    taken[name][place, kept[MASK].bool()] = tensor
                else:
                    taken[name][place] = tensor
        return taken
