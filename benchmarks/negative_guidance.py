"""What negative prompts cost: floating-point operations of real backbones; seconds, on any machine.

    python benchmarks/negative_guidance.py

Operations (matrix products, convolutions, attention) are counted by PyTorch on networks without memory (the
meta device) for one image and one network call, relative to the plain call. CFG makes two calls. NASA and NAG
differ in element-wise operations only, which are not counted. With cross-attention keys and values of the
negative prompt belong to the first call only; with joint attention every call is like the first. Times are in
benchmarks/generate.py.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_modules.guidance import negative_prompting

SD21: dict[str, Any] = {
    "sample_size": 64, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
    "use_linear_projection": True,
}  # fmt: skip


def sd21() -> tuple[nn.Module, dict[str, Tensor]]:
    """The UNet of Stable Diffusion 2.1 at 512 pixels."""
    unet = UNet2DConditionModel(**SD21)
    return unet, {"sample": torch.randn(1, 4, 64, 64), "encoder_hidden_states": torch.randn(1, 77, 1024)}


def sdxl() -> tuple[nn.Module, dict[str, Any]]:
    """The UNet of SDXL at 1,024 pixels."""
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6)}
    text = torch.randn(1, 77, 2048)
    sample = torch.randn(1, 4, 128, 128)
    return unet, {"sample": sample, "encoder_hidden_states": text, "added_cond_kwargs": added}


def pixart() -> tuple[nn.Module, dict[str, Tensor]]:
    """PixArt-alpha at 512 pixels."""
    transformer = PixArtTransformer2DModel(sample_size=64, caption_channels=4096)
    sample, text = torch.randn(1, 4, 64, 64), torch.randn(1, 120, 4096)
    return transformer, {"hidden_states": sample, "encoder_hidden_states": text}


def sd3() -> tuple[nn.Module, dict[str, Tensor]]:
    """Stable Diffusion 3 medium at 1,024 pixels."""
    transformer = SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    )
    return transformer, {
        "hidden_states": torch.randn(1, 16, 128, 128),
        "encoder_hidden_states": torch.randn(1, 333, 4096),
        "pooled_projections": torch.randn(1, 2048),
    }


def flux() -> tuple[nn.Module, dict[str, Tensor]]:
    """FLUX.1 schnell at 1,024 pixels with 256 text tokens."""
    return FluxTransformer2DModel(), {
        "hidden_states": torch.randn(1, 4096, 64),
        "encoder_hidden_states": torch.randn(1, 256, 4096),
        "pooled_projections": torch.randn(1, 768),
        "img_ids": torch.zeros(4096, 3),
        "txt_ids": torch.zeros(256, 3),
    }


class Pipeline:
    """A network and a text encoder that is none: as much of a pipeline as negative prompts need."""

    def __init__(self, network: nn.Module, inputs: dict[str, Any]) -> None:
        self.transformer, self.inputs = network, inputs

    def encode_prompt(self, prompt: Any = None) -> tuple[Tensor, ...]:
        """Text of the prompt, and the positions of its tokens if the network takes some."""
        positions = self.inputs.get("txt_ids")
        text = self.inputs["encoder_hidden_states"]
        return (text,) if positions is None else (text, positions)

    def __call__(self) -> None:
        """Encode, then call the network once."""
        names = ("encoder_hidden_states", "txt_ids")
        text = dict(zip(names, self.encode_prompt("a cat"), strict=False))
        self.call_network({**self.inputs, **text})

    def call_network(self, inputs: dict[str, Any]) -> None:
        """One call at some timestep."""
        device = inputs["encoder_hidden_states"].device
        steps = torch.full((len(inputs["encoder_hidden_states"]),), 500.0, device=device)
        with torch.no_grad():
            self.transformer(timestep=steps, **inputs)


def count(call: Callable[[], None]) -> int:
    """Floating-point operations of a call; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def operations(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> tuple[int, int, int]:
    """Operations of a plain call, and of the first and of a later call with a negative prompt."""
    with torch.device("meta"):
        network, inputs = make()
        pipe = Pipeline(network.eval(), inputs)
        plain = count(pipe)
        with negative_prompting(pipe, "blurry", scale=0.5):
            first = count(pipe)
            text = dict(zip(("encoder_hidden_states", "txt_ids"), pipe.encode_prompt("a"), strict=False))
            pipe.call_network({**inputs, **text})
            later = count(lambda: pipe.call_network({**inputs, **text}))
    return plain, first, later


def table() -> list[str]:
    """Lines of a table of all networks."""
    lines = [
        "| network | plain, GFLOP | CFG | negative prompt, first call | later calls |",
        "|---|---:|---:|---:|---:|",
    ]
    networks = (sd21, sdxl, pixart, sd3, flux)
    for make in tqdm(networks, desc="operations", unit="network"):
        plain, first, later = operations(make)
        added = [f"{100 * (value / plain - 1):+.2f} %" for value in (first, later)]
        title = (make.__doc__ or "").rstrip(".")
        lines.append(f"| {title} | {plain / 1e9:,.0f} | +100 % | {added[0]} | {added[1]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print("\n".join(table()))


if __name__ == "__main__":
    main()
