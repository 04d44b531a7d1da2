"""Captioned pictures packed in files: WebDataset's tars, Parquet with pictures in it, saved `datasets`.

Read by Hugging Face `datasets`, memory-mapped; it writes tars and Parquet to its cache first, once.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError, first_line
from datamodules.picture_files import Frame, read_picture, to_tensor
from datamodules.real_pictures import GivenPictures, RealPictures
from datamodules.tables import USUAL_COLUMNS

CAPTIONS = (*USUAL_COLUMNS, "txt", *(f"json.{name}" for name in USUAL_COLUMNS))
"""Columns of captions, the last ones WebDataset's."""


def holds_dataset(folder: str | Path) -> bool:
    """Whether a folder holds packed pictures."""
    root = Path(folder)
    return (root / "state.json").is_file() or bool(_packed(root)[1])


def _packed(root: Path) -> tuple[str, list[str]]:
    """Kind and files: tars, or else Parquet."""
    for kind, suffix in (("webdataset", ".tar"), ("parquet", ".parquet")):
        if files := sorted(str(path) for path in root.glob(f"*{suffix}")):
            return kind, files
    return "", []


class PictureDataset(GivenPictures):
    """Pictures drawn at random, as `RealPictureSource` draws them from a folder.

    Args:
        settings: `RealPictures`, whose folder holds the files.
        side: of the squares, in pixels.

    Raises:
        UserError: the files can't be read, or have no column of pictures or of captions.
    """

    def __init__(self, settings: RealPictures, side: int) -> None:
        self.settings, self.frame, root = settings, Frame(side), Path(settings.folder)
        import datasets  # takes long to import, so only where it is needed

        kind, files = _packed(root)
        try:
            rows = (
                datasets.load_from_disk(str(root))
                if (root / "state.json").is_file()
                else datasets.load_dataset(kind, data_files=files, split="train")
            ).flatten()
        # its readers raise whatever their formats' libraries do
        except Exception as error:
            raise UserError(
                f"the pictures in {root} can't be read: {first_line(error.__cause__ or error)}; fetch or "
                "save the files again"
            ) from error
        present = {name: feature for name, feature in rows.features.items() if not name.startswith("__")}
        pictures = [name for name, feature in present.items() if isinstance(feature, datasets.Image)]
        captions = [name for name in present if name.lower() in CAPTIONS]
        if wanted := settings.caption_column:
            captions = [wanted] if wanted in present else []
        if len(pictures) != 1 or len(captions) != 1 or not len(rows):
            raise UserError(
                f"{root}: one column of pictures and one of captions are needed; its {len(rows):,} rows have "
                f"{', '.join(present) or 'none'}, of them pictures: {', '.join(pictures) or 'none'}. "
                "Name the captions with data.real.caption_column"
            )
        self.picture, self.caption = pictures[0], captions[0]
        rows = rows.select_columns([self.picture, self.caption])
        self.rows = rows.cast_column(self.picture, datasets.Image(decode=False))
        self.count = len(self.rows)

    def take(self, uniform: Tensor) -> tuple[Tensor, list[str], None]:
        """Draw a picture for each random number; see `RealSource`.

        Raises:
            UserError: a picture is damaged, or has no caption; its row is named.
        """
        pictures, captions = [], []
        for place in (uniform.double() * len(self.rows)).long().tolist():
            row, where = self.rows[place], f"{self.settings.folder}, row {place + 1}"
            stored, caption = row[self.picture] or {}, row[self.caption]
            if not isinstance(caption, str) or not caption.strip():
                raise UserError(f"{where} has no text in column {self.caption!r}; fill it or remove the row")
            content = stored.get("bytes")
            source = stored.get("path") or "" if content is None else io.BytesIO(content)
            pictures.append(to_tensor(self.frame.picture(read_picture(source, where))))
            captions.append(caption.strip())
        return torch.stack(pictures), captions, None
