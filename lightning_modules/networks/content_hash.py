"""Whether two networks hold the same numbers, whatever their files are called or how they are stored."""

import hashlib

import torch
from torch import nn


def content_hash(network: nn.Module) -> str:
    """SHA-256 of a network's weights by name, as 64 hexadecimal digits.

    Floating-point weights are read as float32, so that a half-precision copy of half-precision weights counts
    as the same.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).contiguous()
        digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
        digest.update(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def layout_free_hash(network: nn.Module) -> str:
    """A hash of a network's weights as a bag of numbers: names, order, transposing and splitting don't count.

    So one CLIP is the same in transformers' format and in open_clip's, which joins queries, keys and values.
    Single numbers (the temperature) are left out: conversions round them.
    """
    total = 0
    for parameter in network.parameters():
        if parameter.numel() > 1:
            bits = parameter.detach().cpu().float().reshape(-1).view(torch.int32).long()
            bits = bits * 0x2545F4914F6CDD1D  # wraps around, as the sums do
            bits = (bits ^ (bits >> 29)) * 0x9E3779B97F4A7C1
            total += int(bits.sum())
    return f"{total % 2**64:016x}"
