"""Captioned emoji pictures: what the bundled models are pretrained on and measured against.

A *picture* is one object (375 of them) in one style (noto, twemoji) on one plain background (8 colours), as
64x64 RGB. Every (object, background) pair whose hash falls in the held-out fifth is never trained on, in
either style. The other pictures are split by hash into two disjoint halves ``a`` and ``b``, one for each of
the two bundled CLIPs.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from common.errors import UserError

STYLES = ("noto", "twemoji")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "gray": (140, 140, 140),
    "red": (214, 48, 49),
    "yellow": (250, 211, 72),
    "green": (38, 148, 84),
    "blue": (36, 94, 214),
    "purple": (128, 60, 168),
}
OMIT_PROBABILITY = 0.3
HELD_OUT_PERCENT = 20


@dataclass(frozen=True)
class PictureKey:
    """Which object, in which style, on which background."""

    object: str
    style: str
    background: str

    @property
    def split(self) -> str:
        """``held_out``, ``a`` or ``b``; a function of the names alone."""
        if _percent(self.object, self.background) < HELD_OUT_PERCENT:
            return "held_out"
        return "a" if _percent(self.object, self.style, self.background) < 50 else "b"


def _percent(*names: str) -> int:
    return int.from_bytes(hashlib.sha256("|".join(names).encode()).digest()[:4], "big") % 100


def caption(key: PictureKey, rng: random.Random) -> str:
    """A caption of the picture: style and background are each left out in 30 % of the draws; order varies."""
    style = f"{key.style} style" if rng.random() >= OMIT_PROBABILITY else ""
    background = f"on a {key.background} background" if rng.random() >= OMIT_PROBABILITY else ""
    article = "an" if key.object[0] in "aeiou" else "a"
    subject = rng.choice([f"{article} {key.object}", key.object, f"a picture of {article} {key.object}"])
    details = [part for part in (style, background) if part]
    rng.shuffle(details)
    if details and rng.random() < 0.3:
        return ", ".join([details[0], subject, *details[1:]])
    return ", ".join([subject, *details])


class EmojiPictures:
    """The artwork in memory, composited on demand.

    Args:
        data_dir: the folder that ``scripts/fetch_emoji.py`` wrote.

    Raises:
        UserError: the artwork is not there.
    """

    def __init__(self, data_dir: str = "data/emoji") -> None:
        index = Path(data_dir) / "objects.json"
        if not index.is_file():
            raise UserError(f"no emoji artwork in {data_dir!r}: run python scripts/fetch_emoji.py")
        self.objects: list[str] = [item["name"] for item in json.loads(index.read_text())]
        self.artwork: dict[tuple[str, str], Tensor] = {}
        for name, style in product(self.objects, STYLES):
            with Image.open(Path(data_dir) / style / f"{name}.png") as image:
                pixels = torch.from_numpy(np.array(image.convert("RGBA")))
            self.artwork[name, style] = pixels.permute(2, 0, 1).contiguous()

    def keys(self, *splits: str) -> list[PictureKey]:
        """All pictures of these splits, in a fixed order."""
        every = (PictureKey(*names) for names in product(self.objects, STYLES, BACKGROUNDS))
        return [key for key in every if key.split in splits]

    def composite(self, keys: list[PictureKey]) -> Tensor:
        """Pictures [B, 3, 64, 64], fp32 in [0, 1]."""
        rgba = torch.stack([self.artwork[key.object, key.style] for key in keys]).float() / 255
        colours = torch.tensor([BACKGROUNDS[key.background] for key in keys]).float()
        background = colours[:, :, None, None] / 255
        alpha = rgba[:, 3:]
        return rgba[:, :3] * alpha + background * (1 - alpha)


class EvaluationPictures:
    """The held-out evaluation set: ``count`` real pictures, each with its caption, in a fixed order.

    ``keys[i]``, ``captions[i]`` and picture i belong together. Captions and order depend on the names alone.
    """

    def __init__(self, data_dir: str = "data/emoji", count: int = 1024) -> None:
        self.source = EmojiPictures(data_dir)
        rng = random.Random("evaluation")
        self.keys = self.source.keys("held_out")
        rng.shuffle(self.keys)
        if len(self.keys) < count:
            raise UserError(
                f"only {len(self.keys)} held-out pictures in {data_dir!r}, {count} wanted: lower the count"
            )
        self.keys = self.keys[:count]
        self.captions = [caption(key, rng) for key in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def pictures(self, start: int, stop: int) -> Tensor:
        """Pictures ``start`` to ``stop`` as [B, 3, 64, 64], fp32 in [0, 1]."""
        return self.source.composite(self.keys[start:stop])


class _PictureBatches(IterableDataset):
    """Batch ``k`` is a pure function of (seed, k), so a resumed run sees what an uninterrupted one would."""

    def __init__(self, data: "PictureDataModule", first: int) -> None:
        self.data, self.first = data, first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in count(self.first):
            rng = random.Random(f"{self.data.seed}|{step}")
            index = rng.choices(range(len(self.data.keys)), k=self.data.batch_size)
            keys = [self.data.keys[i] for i in index]
            yield {
                "index": torch.tensor(index),
                "pictures": self.data.source.composite(keys),
                "captions": [caption(key, rng) for key in keys],
                "step": step,
            }


class PictureDataModule(L.LightningDataModule):
    """Endless batches of captioned pictures for pretraining.

    Args:
        data_dir: the folder that ``scripts/fetch_emoji.py`` wrote.
        split: ``all`` trains on both halves, ``a`` or ``b`` on one; held-out pictures are never drawn.
        batch_size: pictures per step.
        seed: of the draws of pictures and captions.
    """

    def __init__(
        self, data_dir: str = "data/emoji", split: str = "all", batch_size: int = 64, seed: int | None = None
    ) -> None:
        super().__init__()
        if split not in ("all", "a", "b"):
            raise UserError(f"data.split is {split!r}: choose all, a or b")
        self.data_dir, self.split, self.batch_size, self.seed = data_dir, split, batch_size, seed or 0

    def setup(self, stage: str | None = None) -> None:
        self.source = EmojiPictures(self.data_dir)
        self.keys = self.source.keys(*("ab" if self.split == "all" else self.split))

    def train_dataloader(self) -> DataLoader:
        first = self.trainer.global_step if self.trainer else 0
        return DataLoader(_PictureBatches(self, first), batch_size=None)
