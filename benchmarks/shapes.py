"""Model folders of the sizes that are measured, where no weights are at hand: real shapes, random weights.

Only the denoising network is of full size. Text encoders and autoencoders have the real outputs, but a layer
or two: a training step decodes nothing, and the plain loop has its text encoded beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from lightning_modules.pretraining.transformer import word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "assets" / "emoji-sd"
SIZES = ("emoji", "sd21", "pixart")


def model_folder(size: str, folder: Path, small: bool = False) -> Path:
    """The bundled teacher ("emoji"), or a folder written with a network of SD 2.1's or PixArt's shape.

    Args:
        size: one of `SIZES`.
        folder: where to write; 3.5 GB for "sd21", 2.5 GB for "pixart".
        small: the same kind of network with few channels, to try the code.
    """
    if size == "emoji":
        return EMOJI
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = _sd21(small) if size == "sd21" else _pixart(small)
    with torch.no_grad():
        for parameter in pipeline.components[_denoiser(size)].parameters():
            # zero-initialised outputs would make every score, and so every gradient, zero
            parameter.add_(0.01 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder)
    return folder


def _denoiser(size: str) -> str:
    return "unet" if size == "sd21" else "transformer"


def _sd21(small: bool) -> StableDiffusionPipeline:
    """865 million weights, 4 x 64 x 64 latents, text 77 x 1024."""
    shape: dict[str, Any] = {
        "sample_size": 64, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }  # fmt: skip
    if small:
        shape |= {
            "sample_size": 16, "attention_head_dim": 2, "block_out_channels": (32, 64), "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 64,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI, subfolder="tokenizer", model_max_length=77)
    width = shape["cross_attention_dim"]
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=width // 64, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=_autoencoder(), text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        unet=UNet2DConditionModel(**shape), scheduler=_scheduler("scaled_linear", 0.00085, 0.012),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _pixart(small: bool) -> PixArtAlphaPipeline:
    """610 million weights, 4 x 64 x 64 latents, text 120 x 4096."""
    shape: dict[str, Any] = {"sample_size": 64, "caption_channels": 4096}
    if small:
        shape = {
            "sample_size": 16, "caption_channels": 64, "num_layers": 2, "num_attention_heads": 2,
            "attention_head_dim": 32, "cross_attention_dim": 64,
        }  # fmt: skip
    width = shape["caption_channels"]
    captions = (ROOT / "assets" / "captions.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = word_tokenizer(captions)
    text = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=64, num_heads=width // 64, d_ff=width, num_layers=1,
        dropout_rate=0.0,
    )  # fmt: skip
    return PixArtAlphaPipeline(
        tokenizer, T5EncoderModel(text), _autoencoder(), PixArtTransformer2DModel(**shape),
        _scheduler("linear", 0.0001, 0.02),
    )  # fmt: skip


def _autoencoder() -> AutoencoderKL:
    """Latents of an eighth of the picture's side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=4,
    )  # fmt: skip


def _scheduler(kind: str, start: float, end: float) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=start, beta_end=end, beta_schedule=kind, clip_sample=False, timestep_spacing="trailing",
        steps_offset=1,
    )  # fmt: skip
