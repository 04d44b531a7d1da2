"""Which text encoders a model has: a hash of all that decides how they encode a prompt."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_modules.networks.backbones import TextToImageParts
from lightning_modules.networks.backbones.prompts import PromptEncoder

_UNIMPORTANT = ("architectures", "dtype", "torch_dtype", "transformers_version")
_PLAIN = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")


def text_identity(parts: TextToImageParts, encoder: PromptEncoder) -> dict[str, Any]:
    """The `model` (a path, for messages), its `encoder` and `max_length`, and a `hash`.

    The hash is of encoder and length, and of weights, settings and tokenizers of all text encoders.

    Weights are read from their files, one tensor at a time, so that they need not be loaded. The same numbers
    in another type are another encoder.
    """
    family, folder = parts.backbone, Path(parts.path)
    content = {
        "encoder": type(encoder).__name__,
        "max_length": encoder.max_length,
        "weights": [weights_hash(folder / name) for name in family.text_encoders],
        "settings": [_settings(network.config) for network in parts.text_encoders],
        "tokenizers": [_tokenizer(tokenizer) for tokenizer in parts.tokenizers],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    told = {name: content[name] for name in ("encoder", "max_length")}
    return {"model": parts.path, **told, "hash": digest}


def weights_hash(folder: Path) -> str:
    """SHA-256 of all weights of a network's folder by name, whatever its files are called and hold beside."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    files = [path for path in files if _PLAIN.fullmatch(path.name)] or files  # not their variants (fp16)
    tensors = [path for path in files if path.suffix == ".safetensors"]
    with ThreadPoolExecutor() as pool:
        if not tensors:
            return _joined(dict(zip([path.name for path in files], pool.map(_file_hash, files), strict=True)))
        digests: dict[str, str] = {}
        for path in tensors:
            with safe_open(path, "pt") as file:
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            digests |= dict(zip(held, pool.map(_tensor_hash, held.values()), strict=True))
    return _joined(digests)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _joined(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _settings(config: Any) -> dict[str, Any]:
    """What differs from the defaults of the configuration's class, apart from how it was saved."""
    different = config.to_diff_dict().items()
    return {k: v for k, v in different if k not in _UNIMPORTANT and not k.startswith("_")}


def _tokenizer(tokenizer: Any) -> str:
    """A hash of all rules of a tokenizer; cutting and padding are the caller's and come and go with calls."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
