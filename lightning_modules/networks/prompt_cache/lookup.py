"""Prompts looked up in a cache while training, in the place of text encoders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_modules.diffusion.transfer import to_device
from lightning_modules.networks.backbones import TextToImageParts
from lightning_modules.networks.backbones.prompts import PromptEncoder
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.prompt_cache.cache import PromptCache, text_keys
from lightning_modules.networks.prompt_cache.text_identity import text_identity


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
