"""Labelled grids of pictures, by Pillow alone."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from common.files import written_whole

_MARGIN, _GAP, _FONT_SIZE, _LINE = 14, 4, 13, 17
_CARDS = "cards"
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (110, 114, 120)


def to_pil(image: ArrayLike) -> Image.Image:
    """A picture [3, H, W] in [0, 1] as a Pillow image; rounded to nearest, as diffusers does.

    Args:
        image: anything that numpy reads, e.g. a tensor in main memory.
    """
    pixels = np.rint(np.asarray(image, np.float32).clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))


def labelled_grid(
    views: Mapping[str, ArrayLike], prompts: Sequence[str], columns: int = 4, least_size: int = 128
) -> Image.Image:
    """Cards, one for each prompt: the views side by side, their names above them and the prompt above all.

    Args:
        views: name of a view to pictures [B, 3, H, W] in [0, 1], the same B and size for all.
        prompts: B prompts.
        columns: cards in a row.
        least_size: smaller pictures are enlarged by a whole factor, without smoothing.

    Returns:
        The sheet; its ``info`` tells where the pictures are, which ``save_png`` keeps for ``read_cards``.

    Raises:
        ValueError: no view, or numbers of pictures and prompts differ.
    """
    arrays = {name: np.asarray(images) for name, images in views.items()}
    if not views or any(len(images) != len(prompts) for images in arrays.values()):
        counts = {name: len(images) for name, images in arrays.items()}
        raise ValueError(f"{counts} pictures for {len(prompts)} prompts")
    height, width = next(iter(arrays.values())).shape[-2:]
    factor = max(1, -(-least_size // max(height, width)))
    height, width = height * factor, width * factor
    card_width = len(views) * width + (len(views) - 1) * _GAP
    font = ImageFont.load_default(size=_FONT_SIZE)
    labels = [_wrapped(prompt, font, card_width) for prompt in prompts]
    label_height = _LINE * max(len(lines) for lines in labels)
    names = [_wrapped(name, font, width) for name in arrays]
    name_height = _LINE * max(len(lines) for lines in names)
    card_height = label_height + name_height + height
    columns = min(columns, len(prompts))
    rows = -(-len(prompts) // columns)
    size = (columns * (card_width + _MARGIN) + _MARGIN, rows * (card_height + _MARGIN) + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    boxes: dict[str, list[list[int]]] = {name: [] for name in arrays}
    for i, lines in enumerate(labels):
        left = _MARGIN + (i % columns) * (card_width + _MARGIN)
        top = _MARGIN + (i // columns) * (card_height + _MARGIN)
        for k, line in enumerate(lines):
            draw.text((left, top + k * _LINE), line, _INK, font=font)
        for k, (name, images) in enumerate(arrays.items()):
            x = left + k * (width + _GAP)
            for j, line in enumerate(names[k]):
                draw.text((x, top + label_height + j * _LINE), line, _FAINT, font=font)
            picture = to_pil(images[i]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, top + label_height + name_height))
            boxes[name].append([x, top + label_height + name_height, width, height])
    sheet.info[_CARDS] = json.dumps({"prompts": list(prompts), "views": boxes})
    return sheet


@dataclass(frozen=True)
class Cards:
    """The pictures of a sheet.

    Attributes:
        prompts: of the cards. ``views``: name of a view to its pictures, one for each prompt.
    """

    prompts: list[str]
    views: dict[str, list[Image.Image]]


def read_cards(path: Path) -> Cards | None:
    """The pictures of a sheet that ``labelled_grid`` made; None if it doesn't tell where they are."""
    with Image.open(path) as sheet:
        if _CARDS not in sheet.info:
            return None
        told = json.loads(sheet.info[_CARDS])
        pictures = sheet.convert("RGB")
    views = {
        name: [pictures.crop((x, y, x + width, y + height)) for x, y, width, height in boxes]
        for name, boxes in told["views"].items()
    }
    return Cards(told["prompts"], views)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3
) -> list[str]:
    """At most ``most`` lines no wider than ``width`` pixels, the last one marked where text is left out."""
    letters = max(8, int(width / max(1.0, font.getlength("n"))))
    lines = textwrap.wrap(text, letters, max_lines=most, placeholder=" …") or [""]
    while max(font.getlength(line) for line in lines) > width and letters > 8:
        letters -= 1
        lines = textwrap.wrap(text, letters, max_lines=most, placeholder=" …") or [""]
    return lines


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = PngInfo()
    if _CARDS in image.info:
        told.add_itxt(_CARDS, image.info[_CARDS])
    with written_whole(path) as partial:
        image.save(partial, format="PNG", optimize=True, pnginfo=told)
