"""Weights w(t) of losses, as functions of (α_t, σ_t), each [B] -> [B]."""

from __future__ import annotations

from torch import Tensor


def sigma_squared(alpha: Tensor, sigma: Tensor) -> Tensor:
    """σ_t²: SwiftBrush's weight on the score difference (official code)."""
    return sigma**2


def alpha_squared(alpha: Tensor, sigma: Tensor) -> Tensor:
    """α_t² = ᾱ_t: SwiftBrush's weight on the fake score's ε-loss (official code)."""
    return alpha**2
