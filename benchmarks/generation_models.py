"""The models whose generation is measured: one at hand, or the shape of Stable Diffusion 2.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.negative_guidance import SD21
from lightning_modules.generator import OneStepGenerator, make_generator
from lightning_modules.networks.backbones import TextToImageParts
from lightning_modules.networks.backbones.stable_diffusion import StableDiffusion
from lightning_modules.networks.decoder import LatentDecoder
from lightning_modules.networks.loading import asset_path
from lightning_modules.networks.student import load_student, student_path
from lightning_modules.pipelines import ddim_scheduler, stock_pipeline

SIZES = ("emoji", "sd21")


@dataclass(frozen=True)
class Model:
    """A student with its stock pipelines (the same weights, not copied) and a tiny decoder.

    Attributes:
        stock: with the model's own scheduler; teacher: with that of many steps.
        title: sizes in words.
    """

    parts: TextToImageParts
    generator: OneStepGenerator
    stock: DiffusionPipeline
    teacher: DiffusionPipeline
    tiny: LatentDecoder

    @property
    def title(self) -> str:
        """Where it is from, and its sizes."""
        texts = sum(size(encoder) for encoder in self.parts.text_encoders)
        networks = {
            "network": size(self.parts.denoiser), "text encoder": texts,
            "VAE's decoder": size(self.parts.vae.decoder), "tiny decoder": size(self.tiny.vae.decoder),
        }  # fmt: skip
        height, width = self.parts.picture_size
        weights = ", ".join(f"{name} {count / 1e6:,.2f}" for name, count in networks.items())
        return f"{self.parts.path}, {height}×{width} pixels, million weights: {weights}"


def open_model(name: str, path: str, small: bool, device: torch.device, dtype: torch.dtype) -> Model:
    """The model of a size; `path` is read for "emoji" only."""
    if name == "emoji":
        student = load_student(student_path(path))
        parts, start = student.parts, student.start_timestep
        parts.path = path
    else:
        parts, start = sd21_parts(small), 999
    generator = make_generator(parts, start).eval().to(device, dtype)
    tiny = LatentDecoder(tiny_autoencoder(parts.vae)).to(device, dtype)
    stock, teacher = stock_pipeline(parts), stock_pipeline(parts, ddim_scheduler(parts.scheduler))
    return Model(parts, generator, stock, teacher, tiny)


def tiny_autoencoder(vae: AutoencoderKL) -> AutoencoderTiny:
    """TAESD's shape for the latents of an autoencoder, random weights.

    TAESD is half as wide as the outermost blocks of Stable Diffusion's autoencoder (64 and 128 channels), and
    has three blocks at each size but one at the picture's.
    """
    levels, width = len(vae.config.block_out_channels), vae.config.block_out_channels[0] // 2
    blocks = (*(3,) * (levels - 1), 1)
    widths = (width,) * levels
    return AutoencoderTiny(
        latent_channels=vae.config.latent_channels, encoder_block_out_channels=widths,
        decoder_block_out_channels=widths, num_encoder_blocks=blocks[::-1], num_decoder_blocks=blocks,
    )  # fmt: skip


def sd21_parts(small: bool) -> TextToImageParts:
    """Stable Diffusion 2.1 at 512 pixels, random weights: 866 million, text encoder 340, autoencoder 84."""
    unet, text, vae = dict(SD21), {"hidden_size": 1024, "num_hidden_layers": 23}, (128, 256, 512, 512)
    if small:
        levels = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
        downs, ups = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        unet |= {"sample_size": 8, "attention_head_dim": 2, "cross_attention_dim": 64, **levels}
        unet |= {"down_block_types": downs, "up_block_types": ups}
        text, vae = {"hidden_size": 64, "num_hidden_layers": 1}, (32,) * 4
    tokenizer = CLIPTokenizer.from_pretrained(
        asset_path("assets/emoji-sd"), subfolder="tokenizer", model_max_length=77
    )
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer), "intermediate_size": 4 * text["hidden_size"], "hidden_act": "gelu",
        "num_attention_heads": text["hidden_size"] // 64, "max_position_embeddings": 77, **text,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    decoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=vae, layers_per_block=2, latent_channels=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    return TextToImageParts(
        backbone=StableDiffusion(), denoiser=UNet2DConditionModel(**unet).eval(), vae=decoder.eval(),
        text_encoders=[CLIPTextModel(CLIPTextConfig(**config)).eval()], tokenizers=[tokenizer],
        scheduler=scheduler, index={"_class_name": StableDiffusionPipeline.__name__},
        path="Stable Diffusion 2.1's shape" + " in small" * small,
    )  # fmt: skip


def size(network: nn.Module) -> int:
    """Number of weights."""
    return sum(weight.numel() for weight in network.parameters())
