"""Which attention kernel small networks should use."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def fast_attention(device: torch.device) -> AbstractContextManager[None]:
    """Attention by plain matrix products on the CPU, where the fused kernel's backward pass is slow."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
