"""The differentiable image processing against the image processor it stands for."""

from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor

from common.errors import UserError
from lightning_modules.networks.clip_models import differentiable_pixels, require_differentiable


def pictures(height: int, width: int) -> torch.Tensor:
    """Two smooth 8-bit pictures in [0, 1]."""
    noise = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return (smooth * 255).round() / 255


@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 40), (24, 36), (15, 10)])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
        {"size": {"height": 20, "width": 18}, "do_center_crop": False, "resample": 2},
        {"do_resize": False, "do_center_crop": False, "do_normalize": False},
    ],
)
def test_is_the_processors(height: int, width: int, settings: dict[str, Any]) -> None:
    """Up to the rounding to 8 bits, which has no gradient: a step of 255 is 0.015 after normalisation, and
    the processor may round after each of the two passes of its resizing."""
    processor = CLIPImageProcessor(**settings)
    images = pictures(height, width)
    eight_bit = [(image * 255).byte() for image in images]
    expected = processor(eight_bit, return_tensors="pt").pixel_values
    result = differentiable_pixels(processor, images)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 0.03
    assert (result - expected).abs().mean() < 0.006


def test_gradient_by_finite_differences() -> None:
    processor = CLIPImageProcessor(
        size={"shortest_edge": 5}, crop_size={"height": 5, "width": 5}, image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
    )  # fmt: skip
    images = pictures(9, 11).double().mul(0.6).add(0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: differentiable_pixels(processor, x).sin(), [images])


def test_a_filter_without_gradient_is_refused() -> None:
    with pytest.raises(UserError, match="filter 1"):
        require_differentiable(CLIPImageProcessor(resample=1))
