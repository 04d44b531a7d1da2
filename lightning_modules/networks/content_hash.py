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
