"""The reference of an evaluation: real pictures prepared as the drawn ones, or statistics of such."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.extractors import FeatureExtractor
from callbacks.metrics.reference import ReferenceSource, ReferenceStatistics
from callbacks.metrics.reference_folder import UNFRAMED, ReferenceFolder
from common.errors import UserError
from common.hashing import hash_texts
from datamodules.picture_files import Frame
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
            preprocessing=frame.describe() if frame is not None else UNFRAMED,
            minimum=minimum or 2,
            skip_corrupt=skip_corrupt,
        )
    statistics = ReferenceStatistics.load(path)
    # "<crop and resize>; <the network's own>", or the network's own alone
    before, separator, _ = statistics.preprocessing.partition("; ")
    found, needed = before if separator else UNFRAMED, frame.describe() if frame is not None else UNFRAMED
    if found != needed:
        raise UserError(
            f"{path} holds statistics of pictures prepared as {statistics.preprocessing!r}, but "
            f"{needed!r} is needed: name the folder of real pictures instead"
        )
    if minimum is not None and statistics.num_images < minimum:
        raise UserError(
            f"{path} holds statistics of {statistics.num_images} pictures, and {minimum} are needed: "
            "give those "
            "of all pictures"
        )
    return statistics


def bind_metrics(
    metrics: Sequence[ImageMetric],
    extractor: FeatureExtractor | None,
    reference: ReferenceSource | None,
    device: torch.device,
) -> None:
    """Give all metrics network and reference; a folder goes through each network once. Collective.

    Args:
        metrics: what to measure.
        extractor, reference, device: as for ``ImageMetric.bind``.

    Raises:
        UserError: there is no network or no reference where one is needed, or none that serves.
    """
    # statistics with the features of single pictures serve the metrics that need none of those
    for metric in sorted(metrics, key=lambda metric: not metric.needs_reference_features):
        metric.bind(extractor, reference, device)


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
