"""Calls a denoising network of any supported family in one way."""

from collections.abc import Mapping
from functools import singledispatch

from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.guided import Rescale

ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
"""Parts of a condition that SDXL's UNet and PixArt's transformer take in one dictionary."""

GUIDANCE = "guidance"
"""Part of a condition: the guidance scale of networks into which guidance was distilled."""

EMBEDDED_GUIDANCE = 8.5
"""For networks that take the guidance scale as an input: the default of diffusers' LCM pipeline."""


def run_network(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Raw output [B, C, h, w] of a UNet or transformer at x_t [B, C, h, w], time t [B] (`network_time`).

    Floating-point inputs are cast to the dtype of its weights.
    """
    dtype = next(network.parameters()).dtype
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in condition.tensors.items()
    }
    return call_denoiser(network, x_t.to(dtype), t, tensors)


@singledispatch
def call_denoiser(network: nn.Module, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The same with everything in the network's dtype; a family with another signature registers its own.

    Channels beyond C are PixArt's learned variance, which no one-step student uses; they are dropped.
    """
    named = dict(tensors)
    added = {name: named.pop(name) for name in ADDED if name in named}
    if (scale := embedded_guidance(network)) is not None:
        named["timestep_cond"] = _guidance_embedding(network, scale, x_t).to(x_t)
    output: Tensor = network(x_t, timestep=t, **named, added_cond_kwargs=added or None, return_dict=False)[0]
    return output if output.shape[1] == x_t.shape[1] else output[:, : x_t.shape[1]]


def embedded_guidance(network: nn.Module | None) -> float | None:
    """The guidance scale of a network that takes it as an input, as LCMs do; None for all others."""
    takes_it = getattr(network, "config", {}).get("time_cond_proj_dim") is not None
    return EMBEDDED_GUIDANCE if takes_it else None


def takes_guidance(network: nn.Module) -> bool:
    """Whether guidance was distilled into the network, so that kappa is an input of one pass (FLUX.1-dev)."""
    return bool(getattr(network, "config", {}).get("guidance_embeds", False))


@singledispatch
def rescale(network: nn.Module) -> Rescale | None:
    """What becomes of the network's guided output [B, C, h, w], given that with text; None: it stays."""
    return None


def _guidance_embedding(network: nn.Module, scale: float, like: Tensor) -> Tensor:
    """What the stock pipelines make of the scale, [B, D]: of scale - 1, in the form of a timestep."""
    width: int = network.config.time_cond_proj_dim  # type: ignore[union-attr, assignment]
    return get_timestep_embedding(like.new_full((len(like),), scale - 1).float(), width, scale=1000)
