"""Between the latents of a denoising network and the codes of its autoencoder; a family with other statistics
or shapes registers its own functions.

Shapes: latents [B, C, h, w] of unit deviation; codes as the autoencoder gives them; pictures [B, 3, H, W]
from -1 to 1.
"""

from functools import singledispatch
from typing import Any

from torch import Tensor


@singledispatch
def codes_of(vae: Any, latents: Tensor) -> Tensor:
    """Codes of latents, both at least float32: latents are (code - shift) * scale (arXiv 2112.10752, G)."""
    codes: Tensor = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return codes


@singledispatch
def latents_of(vae: Any, codes: Tensor) -> Tensor:
    """The inverse of `codes_of`."""
    latents: Tensor = (codes - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return latents


@singledispatch
def decoded(vae: Any, codes: Tensor) -> Tensor:
    """Pictures of codes."""
    pictures: Tensor = vae.decode(codes, return_dict=False)[0]
    return pictures


@singledispatch
def encoded(vae: Any, pictures: Tensor) -> Tensor:
    """Codes of pictures: the means, no noise."""
    output = vae.encode(pictures)
    codes: Tensor = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent
    return codes
