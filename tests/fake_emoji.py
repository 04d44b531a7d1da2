"""Artwork as scripts/fetch_emoji.py writes it, but small and made up."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from datamodules.pictures import STYLES

OBJECTS = ("apple", "bear", "cat", "dog", "egg", "fox", "guitar", "hat", "ice cream", "kite", "lemon", "owl")


def make_artwork(folder: Path, objects: Sequence[str] = OBJECTS, size: int = 16) -> Path:
    """Write `objects.json` and a random picture with transparent parts for each object and style."""
    generator = torch.Generator().manual_seed(0)
    for style in STYLES:
        (folder / style).mkdir(parents=True)
        for name in objects:
            pixels = torch.randint(0, 256, (size, size, 4), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy(), "RGBA").save(folder / style / f"{name}.png")
    index = [{"name": name, "category": "Objects", "image": "x.png"} for name in objects]
    (folder / "objects.json").write_text(json.dumps(index))
    return folder
