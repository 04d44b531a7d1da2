"""How attention to a negative prompt changes attention to the prompt: NASA and NAG.

Z⁺ and Z⁻ [B, S, D] are what S queries get from the prompt and from the negative prompt, by the same
projections, heads side by side, before the output projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError

METHODS = ("nasa", "nag")


@dataclass(frozen=True)
class Nasa:
    """Negative-away steer attention (SNOOPI, arXiv 2412.02687): Z = Z⁺ − α Z⁻.

    Attributes:
        scale: α; 0 is off.
    """

    scale: float

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Z [B, S, D]."""
        return torch.sub(positive, negative, alpha=self.scale)  # in one pass over memory


@dataclass(frozen=True)
class Nag:
    """Normalized attention guidance (arXiv 2505.21179), in the paper's form, for each token i::

        Z̃ = Z⁺ + ϕ (Z⁺ − Z⁻),  R_i = ‖Z̃_i‖₁ / ‖Z⁺_i‖₁,  Ẑ_i = Z̃_i min(R_i, τ) / R_i,  Z = α Ẑ + (1 − α) Z⁺

    The authors' code for FLUX has the L2 norm instead, and a scale that is ϕ + 1.

    Attributes:
        scale: ϕ; 0 is off.
        tau: τ, how many times the norm of Z⁺ the norm of Ẑ may be.
        alpha: α, the share of Ẑ in the result.
    """

    scale: float
    tau: float
    alpha: float

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Z [B, S, D]; computed in float32, where neither ϕ-fold values nor sums of them overflow."""
        plus, minus = positive.float(), negative.float()
        steered = plus + self.scale * (plus - minus)
        # min(R, τ) / R = min(1, τ ‖Z⁺‖ / ‖Z̃‖), which is also right where a norm is zero.
        allowed = self.tau * plus.abs().sum(-1, keepdim=True)
        norm = steered.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        bounded = steered * (allowed / norm).clamp_max(1.0)
        return (self.alpha * bounded + (1 - self.alpha) * plus).to(positive.dtype)


Method = Nasa | Nag

# α in version 3 of the paper. It names none for SDXL and joint attention: theirs is SD 2.1's, untried. Other
# networks have what scripts/negative_guidance.py found best for the bundled models.
NASA_SCALES = {"sd15": 0.1, "sd21": 0.2, "pixart": 0.5}
NASA_SCALES |= dict.fromkeys(("sdxl", "sd3", "flux", "flux2", "qwen", "zimage"), 0.2)
NASA_OTHER = 0.4
# ϕ, τ, α in the paper; PixArt's are its PixArt-Σ's, FLUX.2's, Qwen-Image's and Z-Image's are FLUX.1's,
# untried; networks without an entry (SD 2.1, the bundled models) have SD 1.5's.
NAG_SETTINGS = {
    **dict.fromkeys(("flux", "flux2", "qwen", "zimage"), (4.0, 2.5, 0.25)),
    "sd3": (4.0, 2.5, 0.125),
    **dict.fromkeys(("pixart", "sana"), (4.0, 2.5, 0.375)),
    "sdxl": (2.0, 2.5, 0.5),
    "sd15": (2.0, 2.5, 0.375),
}


def make_method(
    name: str, network: nn.Module, scale: float | None = None, tau: float | None = None,
    alpha: float | None = None,
) -> Method:  # fmt: skip
    """The method with the given settings; those left out are the defaults for this kind of network.

    Raises:
        UserError: the method is unknown, or a setting is out of range or without effect.
    """
    if name not in METHODS:
        raise UserError(f"The negative guidance {name!r} is not known; choose one of {', '.join(METHODS)}.")
    kind = backbone(network)
    default = NAG_SETTINGS.get(kind, NAG_SETTINGS["sd15"])
    if scale is None:
        scale = NASA_SCALES.get(kind, NASA_OTHER) if name == "nasa" else default[0]
    if not math.isfinite(scale) or scale < 0:
        raise UserError(
            f"The negative scale {scale} is not a finite number of at least 0. Give e.g. 0.2; 0 is off."
        )
    if name == "nasa":
        if tau is not None or alpha is not None:
            raise UserError("tau and alpha belong to nag and have no effect with nasa. Leave them out.")
        return Nasa(float(scale))
    tau, alpha = default[1] if tau is None else tau, default[2] if alpha is None else alpha
    if not (math.isfinite(tau) and tau > 0 and 0 <= alpha <= 1):
        raise UserError(f"nag needs finite tau above 0 and alpha from 0 to 1, got tau={tau}, alpha={alpha}.")
    return Nag(float(scale), float(tau), float(alpha))


def backbone(network: nn.Module) -> str:
    """The family of a diffusers network by class and text width: a key of the tables above, or "other"."""
    config: Any = getattr(network, "config", {})
    if type(network).__name__ == "UNet2DConditionModel":
        if config.get("addition_embed_type") == "text_time":
            return "sdxl"
        return {768: "sd15", 1024: "sd21"}.get(config.get("cross_attention_dim"), "other")
    kinds = {
        "PixArtTransformer2DModel": "pixart", "SD3Transformer2DModel": "sd3",
        "FluxTransformer2DModel": "flux", "Flux2Transformer2DModel": "flux2",
        "QwenImageTransformer2DModel": "qwen", "ZImageTransformer2DModel": "zimage",
        "SanaTransformer2DModel": "sana",
    }  # fmt: skip
    return kinds.get(type(network).__name__, "other")
