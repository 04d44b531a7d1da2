"""Decodes latents to pictures."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lightning_modules.networks.frozen import hide_from_state_dict


class LatentDecoder(nn.Module):
    """Frozen decoder of an autoencoder; gradients may flow through it to the latents.

    Args:
        vae: the autoencoder; only its decoder is used.
        slice_size: most latents decoded at once, to bound memory.
    """

    def __init__(self, vae: AutoencoderKL, slice_size: int = 16) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        self.slice_size = slice_size
        hide_from_state_dict(self)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], float32 in [0, 1], of latents [B, C, h, w] in the UNet's scale."""
        config, dtype = self.vae.config, next(self.vae.parameters()).dtype
        # The UNet's latents are (code - shift) * scale, of unit deviation (arXiv 2112.10752, appendix G).
        codes = (latents.float() / config.scaling_factor + (config.shift_factor or 0.0)).to(dtype)
        slices = [self.vae.decode(part, return_dict=False)[0] for part in codes.split(self.slice_size)]
        return (torch.cat(slices).float() / 2 + 0.5).clamp(0.0, 1.0)

    def train(self, mode: bool = True) -> "LatentDecoder":
        """Stay in evaluation mode: the autoencoder is never trained."""
        return super().train(False)
