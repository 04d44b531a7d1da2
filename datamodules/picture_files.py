"""Folders of pictures with captions, and the crop and resize that a protocol puts before every metric."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError, first_line
from common.hashing import to_uint8

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm"}
_NOT_SAMPLES = {"grid.png"}  # what `generate` lays beside its pictures


@dataclass(frozen=True)
class Frame:
    """Centre crop to a square and LANCZOS resize, on 8-bit pictures, by Pillow, as published evaluators do.

    Args:
        size: side of the result in pixels.
        crop: cut the longer side first; without it the picture is squeezed into the square.
    """

    size: int
    crop: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"frame.size is {self.size}: it must be at least 1 pixel")

    def picture(self, image: Image.Image) -> Image.Image:
        """One picture."""
        width, height = image.size
        if self.crop and width != height:
            side = min(width, height)
            # torchvision's center_crop, which the evaluators use, rounds halves to even, too
            left, top = round((width - side) / 2), round((height - side) / 2)
            image = image.crop((left, top, left + side, top + side))
        if image.size == (self.size, self.size):
            return image
        return image.resize((self.size, self.size), Image.Resampling.LANCZOS)

    def batch(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] as the framed 8-bit ones, [B, 3, size, size] float32 in [0, 1]."""
        if images.shape[-2:] == (self.size, self.size):
            return images
        return torch.stack([to_tensor(self.picture(to_picture(image))) for image in images])

    def describe(self) -> str:
        """For manifests."""
        return f"8-bit, {'centre crop, ' if self.crop else 'no crop, '}LANCZOS to {self.size}x{self.size}"


def to_picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] with 8 bits per channel, rounded to the nearest."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W], float32 in [0, 1]; the 8-bit values survive the way back."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def picture_files(folder: str | Path) -> list[Path]:
    """Pictures of a folder and its subfolders in the order of their names, numbers in them as numbers.

    Raises:
        UserError: it is no folder, or holds no picture.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder} is not a folder of pictures; check the path")
    files = [
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.name not in _NOT_SAMPLES and not path.name.startswith(".")
    ]
    if not files:
        raise UserError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))}); give another folder")
    return sorted(files, key=lambda path: _natural(path.relative_to(root).as_posix()))


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts] + [(-1, name)]


def read_picture(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """An RGB picture.

    Args:
        source: a file, or its content.
        name: of the content, for errors.

    Raises:
        UserError: the file is damaged or no picture; it is named.
    """
    try:
        with Image.open(source) as image:
            return _eight_bits(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"the picture {name or source} can't be read: {first_line(error)}; repair or remove it"
        ) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel; Pillow's own conversion cuts larger values off.

    Raises:
        ValueError: its values have no known largest one.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"it has values of 32 bits (mode {image.mode}) whose white is not known; save 8")
    return image


def match_files(folder: str | Path, count: int, names: list[str] | None = None) -> list[Path]:
    """The pictures that belong to ``count`` captions, in their order.

    Args:
        names: file of each caption, relative to the folder; None: the folder's pictures in the order of their
            names.

    Raises:
        UserError: no folder, a named picture is missing, or the numbers differ.
    """
    files = picture_files(folder)
    if names is not None:
        files = [Path(folder) / name for name in names]
        if missing := [name for path, name in zip(files, names) if not path.is_file()]:
            raise UserError(
                f"the picture {missing[0]!r} is not in {folder}, {len(missing)} are missing: add them"
            )
    if len(files) != count:
        raise UserError(
            f"{folder} holds {len(files)} pictures, but there are {count} captions: give one a line in the "
            "order of the file names, or a table with the columns file and caption"
        )
    return files


def read_pictures(files: list[Path], frame: Frame | None = None) -> list[Tensor]:
    """Pictures [3, H, W] in [0, 1], framed if there is a frame; a damaged one is a UserError."""
    pictures = [read_picture(path) for path in files]
    return [to_tensor(frame.picture(picture) if frame else picture) for picture in pictures]
