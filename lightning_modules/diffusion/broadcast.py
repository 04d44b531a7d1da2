"""The one place where per-sample numbers meet image-shaped tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_like(values: Tensor, target: Tensor) -> Tensor:
    """Shape per-sample ``values`` [B] as [B, 1, …, 1] so that they broadcast over ``target`` [B, …].

    Plain broadcasting would align ``values`` with the last axis of ``target``: silently wrong when B equals
    the width, an error otherwise. Every formula with α_t, σ_t or κ goes through here.

    Raises:
        ValueError: if ``values`` is not one number per sample of ``target``.
    """
    if values.ndim != 1 or target.ndim < 1 or values.shape[0] != target.shape[0]:
        raise ValueError(
            f"expected one value per sample: got values of shape {tuple(values.shape)} "
            f"for a batch of shape {tuple(target.shape)}"
        )
    return values.reshape(-1, *([1] * (target.ndim - 1)))


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is already: half-precision tensors never enter the formulas."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
