"""Calls a denoising network of any supported family in one way."""

from torch import Tensor, nn

from lightning_modules.diffusion.condition import Condition

ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
"""Parts of a condition that SDXL's UNet and PixArt's transformer take in one dictionary."""


def run_network(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Raw output [B, C, h, w] of a UNet or transformer at x_t [B, C, h, w], t [B].

    Floating-point inputs are cast to the dtype of its weights. Channels beyond C are PixArt's learned
    variance, which no one-step student uses; they are dropped.
    """
    dtype = next(network.parameters()).dtype
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in condition.tensors.items()
    }
    added = {name: tensors.pop(name) for name in ADDED if name in tensors}
    output: Tensor = network(
        x_t.to(dtype), timestep=t, **tensors, added_cond_kwargs=added or None, return_dict=False
    )[0]
    return output if output.shape[1] == x_t.shape[1] else output[:, : x_t.shape[1]]
