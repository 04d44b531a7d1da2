"""Prompts looked up in a cache while training, in the place of the text encoders that made it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from common.hashing import hash_file, hash_json, hash_tensors
from lightning_modules.diffusion.transfer import to_device
from lightning_modules.networks.backbones import TextToImageParts
from lightning_modules.networks.backbones.prompts import PromptEncoder
from lightning_modules.networks.loading import load_parts, weight_files
from lightning_modules.networks.model_names import model_name
from lightning_modules.networks.prompt_cache.cache import PromptCache, text_keys

_UNIMPORTANT = ("architectures", "dtype", "torch_dtype", "transformers_version")


class CachedTexts:
    """Embeddings of prompts out of a cache; what it lacks is encoded on the CPU.

    It is no module, so that the text encoders stay on the CPU, where they take no accelerator's memory; they
    are loaded only if a prompt is asked for that the cache lacks.

    Args:
        cache: of the encoder that `load` makes.
        load: makes the encoder.
    """

    def __init__(self, cache: PromptCache, load: Callable[[], PromptEncoder]) -> None:
        self.cache = cache
        self._load = load
        self._encoder: PromptEncoder | None = None

    def embed(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What `PromptEncoder.embed_texts` gives [B, …], on this device, numbers with a point in this type.

        Zeros stand where a token is masked, because those embeddings are not kept.

        Raises:
            UserError: a file of the cache is damaged.
        """
        rows = self.cache.find(text_keys(prompts))
        taken = self.cache.take(rows)
        absent = np.flatnonzero(rows < 0).tolist()
        if absent:
            fresh = self._encode([prompts[place] for place in absent])
            for name, values in fresh.items():
                taken[name] = taken[name].to(values.dtype)
                taken[name][absent] = values
        moved = {name: to_device(values, device) for name, values in taken.items()}
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in moved.items()}

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        if self._encoder is None:
            warnings.warn(
                f"{prompts[0]!r} is not in the cache {self.cache.folder}; such prompts are encoded on the "
                "CPU, which takes longer (told once). To add them, run encode-prompts with their file, too.",
                stacklevel=2,
            )
            self._encoder = self._load()
        return self._encoder.embed_texts(prompts)


def use_prompt_cache(encoder: PromptEncoder, parts: TextToImageParts, folder: str | Path) -> None:
    """Let the encoder of a model's parts look prompts up in a cache; it needs no weights of text encoders.

    Raises:
        UserError: there is no cache in the folder, or it was made with another encoder.
    """

    def load() -> PromptEncoder:
        whole = load_parts(parts.path, without=("denoiser", "vae"))
        return whole.backbone.prompt_encoder(whole)

    cache = PromptCache(Path(folder).expanduser())
    cache.check_encoder(text_identity(parts, encoder))
    encoder.look_up_in(CachedTexts(cache, load))


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
            for name in parts.backbone.text_encoders
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
    different = config.to_diff_dict().items()
    return {k: str(v) for k, v in different if k not in _UNIMPORTANT and not k.startswith("_")}


def _rules(tokenizer: Any) -> dict[str, Any]:
    """All rules of a tokenizer; cutting and padding are the caller's and come and go with calls."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
