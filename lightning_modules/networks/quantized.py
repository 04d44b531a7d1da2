"""Frozen weights in 8 or 4 bits, under adapters that stay in float32 (QLoRA, arXiv 2305.14314).

8 bits: blocks of 256 values with a largest one each, in bitsandbytes' dynamic type (arXiv 2110.02861).
4 bits: NF4, blocks of 64. Products are in the type of their input; a layer's weight is made whole for each.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from common.errors import UserError
from lightning_modules.parallel import blocks

BLOCK = {8: 256, 4: 64}


class QuantizedLinear(nn.Module):
    """A linear layer without a gradient for its weights, those of ``packed``.

    Args:
        layer: for shape and bias.
        packed: from `pack`.
        bits: of a value, 8 or 4.
    """

    def __init__(self, layer: nn.Linear, packed: tuple[nn.Parameter, nn.Parameter], bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        self.values, self.largest = packed
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        output: Tensor = _Product.apply(x, self)
        return output if self.bias is None else output + self.bias.to(output)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features] that it stands for."""
        functional, largest = _functional(), self.largest.view(torch.float32)
        shape = torch.Size((self.out_features, self.in_features))
        settings: dict[str, Any] = {"absmax": largest, "blocksize": BLOCK[self.bits]}
        if self.bits == 8:
            weight: Tensor = functional.dequantize_blockwise(self.values, **settings)
        else:
            state = functional.QuantState(**settings, shape=shape, quant_type="nf4", dtype=torch.float32)
            weight = functional.dequantize_4bit(self.values, state)
        return weight.view(shape).to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ; W is made again in the backward pass, so that none waits for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.whole(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient @ ctx.layer.whole(gradient.dtype)).to(ctx.dtype), None


def pack(weight: Tensor, bits: int) -> tuple[nn.Parameter, nn.Parameter]:
    """The values of a weight in `bits`, and the largest of each block, both as bytes that no cast changes.

    Parameters, which networks share also when they go to another device.
    """
    functional, weight = _functional(), weight.detach().float().contiguous()
    if bits == 8:
        values, state = functional.quantize_blockwise(weight, blocksize=BLOCK[8])
    else:
        values, state = functional.quantize_4bit(weight, blocksize=BLOCK[4], quant_type="nf4")
    largest = state.absmax.view(torch.uint8)
    return nn.Parameter(values, requires_grad=False), nn.Parameter(largest, requires_grad=False)


@torch.no_grad()
def quantize_frozen(networks: Iterable[nn.Module], bits: int) -> None:
    """Exchange the frozen linear layers in the blocks of networks; weights that are shared stay so.

    What is outside of the blocks (embeddings, the last layer) is small, and stays.
    """
    made = WeakIdKeyDictionary()
    for layer in [layer for network in networks for block in blocks(network) for layer in block.modules()]:
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear) and not child.weight.requires_grad:
                if child.weight not in made:
                    made[child.weight] = pack(child.weight, bits)
                setattr(layer, name, QuantizedLinear(child, made[child.weight], bits))


def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UserError(
            'frozen_weights in 8 or 4 bits needs the package bitsandbytes: pip install -e ".[8bit]"'
        ) from error
    return functional
