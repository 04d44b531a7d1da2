"""Results that cost minutes and never change, kept by the hash of what they were computed from.

Looked up first among those shipped with the project (``assets/cache``, read only), then in the user's cache
folder (``$ONE_STEP_CACHE``, default ``~/.cache/one-step-distillation``), where new ones go. An entry is one
safetensors file: its key and its JSON value in the header, tensors if there are any, and a hash over all of
it.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.files import ROOT, user_cache_dir, written_whole
from common.hashing import hash_json, hash_tensors

log = logging.getLogger(__name__)
SHIPPED = ROOT / "assets" / "cache"


class Entry(NamedTuple):
    """A stored result: a JSON value and named tensors."""

    value: dict[str, Any]
    tensors: dict[str, Tensor]


class ResultCache:
    """Entries by (kind, key).

    Args:
        user_dir: where new entries go (default: ``user_cache_dir()``).
        shipped_dir: looked up first, never written.
    """

    def __init__(self, user_dir: Path | None = None, shipped_dir: Path | None = SHIPPED) -> None:
        self.user_dir = user_dir if user_dir is not None else user_cache_dir()
        self.shipped_dir = shipped_dir

    def file_name(self, kind: str, key: Mapping[str, Any]) -> str:
        """``<kind>-<16 digits of the hash of the key>.safetensors``."""
        return f"{kind}-{hash_json(key)[:16]}.safetensors"

    def get(self, kind: str, key: Mapping[str, Any]) -> Entry | None:
        """The stored entry, or None. A damaged file is named in a warning and counts as absent."""
        for folder in (self.shipped_dir, self.user_dir):
            path = folder / self.file_name(kind, key) if folder is not None else None
            if path is not None and path.is_file() and (entry := _read(path, key)) is not None:
                return entry
        return None

    def put(
        self,
        kind: str,
        key: Mapping[str, Any],
        value: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Path | None:
        """Store an entry, whole or not at all; returns its file.

        A cache folder that can't be written costs time, not the run: it is named in a warning and None
        returned.
        """
        path = self.user_dir / self.file_name(kind, key)
        # A file without any tensor is no valid safetensors file for every reader, so there is always one.
        content = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
        content = content or {"empty": torch.zeros(1)}
        words = {"key": json.dumps(key, sort_keys=True), "value": json.dumps(value, sort_keys=True)}
        words["hash"] = _hash(words, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as partial:
                partial.write_bytes(save(content, metadata=words))
        except OSError as error:
            log.warning("%s can't be written: this result will be computed again next time: %s", path, error)
            return None
        return path


def _hash(words: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return hash_json({"key": words["key"], "value": words["value"], "tensors": hash_tensors(tensors)})


def _read(path: Path, key: Mapping[str, Any]) -> Entry | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            words = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if words["hash"] != _hash(words, tensors) or words["key"] != json.dumps(key, sort_keys=True):
            raise KeyError("it does not match its hash or its key")
    except (SafetensorError, OSError, KeyError) as error:
        log.warning("%s can't be used (%s); its result is computed again", path, error)
        return None
    tensors.pop("empty", None)
    return Entry(json.loads(words["value"]), tensors)
