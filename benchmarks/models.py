"""Published networks by their public configurations: real shapes, with random weights or on the meta device.

    python benchmarks/models.py outputs/sd21             Stable Diffusion 2.1, random weights: 5 GB
    python benchmarks/models.py outputs/sd21 --small     the same kind with few channels, to try code

writes a model folder for --model of the other benchmarks, where no weights are at hand.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_modules.diffusion.condition import Condition
from lightning_modules.networks.backbones import BACKBONES, TextToImageParts
from lightning_modules.pipelines import stock_pipeline

ROOT = Path(__file__).resolve().parents[1]
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
"""Stable Diffusion 2.1's text encoder, and one that is a single layer."""
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}


@dataclass(frozen=True)
class Published:
    """A network's public configuration.

    Attributes:
        title: the model's name and the size of its pictures.
        network: class of the denoiser; shape: its settings.
        latent: shape of a latent.
        text: what it takes of each prompt: shapes without the batch, by keyword.
        autoencoder: number of its weights.
    """

    title: str
    network: Any
    shape: dict[str, Any]
    latent: tuple[int, int, int]
    text: dict[str, tuple[int, ...]]
    autoencoder: float = 83.7e6

    def inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, Condition]:
        """Latents, timesteps and encoded prompts of no particular value."""
        text = {name: torch.empty(batch, *shape) for name, shape in self.text.items()}
        condition = Condition(text, {name: tensor[:1] for name, tensor in text.items()})
        return torch.empty(batch, *self.latent), torch.empty(batch, dtype=torch.long), condition


MODELS = {
    "sd15": Published(
        "SD 1.5, 512 px", UNet2DConditionModel,
        {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}, (4, 64, 64),
        {"encoder_hidden_states": (77, 768)},
    ),
    "sd21": Published(
        "SD 2.1, 512 px", UNet2DConditionModel,
        {
            "sample_size": 64, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        (4, 64, 64), {"encoder_hidden_states": (77, 1024)},
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
        (4, 128, 128), {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
    ),
    "pixart": Published(
        "PixArt-α, 512 px", PixArtTransformer2DModel, {"sample_size": 64, "caption_channels": 4096},
        (4, 64, 64), {"encoder_hidden_states": (120, 4096), "encoder_attention_mask": (120,)},
    ),
    "sd35": Published(
        "SD 3.5 medium, 1024 px", SD3Transformer2DModel,
        {
            "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        (16, 128, 128), {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},
    ),
    "sana": Published(
        "SANA 1.6B, 1024 px", SanaTransformer2DModel, {"caption_channels": 2304}, (32, 32, 32),
        {"encoder_hidden_states": (300, 2304), "encoder_attention_mask": (300,)}, 312.3e6,
    ),
    "sana06": Published(
        "SANA 0.6B, 1024 px", SanaTransformer2DModel,
        {
            "num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72, "cross_attention_dim": 1152, "caption_channels": 2304,
        },
        (32, 32, 32), {"encoder_hidden_states": (300, 2304), "encoder_attention_mask": (300,)}, 312.3e6,
    ),
    "klein": Published(
        "FLUX.2 klein 4B, 1024 px", Flux2Transformer2DModel,
        {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        (128, 64, 64), {"encoder_hidden_states": (512, 7680)},
    ),
    "zimage": Published(
        "Z-Image, 1024 px", ZImageTransformer2DModel, {}, (16, 128, 128),
        {"encoder_hidden_states": (512, 2560), "encoder_attention_mask": (512,)},
    ),
    "flux": Published(
        "FLUX.1 dev, 1024 px", FluxTransformer2DModel, {"guidance_embeds": True}, (16, 128, 128),
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,), "guidance": ()},
    ),
    "qwen": Published(
        "Qwen-Image, 1024 px", QwenImageTransformer2DModel, {}, (16, 128, 128),
        {"encoder_hidden_states": (512, 3584), "encoder_attention_mask": (512,)}, 126.9e6,
    ),
    "sd21_small": Published(
        "SD 2.1, few channels", UNet2DConditionModel,
        {
            "sample_size": 16, "attention_head_dim": 2, "block_out_channels": (32, 64), "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 64,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "use_linear_projection": True,
        },
        (4, 16, 16), {"encoder_hidden_states": (77, 64)},
    ),
}  # fmt: skip


MODELS |= {
    "sd35m": Published(
        "SD 3.5 medium, 512 px", SD3Transformer2DModel,
        {
            "sample_size": 64, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        (16, 64, 64), {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},
    ),
    "pixart_small": Published(
        "PixArt-α, few channels", PixArtTransformer2DModel,
        {
            "sample_size": 16, "caption_channels": 64, "num_layers": 2, "num_attention_heads": 2,
            "attention_head_dim": 32, "cross_attention_dim": 64,
        },
        (4, 16, 16), {"encoder_hidden_states": (120, 64), "encoder_attention_mask": (120,)},
    ),
    "sd35m_small": Published(
        "SD 3.5 medium, few channels", SD3Transformer2DModel,
        {
            "sample_size": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32,
            "joint_attention_dim": 64, "caption_projection_dim": 64, "pooled_projection_dim": 64,
            "pos_embed_max_size": 32, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        (16, 16, 16), {"encoder_hidden_states": (77, 64), "pooled_projections": (64,)},
    ),
}  # fmt: skip


def random_parts(
    name: str, device: torch.device | str = "cpu", whole: bool = False, side: int | None = None
) -> TextToImageParts:
    """A model of this shape with random weights, the same at each call, made where they are wanted.

    Args:
        whole: the autoencoder of Stable Diffusion's size, and a text encoder of Stable Diffusion 2.1's (few
            channels in small models); else a small autoencoder and no text encoder.
        side: of its latents; None: the model's own.
    """
    model, small = MODELS[name], not whole or name.endswith("_small")
    flow = model.network is SD3Transformer2DModel
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets/emoji-sd/tokenizer", model_max_length=77)
    settings: dict[str, Any] = {**(SMALL_TEXT if small else TEXT), "hidden_act": "gelu"}
    settings |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(**settings, vocab_size=len(tokenizer), max_position_embeddings=77)
    widths = (8,) * 4 if small else (128, 256, 512, 512)
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        network = model.network(**model.shape | ({} if side is None else {"sample_size": side}))
        for parameter in network.parameters():
            # zero-initialised outputs would make every score, and so every gradient, zero
            parameter.data.add_(0.01 * torch.randn_like(parameter))
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=widths, layers_per_block=2, norm_num_groups=min(32, *widths),
            latent_channels=model.latent[0],
        )  # fmt: skip
        encoders = [CLIPTextModel(text)] if whole else []
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    backbone = next(one for one in BACKBONES if one.denoiser[1] is model.network)
    index = {"_class_name": backbone.pipeline_class.__name__}
    tokenizers = [tokenizer] * (2 if flow else 1)
    parts = TextToImageParts(backbone, network, vae, encoders, tokenizers, scheduler, index, model.title)
    for part in parts.networks:
        part.eval()
    return parts


def write_model(folder: Path, small: bool = False) -> None:
    """Write Stable Diffusion 2.1 at 512 pixels with random weights, or a smaller one at 128."""
    stock_pipeline(random_parts("sd21_small" if small else "sd21", whole=True)).save_pretrained(folder)


if __name__ == "__main__":
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("folder", type=Path)
    reader.add_argument("--small", action="store_true", help="few channels and 128 pixels")
    given = reader.parse_args()
    write_model(given.folder, given.small)
