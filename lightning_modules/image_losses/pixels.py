"""A CLIP's own image processing, differentiable: resize, centre crop, normalise."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF
from torchvision.transforms.v2.functional import InterpolationMode

from common.errors import UserError
from lightning_modules.diffusion.broadcast import at_least_float32

# Pillow's resampling numbers, which image processors store; Lanczos has no differentiable form in torch.
_FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}


class PixelProcessing(nn.Module):
    """Pictures in [0, 1] to what a network reads, with gradients (so without the 8-bit rounding of a file).

    Args:
        size: n: the shorter side becomes n pixels; (h, w): exactly that; None: no resizing.
        crop: (h, w) of the centre crop; None: none.
        mean: per channel, of values in [0, 1].
        std: per channel.
        interpolation: "bicubic", "bilinear" or "nearest-exact"; with antialiasing, as Pillow's.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int | tuple[int, int] | None,
        crop: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.size, self.crop, self.interpolation = size, crop, InterpolationMode(interpolation)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to normalised [B, 3, h, w]."""
        pixels = at_least_float32(images)
        target = self._target(*pixels.shape[-2:])
        if target != tuple(pixels.shape[-2:]):
            pixels = TF.resize(pixels, list(target), interpolation=self.interpolation, antialias=True)
            pixels = pixels.clamp(0, 1)  # cubic filters overshoot; 8-bit pictures are cut off in the same way
        if self.crop is not None and self.crop != tuple(pixels.shape[-2:]):
            pixels = TF.center_crop(pixels, list(self.crop))
        return (pixels - self.mean) / self.std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if not isinstance(self.size, int):
            return self.size
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size


def processing_of(settings: dict[str, Any]) -> PixelProcessing:
    """That of a transformers image processor's ``to_dict()``.

    Raises:
        UserError: it asks for a filter that has no differentiable form.
    """
    number = int(settings.get("resample", 3))
    if number not in _FILTERS:
        raise UserError(
            f"the image processor resamples by Pillow's filter {number}, which is not differentiable here: "
            "set resample to 3 (bicubic) in preprocessor_config.json"
        )
    size: int | tuple[int, int] | None = None
    if settings.get("do_resize", True):
        given = settings["size"]
        edge = given.get("shortest_edge")
        size = int(edge) if edge else (int(given["height"]), int(given["width"]))
    crop = settings.get("crop_size") if settings.get("do_center_crop", False) else None
    # (x * 255 * rescale - mean) / std with x in [0, 1]
    scale = 255 * float(settings["rescale_factor"]) if settings.get("do_rescale", True) else 255.0
    normalize = settings.get("do_normalize", True)
    mean = settings["image_mean"] if normalize else [0.0] * 3
    std = settings["image_std"] if normalize else [1.0] * 3
    return PixelProcessing(
        size,
        (int(crop["height"]), int(crop["width"])) if crop else None,
        [value / scale for value in mean],
        [value / scale for value in std],
        _FILTERS[number],
    )
