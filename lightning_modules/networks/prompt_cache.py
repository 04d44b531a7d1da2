"""Text embeddings on disk: written once by `encode-prompts`, memory-mapped and looked up from then on.

A cache folder holds Arrow files, `shard-00000.arrow` and so on, with a row for each text: `key`, a hash of
the text, and each of the encoder's tensors as bytes. Shapes and types of these, and what is known of the
encoder, are JSON in the metadata of each file. Where the encoder gives a mask of tokens, only the unmasked
ones are kept.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyarrow import feather
from safetensors import safe_open
from torch import Tensor

from common.errors import UserError, first_line
from common.files import LOCK, check_output_folder, claimed, unfinished, written_whole
from common.hashing import hash_file, hash_json, hash_tensors
from lightning_modules.diffusion.transfer import to_device
from lightning_modules.networks.backbones import TextToImageParts
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder
from lightning_modules.networks.loading import load_parts, weight_files
from lightning_modules.networks.model_names import model_name

FORMAT = 3
"""Raised when caches of an older version of this file must not be used."""
SHARD_BYTES = 256 * 2**20
"""Size of a shard: what a killed process has to do again, and what damage to a file costs."""
SHARDS = "shard-*.arrow"
KEY, TOKENS, MASK = "key", "encoder_hidden_states", "encoder_attention_mask"
_METADATA = b"prompt_cache"
_UNIMPORTANT = ("architectures", "dtype", "torch_dtype", "transformers_version")

Keys = NDArray[np.bytes_]
Rows = NDArray[np.int64]


def text_keys(texts: Sequence[str]) -> Keys:
    """128-bit hashes of texts [n]; among a billion texts two are alike with a probability of 1e-21."""
    encoded = (text.encode("utf-8", "surrogatepass") for text in texts)
    return np.array([hashlib.blake2b(x, digest_size=16).digest() for x in encoded], "S16")


@dataclass(frozen=True)
class Layout:
    """What a cache keeps of each text: shape (without the batch) and type of the encoder's tensors."""

    shapes: dict[str, list[int]]
    dtypes: dict[str, str]

    @classmethod
    def of(cls, example: Mapping[str, Tensor], dtype: str) -> Layout:
        """That of an encoder's output [B, …], numbers with a point kept in `dtype`."""
        kinds = {name: dtype if x.is_floating_point() else str(x.dtype)[6:] for name, x in example.items()}
        return cls({name: list(x.shape[1:]) for name, x in example.items()}, kinds)

    def __str__(self) -> str:
        return ", ".join(f"{name} {shape} {self.dtypes[name]}" for name, shape in self.shapes.items())

    def kept(self, embeddings: Mapping[str, Tensor]) -> list[dict[str, bytes]]:
        """What is kept of an encoder's output [n, …], for each text.

        Raises:
            UserError: a number doesn't fit the type.
        """
        types = {name: getattr(torch, dtype) for name, dtype in self.dtypes.items()}
        cast = {name: x.detach().to("cpu", types[name]) for name, x in embeddings.items()}
        for name, x in cast.items():
            if x.is_floating_point() and not x.isfinite().all():
                raise UserError(
                    f"{name} has values that are not finite in {self.dtypes[name]}, whose largest number is "
                    f"{torch.finfo(x.dtype).max:.4g}; run encode-prompts with another --dtype"
                )
        rows = []
        for values in zip(*cast.values(), strict=True):
            row = dict(zip(cast, values, strict=True))
            if MASK in row:
                row[TOKENS] = row[TOKENS][row[MASK].bool()]
            rows.append({k: x.reshape(-1).view(torch.uint8).numpy().tobytes() for k, x in row.items()})
        return rows


class PromptCache:
    """The embeddings in a cache folder, found by text.

    It is no module, so that the text encoders stay on the CPU, where they take no accelerator's memory; they
    are loaded only if a prompt is asked for that the cache lacks.

    Args:
        folder: that `encode-prompts` wrote.
        load: makes the encoder.

    Attributes:
        encoder: what is known of the encoder that made it; its `hash` names it.
        layout: what is kept of each text.
        table: all shards one after the other, memory-mapped.
        keys: hashes of all texts [n], in the order of the rows.

    Raises:
        UserError: there is no cache, another version wrote it, or a file is damaged.
    """

    def __init__(self, folder: str | Path, load: Callable[[], PromptEncoder] | None = None) -> None:
        self.folder, self._load = Path(folder), load
        self._encoder: PromptEncoder | None = None
        self.paths = sorted(self.folder.glob(SHARDS))
        if not self.paths:
            raise UserError(
                f"{self.folder} is no cache of prompts (it has no {SHARDS}); make one with cli.py "
                "encode-prompts"
            )
        tables = [_read(path) for path in self.paths]
        told = json.loads(tables[0].schema.metadata[_METADATA])
        if told["format"] != FORMAT:
            raise UserError(
                f"{self.folder} was written by another version; delete it and run encode-prompts again"
            )
        for path, table in zip(self.paths, tables, strict=True):
            if not table.schema.equals(tables[0].schema, check_metadata=True):
                raise _damaged(path, f"it holds other things than {self.paths[0].name}")
        self.encoder: dict[str, Any] = told["encoder"]
        self.layout = Layout(**told["layout"])
        self.table = pa.concat_tables(tables)
        chunks = [np.frombuffer(chunk.buffers()[1], "S16", len(chunk)) for chunk in self.table[KEY].chunks]
        self.keys: Keys = np.concatenate(chunks)
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
        """The embeddings [n, …] of these rows, in memory; zeros for masked tokens and for rows of -1."""
        layout, taken = self.layout, dict[str, Tensor]()
        for name, shape in sorted(layout.shapes.items()):  # the mask before the tokens
            taken[name] = torch.zeros(len(rows), *shape, dtype=getattr(torch, layout.dtypes[name]))
        for place, row in enumerate(rows.tolist()):
            for name, values in taken.items() if row >= 0 else ():
                whole = part = values[place]
                if masked := name == TOKENS and MASK in taken:
                    part = whole[taken[MASK][place].bool()]  # a copy
                data = np.frombuffer(self.table[name][row].as_buffer(), np.uint8)
                part.reshape(-1).view(torch.uint8).numpy()[:] = data
                if masked:
                    whole[taken[MASK][place].bool()] = part
        return taken

    def embed(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What `PromptEncoder.embed_texts` gives [B, …], on this device, numbers with a point in this type.

        Zeros stand where a token is masked, because those embeddings are not kept.
        """
        rows = self.find(text_keys(prompts))
        taken = self.take(rows)
        absent = np.flatnonzero(rows < 0).tolist()
        if absent:
            for name, values in self._encode([prompts[place] for place in absent]).items():
                taken[name] = taken[name].to(values.dtype)
                taken[name][absent] = values
        moved = {name: to_device(values, device) for name, values in taken.items()}
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in moved.items()}

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        if self._encoder is None:
            assert self._load is not None
            warnings.warn(
                f"{prompts[0]!r} is not in the cache {self.folder}; such prompts are encoded on the CPU, "
                "which takes longer (told once). To add them, run encode-prompts with their file, too.",
                stacklevel=2,
            )
            self._encoder = self._load()
        return self._encoder.embed_texts(prompts)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged ({reason}); delete this file and run encode-prompts as before, which makes only "
        "what is missing"
    )


def _read(path: Path) -> pa.Table:
    """A shard, memory-mapped: nothing of its embeddings is read before it is asked for."""
    try:
        table = feather.read_table(path, memory_map=True)
        table.validate(full=True)  # what the file says of itself must lie in it
        json.loads(table.schema.metadata[_METADATA])
        return table
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError) as error:
        raise _damaged(path, first_line(error)) from error


# --- writing ----------------------------------------------------------------------------------------


def own_names(folder: Path) -> set[str]:
    """What a cache, also an unfinished one, may hold."""
    return {path.name for pattern in (SHARDS, LOCK, ".shard-*.partial") for path in folder.glob(pattern)}


@contextmanager
def cache_writer(
    folder: Path, encoder: Mapping[str, Any], layout: Layout, shard_bytes: int = SHARD_BYTES
) -> Iterator[PromptCacheWriter]:
    """Yield a writer that begins a cache or goes on with one; at the end, however it comes, all is on disk.

    Args:
        folder: of the cache.
        encoder: see `text_identity`.
        layout: what to keep of its output.
        shard_bytes: size of a file; the last one is smaller.

    Raises:
        UserError: the folder holds other things, or a cache of another encoder, type or shape; another
            process is writing there; a file of it is damaged.
    """
    target = check_output_folder(folder, own_names)
    with claimed(target):
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
        self.folder, self.layout, self.shard_bytes = folder, layout, shard_bytes
        self._known: Keys = np.empty(0, "S16")
        self._next = 0
        self._pending: dict[str, list[bytes]] = {}
        self._pending_bytes = 0
        if any(folder.glob(SHARDS)):
            cache = PromptCache(folder)
            cache.check_encoder(encoder)
            if cache.layout != layout:
                raise UserError(
                    f"the cache {folder} keeps {cache.layout}, and wanted is {layout}; give the same "
                    "--dtype, or another --output"
                )
            encoder, self._known = cache.encoder, cache.keys
            self._next = 1 + int(cache.paths[-1].stem.split("-")[1])
        told = json.dumps({"format": FORMAT, "encoder": dict(encoder), "layout": asdict(layout)})
        columns = [(KEY, pa.binary(16)), *((name, pa.large_binary()) for name in layout.shapes)]
        self._schema = pa.schema(columns, metadata={_METADATA: told})

    def missing(self, keys: Keys) -> Rows:
        """Places of the hashes that the cache lacks, in order, each hash once."""
        places = np.sort(np.unique(keys, return_index=True)[1])
        return places[~np.isin(keys[places], self._known)]

    def add(self, keys: Keys, embeddings: Mapping[str, Tensor]) -> None:
        """Take the output [n, …] of the encoder for texts of these hashes [n], which the cache lacks.

        Raises:
            UserError: a number doesn't fit the type, the disk is full, or the folder can't be written.
        """
        # a bytes string of numpy's has lost its zeros at the end
        for key, row in zip(keys.view("V16").tolist(), self.layout.kept(embeddings), strict=True):
            for name, value in {KEY: key, **row}.items():
                self._pending.setdefault(name, []).append(value)
                self._pending_bytes += len(value)
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added as a shard, at once or not at all."""
        if not self._pending:
            return
        table = pa.table(self._pending, schema=self._schema)
        path = self.folder / f"shard-{self._next:05d}.arrow"
        try:
            with written_whole(path) as partial:
                feather.write_feather(table, str(partial), compression="uncompressed")
        except OSError as error:
            raise UserError(
                f"the cache {self.folder} can't be written: {first_line(error)}; make room or mend that, and "
                "run the same command again: it goes on where this one ended"
            ) from error
        # only now: what was interrupted before is written when the interruption is handled
        self._next += 1
        self._known = np.concatenate([self._known, np.array(self._pending[KEY], "S16")])
        self._pending, self._pending_bytes = {}, 0


# --- the encoder ------------------------------------------------------------------------------------


def use_prompt_cache(encoder: PromptEncoder, parts: TextToImageParts, folder: str | Path) -> None:
    """Let the encoder of a model's parts look prompts up in a cache; it needs no weights of text encoders.

    Raises:
        UserError: there is no cache in the folder, or it was made with another encoder.
    """

    def load() -> PromptEncoder:
        whole = load_parts(parts.path, without=("denoiser", "vae"))
        return whole.backbone.prompt_encoder(whole)

    cache = PromptCache(Path(folder).expanduser(), load)
    cache.check_encoder(text_identity(parts, encoder))
    encoder.look_up_in(cache)


def text_identity(parts: TextToImageParts, encoder: PromptEncoder) -> dict[str, Any]:
    """Which text encoders a model has: `model` (a path, for messages), `encoder`, `max_length`, and a `hash`.

    The hash is of encoder and length, and of weights, settings and tokenizers of all text encoders. Weights
    are read from their files, one tensor at a time, so that they need not be loaded. The same numbers in
    another type are another encoder.
    """
    model = model_name(parts.path)
    told = {"encoder": type(encoder).__name__, "max_length": encoder.max_length}
    content = told | {
        "weights": [
            _weights_hash(weight_files(Path(model.name) / name, model.variant))
            for name in parts.backbone.present(parts.index, parts.backbone.text_encoders)
        ],
        "settings": [_settings(network.config) for network in parts.text_encoders],
        "tokenizers": [_rules(tokenizer) for tokenizer in parts.tokenizers],
    }
    return {"model": parts.path, **told, "hash": hash_json(content)}


def _weights_hash(files: list[Path]) -> str:
    """SHA-256 of all weights of a network by name, whatever its files are called."""
    digests: dict[str, str] = {}
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        for path in files:
            if path.suffix != ".safetensors":
                digests[path.name] = hash_file(path)
                continue
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                hashes = pool.map(lambda name: hash_tensors({"": file.get_tensor(name)}), names)  # noqa: B023
                digests |= dict(zip(names, hashes, strict=True))
    return hash_json(digests)


def _settings(config: Any) -> dict[str, str]:
    """What differs from the defaults of the configuration's class, apart from how it was saved."""
    return {name: str(value) for name, value in _important(config.to_diff_dict()).items()}


def _important(settings: dict[Any, Any]) -> dict[Any, Any]:
    """The same inside the settings of a network's parts, as Qwen 2.5-VL has them."""
    return {
        name: _important(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _UNIMPORTANT and not str(name).startswith("_")
    }


def _rules(tokenizer: Any) -> dict[str, Any]:
    """All rules of a tokenizer; cutting and padding are the caller's and come and go with calls."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
