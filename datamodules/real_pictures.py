"""Real pictures with captions, or a teacher's samples, for methods that learn from them beside the prompts.

Which pictures a student update sees is a function of random numbers that the caller draws for the places in
the global batch, so it doesn't depend on the number of processes and nothing has to be stored for a resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.errors import UserError
from datamodules.picture_files import Frame, match_files, read_pictures
from datamodules.tables import read_column, read_files


@dataclass
class RealPictures:
    """Pictures with captions, with which a training is no longer image-free; or samples of the teacher.

    Attributes:
        folder: of the pictures; or of WebDataset's tars, of Parquet with pictures in it, a saved dataset; or
            one that draw-teacher wrote.
        captions: file of captions: a table (JSON Lines, CSV …) with a column caption, prompt or text, or one
            caption a line; null: the folder's files hold the captions, too.
        caption_column: of tars (txt, or json.NAME), Parquet and datasets; null: the usual one.
        file_column: the table's column of file names; null: its only one called file, file_name or image, or
            what COCO's annotations say; without any the pictures in the order of their names.
        batch_size: pictures per student update, over all processes.
    """

    folder: str
    captions: str | None = None
    file_column: str | None = None
    caption_column: str | None = None
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"data.real.batch_size is {self.batch_size}: it must be at least 1")

    def places(self, rank: int = 0, world_size: int = 1, at: int = 0, passes: int = 1) -> Tensor:
        """Places in the global batch of the pictures of one process, or of one of its passes, long [b].

        Raises:
            UserError: the passes of all processes can't share the batch out equally.
        """
        share, rest = divmod(self.batch_size, world_size * passes)
        if rest:
            raise UserError(
                f"data.real.batch_size is {self.batch_size}: it must be a multiple of the {world_size} "
                f"processes{f' times {passes} micro-batches' if passes > 1 else ''}"
            )
        first = (rank * passes + at) * share
        return torch.arange(first, first + share)


class RealSource(Protocol):
    """Where a student update's pictures come from."""

    settings: RealPictures

    @property
    def notice(self) -> str:
        """What a run prints at its start."""

    @property
    def trained_on(self) -> str:
        """What checkpoint and model card say."""

    def take(self, uniform: Tensor) -> tuple[Tensor, list[str], list[int] | None]:
        """Draw a picture for each random number in [0, 1), float [b], those of `RealPictures.places`.

        Returns:
            Pictures, float32 [b, 3, side, side] in [0, 1] on the CPU, or latents [b, C, h, w]; their
            captions; and the seeds of latents.
        """


class GivenPictures:
    """What is said of pictures that are not the teacher's; a subclass gives its settings and their number."""

    settings: RealPictures
    count: int

    @property
    def notice(self) -> str:
        """What a run prints at its start."""
        return (
            f"This training is not image-free: it also sees {self.count:,} captioned pictures of "
            f"{self.settings.folder} (data.real)."
        )

    @property
    def trained_on(self) -> str:
        """What checkpoint and model card say."""
        return f"prompts and {self.count} captioned pictures, so not image-free"


class RealPictureSource(GivenPictures):
    """Pictures drawn at random, cropped to squares and resized, with their captions.

    Args:
        settings: which pictures.
        side: of the squares, in pixels.

    Raises:
        UserError: the captions can't be read, a picture is missing, or the numbers differ.
    """

    def __init__(self, settings: RealPictures, side: int) -> None:
        assert settings.captions is not None
        self.settings, self.frame = settings, Frame(side)
        self.captions = read_column(settings.captions)
        names = read_files(settings.captions, settings.file_column)
        self.files = match_files(settings.folder, len(self.captions), names)
        self.count = len(self.files)

    def take(self, uniform: Tensor) -> tuple[Tensor, list[str], None]:
        """Pictures; see `RealSource`."""
        chosen = (uniform.double() * len(self.files)).long().tolist()
        pictures = read_pictures([self.files[i] for i in chosen], self.frame)
        return torch.stack(pictures), [self.captions[i] for i in chosen], None
