"""The reference of an evaluation: real pictures prepared as the drawn ones, or statistics of such."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from callbacks.hashing import hash_texts
from callbacks.metrics.reference import ReferenceSource, ReferenceStatistics
from callbacks.metrics.reference_folder import ReferenceFolder
from datamodules.picture_files import Frame
from lightning_modules.errors import UserError
from lightning_modules.networks.loading import asset_path


def framed_reference(
    reference: str | Path, frame: Frame | None, minimum: int | None = None, skip_corrupt: bool = False
) -> ReferenceSource:
    """The reference at a path: a folder of real pictures, which get the frame, or a file of statistics.

    Args:
        reference: the path.
        frame: crop and resize of drawn and real pictures.
        minimum: least number of real pictures.
        skip_corrupt: leave out pictures of a folder that can't be read.

    Raises:
        UserError: nothing there, too few pictures, or statistics of pictures prepared in another way.
    """
    path = asset_path(reference)
    if path.is_dir():
        return ReferenceFolder(
            path,
            transform=frame.picture if frame is not None else None,
            preprocessing=frame.describe() if frame is not None else "as they are",
            minimum=minimum or 2,
            skip_corrupt=skip_corrupt,
        )
    statistics = ReferenceStatistics.load(path)
    if frame is not None and not statistics.preprocessing.startswith(frame.describe()):
        raise UserError(
            f"{path} holds statistics of pictures prepared as {statistics.preprocessing!r}, but "
            f"{frame.describe()!r} is needed: name the folder of real pictures instead"
        )
    if minimum is not None and statistics.num_images < minimum:
        raise UserError(
            f"{path} holds statistics of {statistics.num_images} pictures, and {minimum} are needed: "
            "give those "
            "of all pictures"
        )
    return statistics


def describe_reference(reference: ReferenceSource | None, captions: Sequence[str]) -> dict[str, Any] | None:
    """The reference in words; where it has captions, whether these are the evaluation's."""
    if isinstance(reference, ReferenceFolder):
        return {"folder": reference.folder.name, "files": len(reference.files)}
    if not isinstance(reference, ReferenceStatistics):
        return None
    described: dict[str, Any] = reference.describe()
    if reference.captions_hash != hash_texts([]):
        described["captions_are_those_of_the_evaluation"] = reference.captions_hash == hash_texts(captions)
    return described
