"""Small random stand-ins for the networks that see the pictures, with the interfaces of the real ones."""

import json
import warnings
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from common.hashing import to_uint8

ALIVE = 24
"""Features of the Inception stand-in that are not zero everywhere."""


class InceptionLayers(nn.Module):
    """Pictures in [-1, 1], 299 pixels, to features [B, D, 1, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.linear = nn.Linear(48, width)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(width, 48, generator=generator))
            self.linear.bias.zero_()
            self.linear.weight[ALIVE:] = 0

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 299 and x.shape[3] == 299
        return self.linear(self.pool(x).flatten(1)).tanh()[:, :, None, None]


class InceptionStandIn(nn.Module):
    """What clean-fid asks of the file: ``layers``, and resizing inside with ``return_features``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = InceptionLayers(width)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        x = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128).flatten(1)
        return features if return_features else features[:, :1]


def inception_file(folder: Path, width: int = 2048) -> Path:
    """A TorchScript file of the right interface, under the name that clean-fid looks for."""
    path = folder / "inception-2015-12-05.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the format of the real file
        torch.jit.script(InceptionStandIn(width)).save(str(path))
    return path


def open_clip_file(folder: Path, name: str = "tiny-open-clip") -> tuple[str, Path]:
    """A tiny architecture known to open_clip, and a file of random weights as training scripts write it."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(3)
    weights = open_clip.create_model(name).state_dict()
    torch.save({"epoch": 1, "state_dict": weights}, folder / "weights.pt")
    return name, folder / "weights.pt"


def pictures(count: int, seed: int = 0, height: int = 16, width: int = 16) -> Tensor:
    """Pictures [count, 3, height, width] of 8-bit values, each in its own colours."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(count, 3, 1, 1, generator=generator)
    noise = torch.rand(count, 3, height, width, generator=generator)
    return to_uint8(0.6 * colours + 0.4 * noise).float() / 255


def pil(image: Tensor) -> Image.Image:
    """The picture as a saved file holds it."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy())


def save(images: Tensor, folder: Path) -> Path:
    """A folder of PNG files."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        pil(image).save(folder / f"{i:04d}.png")
    return folder
