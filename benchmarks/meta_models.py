"""Distillations of published models on PyTorch's meta device: real shapes, no numbers and no memory."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.networks.ema import StudentEMA
from lightning_modules.networks.lora import LoraSettings, StudentLoraSettings, add_adapter
from lightning_modules.networks.roles import ScoreModels
from lightning_modules.optimization import RoleOptimization

FAKE_SCORE = LoraSettings(rank=64, alpha=108, targets=["to_q", "to_v"])
EIGHT_BIT = 2.0, 2 * (1 + 4 / 256)
"""Values and bytes a weight of bitsandbytes' Adam8bit: two bytes, and a scale for each block of 256."""
CLIP_L = (CLIPTextModel, CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))  # fmt: skip
OPENCLIP_H = (CLIPTextModel, CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16))  # fmt: skip
OPENCLIP_G = (CLIPTextModelWithProjection, CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    projection_dim=1280))  # fmt: skip
T5_XXL = (T5EncoderModel, T5Config(
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
    feed_forward_proj="gated-gelu"))  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A model's public configuration.

    Attributes:
        title: its name.
        network: class of the denoiser.
        shape: its settings.
        text: what it takes of each prompt: shapes without the batch, by keyword.
        encoders: class and configuration of each text encoder.
    """

    title: str
    network: Any
    shape: dict[str, Any]
    text: dict[str, tuple[int, ...]]
    encoders: tuple[tuple[Any, Any], ...]


SD21 = {
    "sample_size": 64, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
    "use_linear_projection": True,
}  # fmt: skip
MODELS = {
    "sd15": Published(
        "SD 1.5, 512 px", UNet2DConditionModel,
        {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        {"encoder_hidden_states": (77, 768)}, (CLIP_L,),
    ),
    "sd21": Published(
        "SD 2.1, 512 px", UNet2DConditionModel, SD21, {"encoder_hidden_states": (77, 1024)}, (OPENCLIP_H,)
    ),
    "sdxl": Published(
        "SDXL, 1024 px", UNet2DConditionModel,
        {
            "sample_size": 128, "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)}, (CLIP_L, OPENCLIP_G),
    ),
    "pixart": Published(
        "PixArt-α, 512 px", PixArtTransformer2DModel, {"sample_size": 64, "caption_channels": 4096},
        {"encoder_hidden_states": (120, 4096), "encoder_attention_mask": (120,)}, (T5_XXL,),
    ),
    "sd21_small": Published(  # the one of benchmarks/shapes.py
        "SD 2.1, few channels", UNet2DConditionModel,
        {
            "sample_size": 16, "attention_head_dim": 2, "block_out_channels": (32, 64), "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 64,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "use_linear_projection": True,
        },
        {"encoder_hidden_states": (77, 64)}, (OPENCLIP_H,),
    ),
}  # fmt: skip
AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip


@dataclass
class Distillation:
    """What stands for a OneStepDistillation.

    Attributes:
        module: has the attributes that `memory_by_part` reads.
        latent: shape of a latent.
        text: as in `Published`.
    """

    module: Any
    latent: tuple[int, int, int]
    text: dict[str, tuple[int, ...]]


def build(
    name: str, lora: bool = False, ema: bool = False, eight_bit: bool = False, checkpointing: bool = False,
    frozen: torch.dtype = torch.bfloat16,
) -> Distillation:  # fmt: skip
    """Student, teacher with adapter and the rest, as `OneStepDistillation.configure_model` makes them."""
    model = MODELS[name]
    with torch.device("meta"):
        base = model.network(**model.shape)
        student = copy.deepcopy(base).requires_grad_(True).train()
        if lora:
            add_adapter(student, StudentLoraSettings())
        scores = ScoreModels(base, NoiseSchedule(torch.ones(1000, device="cpu")), FAKE_SCORE)
        vae = AutoencoderKL(**AUTOENCODER).requires_grad_(False).eval()
        encoders = nn.ModuleList(kind(config).requires_grad_(False) for kind, config in model.encoders)
        if checkpointing:
            student.enable_gradient_checkpointing()
            scores.enable_gradient_checkpointing()
        for network in (student, scores, vae, encoders):
            for parameter in network.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(frozen)
        average = StudentEMA(student) if ema else None
    adam = RoleOptimization(functools.partial(torch.optim.Adam, lr=1e-6))
    eight = SimpleNamespace(state_per_weight=lambda device: EIGHT_BIT)
    module = SimpleNamespace(
        student=student, scores=scores, ema=average, image_terms=None, lora=FAKE_SCORE,
        student_lora=StudentLoraSettings() if lora else None,
        student_optimization=eight if eight_bit else adam, fake_score_optimization=adam,
        objective=nn.Module(), parts=SimpleNamespace(vae=vae, text_encoders=encoders), device="cpu",
        generator=SimpleNamespace(prompt_encoder=SimpleNamespace(text_encoders=encoders)),
    )  # fmt: skip
    size = int(model.shape["sample_size"])
    return Distillation(module, (4, size, size), model.text)


def condition(text: dict[str, tuple[int, ...]], batch: int) -> Condition:
    """What stands for so many prompts."""
    tensors: dict[str, Tensor] = {
        name: torch.empty(batch, *shape, device="meta") for name, shape in text.items()
    }
    return Condition(tensors, {name: tensor[:1] for name, tensor in tensors.items()})
