"""Statistics of real pictures: mean and covariance of their features, and the hashes of their origin.

For precision and recall the features themselves too.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from callbacks.metrics.extractors import FeatureExtractor
from common.errors import UserError
from common.hashing import hash_tensors, hash_texts, to_uint8

_TENSORS = ("mean", "covariance", "features")


class FeatureSums:
    """Sum and sum of outer products of features, in float64: enough for mean and covariance, in any order."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)
        self.count = 0

    def add(self, features: Tensor) -> None:
        """Take in features [B, D]."""
        rows = features.detach().cpu().double()
        self.total += rows.sum(0)
        self.outer += rows.T @ rows
        self.count += len(rows)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and unbiased covariance [D, D]."""
        return mean_and_covariance(self.total, self.outer, self.count)


def mean_and_covariance(total: Tensor, outer: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] from sums: cov = (sum x x^T - n mu mu^T) / (n - 1).

    Raises:
        ValueError: fewer than two samples.
    """
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {count}")
    mean = total / count
    covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
    return mean, (covariance + covariance.T) / 2


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean [D] and covariance [D, D], float64, of the features of ``num_images`` real pictures.

    Attributes:
        extractor: name of the network; ``extractor_hash``: SHA-256 of its folder.
        captions_hash: SHA-256 of the captions of the pictures, in order; ``pictures_hash``: of their 8-bit
        values.
        preprocessing: crop and resize before the network.
        source: where the pictures come from, in words.
        features: the features themselves [num_images, D], fp32, if they were kept.
    """

    mean: Tensor
    covariance: Tensor
    num_images: int
    extractor: str
    extractor_hash: str
    captions_hash: str
    pictures_hash: str
    preprocessing: str
    source: str
    features: Tensor | None = None

    @property
    def content_hash(self) -> str:
        """SHA-256 of the numbers and of everything said about them."""
        said = json.dumps(self._words(), sort_keys=True)
        return hashlib.sha256((hash_tensors(self._tensors()) + said).encode()).hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _words(self) -> dict[str, str]:
        return {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name not in _TENSORS}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        partial.write_bytes(
            save(self._tensors(), metadata=self._words() | {"content_hash": self.content_hash})
        )
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> "ReferenceStatistics":
        """Read what ``save`` wrote.

        Raises:
            UserError: no such file, another kind of file, or contents that do not match the stored hash.
        """
        if not Path(path).is_file():
            raise UserError(
                f"no reference statistics at {str(path)!r}: make them with scripts/make_reference.py"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                words = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in _TENSORS if name in file.keys()}  # noqa: SIM118
            stored = words.pop("content_hash")
            statistics = cls(**tensors, **(words | {"num_images": int(words["num_images"])}))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{str(path)!r} holds no reference statistics: make them with scripts/make_reference.py"
            ) from error
        if statistics.content_hash != stored:
            raise UserError(
                f"{str(path)!r} is damaged (its contents do not match its hash): fetch or make it again"
            )
        return statistics

    def statistics(self, extractor: FeatureExtractor, features: bool = False) -> "ReferenceStatistics":
        """Itself: a reference that is ready, for one extractor.

        Raises:
            UserError: it is of another extractor, or holds no features where they are needed.
        """
        self.require_extractor(extractor)
        if features and self.features is None:
            raise UserError(
                f"the reference statistics of {self.source} hold no features of single pictures, which "
                "precision and recall compare: name the folder of real pictures as the reference instead"
            )
        return self

    def require_extractor(self, extractor: FeatureExtractor) -> None:
        """Refuse features of another network.

        Raises:
            UserError: the weights, the tokenizer or the preprocessing differ from those of the statistics.
        """
        if self.extractor_hash != extractor.content_hash:
            raise UserError(
                f"the reference statistics were made with {self.extractor} ({self.extractor_hash[:12]}), the "
                f"network {str(extractor.path)!r} that sees the pictures is {extractor.content_hash[:12]}, "
                "so a distance means nothing: use that network, or make new statistics (of a CLIP folder by "
                "scripts/make_reference.py, else from a folder of real pictures)"
            )

    def describe(self) -> dict[str, str | int]:
        """For manifests: every hash and count, without the numbers."""
        words: dict[str, str | int] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS
        }
        return words | {"content_hash": self.content_hash}


class ReferenceSource(Protocol):
    """Where a metric gets its statistics of real pictures from: a file's contents, or a folder."""

    def statistics(self, extractor: FeatureExtractor, features: bool = False) -> ReferenceStatistics:
        """The statistics in the features of this network; collective. ``features``: keep the features too.

        Raises:
            UserError: there are none for this network.
        """


def compute_reference(
    pictures: Iterable[Tensor], captions: Sequence[str], extractor: FeatureExtractor, source: str
) -> ReferenceStatistics:
    """Statistics of real pictures.

    Args:
        pictures: batches [B, 3, H, W] in [0, 1].
        captions: one for each picture, in the same order.
        extractor: the network that sees them.
        source: where the pictures come from, in words.

    Raises:
        ValueError: numbers of pictures and captions differ, or there are fewer than two.
    """
    sums, digest = FeatureSums(extractor.width), hashlib.sha256()
    for images in pictures:
        sums.add(extractor.image_features(images))
        digest.update(to_uint8(images).cpu().contiguous().numpy().tobytes())
    if sums.count != len(captions):
        raise ValueError(f"{sums.count} pictures, but {len(captions)} captions")
    mean, covariance = sums.mean_and_covariance()
    return ReferenceStatistics(
        mean=mean,
        covariance=covariance,
        num_images=sums.count,
        extractor=extractor.name,
        extractor_hash=extractor.content_hash,
        captions_hash=hash_texts(captions),
        pictures_hash=digest.hexdigest(),
        preprocessing=extractor.preprocessing.describe(),
        source=source,
    )
