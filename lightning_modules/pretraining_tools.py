"""What the pretraining modules share: captions, tokens, augmentation, encoding."""

import random
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from datamodules.pictures import EmojiPictures, EvaluationPictures, caption


def training_captions() -> list[str]:
    """Captions to train a tokenizer on: a fixed function of the object names in the artwork's index."""
    source = EmojiPictures()
    rng = random.Random("tokenizer")
    return [caption(key, rng) for key in source.keys("a", "b") for _ in range(2)]


def text_config(keywords: dict[str, Any], tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """A text tower's keywords, completed from its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **keywords,
    }


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [B, L], padded to the model's length as Stable Diffusion does."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift (8 %), zoom and contrast (0.85 to 1.15), blur, brightness and noise, per picture."""
    count = len(pictures)

    def draw(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).to(pictures)

    zero = torch.zeros(count).to(pictures)
    zoom, right, down = draw(0.85, 1.15), draw(-0.16, 0.16), draw(-0.16, 0.16)
    matrix = torch.stack([torch.stack([zoom, zero, right], 1), torch.stack([zero, zoom, down], 1)], 1)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    drawn = (draw(0, 1), draw(0.85, 1.15), draw(-0.08, 0.08), draw(0, 0.08))
    blur, contrast, brightness, noise = (value[:, None, None, None] for value in drawn)
    mixed = torch.lerp(moved, blurred, blur)
    grain = torch.randn(mixed.shape, generator=generator).to(mixed)
    return (((mixed - 0.5) * contrast + 0.5) + brightness + noise * grain).clamp(0, 1)


def preview_pictures(trainer: L.Trainer) -> Tensor:
    """The first 32 held-out pictures."""
    return EvaluationPictures(trainer.datamodule.data_dir).pictures(0, 32)  # type: ignore[attr-defined]


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive parts of at most ``size`` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Posterior means [B, C, h, w], unscaled, of pictures [B, 3, H, W] in [0, 1]."""
    weight = next(autoencoder.parameters())
    return autoencoder.encode(pictures.to(weight) * 2 - 1).latent_dist.mean.float()
