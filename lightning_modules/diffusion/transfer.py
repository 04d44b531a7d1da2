"""Tensors made on the CPU, on their way to where they are wanted."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Return a CPU tensor on a device, without waiting for what a GPU has still to do.

    A plain copy waits until the GPU has reached it, so that nothing is prepared meanwhile. From pinned memory
    it takes its place among the GPU's tasks.
    """
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
