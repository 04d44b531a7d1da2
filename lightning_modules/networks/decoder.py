"""Decodes latents to pictures, and back."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from common.errors import UserError, first_line
from common.processes import from_every_rank
from lightning_modules.diffusion.broadcast import at_least_float32
from lightning_modules.networks.backbones.codec import codes_of, decoded, encoded, latents_of
from lightning_modules.networks.loading import no_progress_bars
from lightning_modules.networks.model_names import asset_path, may_be_hub_name, model_name
from lightning_modules.networks.weights import hide_from_state_dict

KINDS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


class LatentDecoder(nn.Module):
    """Frozen autoencoder between latents and pictures; gradients may flow through `decode` to the latents.

    In shards all processes must call it equally often, with as many samples as they like, also none.

    Args:
        vae: the autoencoder.
        slice_size: most pictures at once, to bound memory.
    """

    def __init__(self, vae: nn.Module, slice_size: int = 16) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        self.slice_size = slice_size
        hide_from_state_dict(self)

    @property
    def in_shards(self) -> bool:
        """Whether each process holds but a part of the autoencoder."""
        return isinstance(self.vae, FSDPModule)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], at least float32, in [0, 1], of latents [B, C, h, w] in the UNet's scale."""
        dtype, parts = next(self.vae.parameters()).dtype, self._slices(at_least_float32(latents))
        slices = [decoded(self.vae, codes_of(self.vae, part).to(dtype)) for part in parts]
        pictures = torch.cat(slices)[: len(latents)]
        return (at_least_float32(pictures) / 2 + 0.5).clamp(0.0, 1.0)

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] at the UNet's scale of pictures [B, 3, H, W] in [0, 1]: the means, no noise.

        For any but an AutoencoderTiny; the inverse of `decode` as far as the autoencoder goes.
        """
        pictures = (images * 2 - 1).to(next(self.vae.parameters()).dtype)
        codes = torch.cat([encoded(self.vae, part) for part in self._slices(pictures)])
        return latents_of(self.vae, at_least_float32(codes))[: len(images)]

    def _slices(self, batch: Tensor) -> list[Tensor]:
        """What the autoencoder takes at once; in shards as many slices as the process with most has.

        Those added are of zeros that depend on the batch, so that processes agree on backward passes, too.
        """
        if not self.in_shards:
            return list(batch.split(self.slice_size))
        slices = list(batch.split(self.slice_size)) if len(batch) else []
        most = max(from_every_rank(len(slices)))
        return slices + [batch.new_zeros(1, *batch.shape[1:]) + 0 * batch.sum()] * (most - len(slices))

    def train(self, mode: bool = True) -> "LatentDecoder":
        """Stay in evaluation mode: the autoencoder is never trained."""
        return super().train(False)


def load_autoencoder(path: str) -> AutoencoderKL | AutoencoderTiny:
    """An autoencoder in float32 from a folder (or hub name) of its own: AutoencoderTiny, as TAESD is, or KL.

    Raises:
        UserError: it can't be read, is of another kind, or lacks weights.
    """
    wanted = model_name(path)
    source, version = str(asset_path(wanted.name)), {"revision": wanted.revision}
    if not (asset_path(wanted.name).is_dir() or may_be_hub_name(wanted.name)):
        raise UserError(f"the decoder {path} can't be loaded: there is no such folder. Check the path.")
    try:
        with no_progress_bars():
            kind = KINDS.get(AutoencoderTiny.load_config(source, **version).get("_class_name", ""))
            if kind is None:
                raise ValueError(f"it is none of {', '.join(KINDS)}.")
            module, info = kind.from_pretrained(
                source, torch_dtype=torch.float32, output_loading_info=True, **wanted.options
            )
    except Exception as error:  # the loaders raise many kinds; the cause stays attached
        raise UserError(
            f"the decoder {path} can't be loaded: {first_line(error)} Give the folder of an autoencoder, "
            "with config.json and weights."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"the decoder {path} lacks the weights {missing[:3]}: fetch it again")
    return module
