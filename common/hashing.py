"""Content hashes: what a cached number was computed from, whatever the file was called."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_IGNORED = {".md", ".png", ".jpg", ".html"}
_IGNORED_NAMES = {"LICENSE"}


def hash_texts(texts: Sequence[str]) -> str:
    """SHA-256 of an ordered list of texts, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


def hash_json(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value; the order of the keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's contents."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors; the order of the names does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def hash_folder(folder: str | Path) -> str:
    """SHA-256 of a model folder: names and contents of all but cards, pictures and hidden files.

    Raises:
        FileNotFoundError: it is no folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    digest = hashlib.sha256()
    # parts that models share may be links to folders, into which rglob doesn't look
    found = (Path(place) / name for place, _, names in os.walk(root, followlinks=True) for name in names)
    for path in sorted(found):
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not path.is_file() or hidden or path.suffix in _IGNORED or path.name in _IGNORED_NAMES:
            continue
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the 8-bit values of a saved PNG (rounded to nearest, as diffusers does)."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
