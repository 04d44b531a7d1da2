"""The pictures of an evaluation that stay on disk: the first few for the sample grid, or all of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from callbacks.metrics.measure import Images
from common.files import write_text_atomically, written_whole
from datamodules.picture_files import read_pictures
from reports.sheets import labelled_grid, to_pil

LIST = "generation.json"


class KeptPictures:
    """Writes pictures as they are drawn, each file whole; an interrupted evaluation finds them again.

    Args:
        folder: where; made when first needed.
        every: keep all of them, not only those of the grid.
        for_grid: how many of the first go into the grid.
    """

    def __init__(self, folder: Path, every: bool, for_grid: int = 16) -> None:
        self.folder, self.every, self.for_grid = folder, every, for_grid

    def path(self, place: int) -> Path:
        """File of the picture of a caption."""
        return self.folder / f"{place:05d}.png"

    def __call__(self, places: list[int], images: Images) -> None:
        """Keep those of the pictures [3, H, W] in [0, 1] that are wanted.

        Raises:
            OSError: the folder can't be written.
        """
        for place, image in zip(places, images):
            if self.every or place < self.for_grid:
                self.folder.mkdir(parents=True, exist_ok=True)
                with written_whole(self.path(place)) as partial:
                    to_pil(image.float().cpu()).save(partial, format="PNG")

    def grid(self, captions: Sequence[str]) -> Image.Image:
        """The first pictures with their captions; of several sizes those as large as the first."""
        places = [place for place in range(min(self.for_grid, len(captions))) if self.path(place).is_file()]
        images = read_pictures([self.path(place) for place in places])
        shown = [i for i, image in enumerate(images) if image.shape == images[0].shape]
        views = {"": torch.stack([images[i] for i in shown])}  # one view, which needs no name
        return labelled_grid(views, [captions[places[i]] for i in shown])

    def write_list(self, captions: Sequence[str], seeds: Sequence[int]) -> None:
        """`generation.json` as `generate` writes it, so that the folder can be evaluated again."""
        entries = [
            {"prompt": caption, "seed": seeds[i], "file": self.path(i).name}
            for i, caption in enumerate(captions)
        ]
        write_text_atomically(self.folder / LIST, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
