"""Statistics of real pictures: mean and covariance of their features, and the hashes of their origin."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from callbacks.hashing import hash_tensors, hash_texts, to_uint8
from callbacks.metrics.clip_features import ClipExtractor
from lightning_modules.errors import UserError


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

    @property
    def content_hash(self) -> str:
        """SHA-256 of the numbers and of everything said about them."""
        said = json.dumps(self._words(), sort_keys=True)
        return hashlib.sha256((hash_tensors(self._tensors()) + said).encode()).hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "covariance": self.covariance}

    def _words(self) -> dict[str, str]:
        return {
            f.name: str(getattr(self, f.name)) for f in fields(self) if f.name not in ("mean", "covariance")
        }

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
                tensors = {name: file.get_tensor(name) for name in ("mean", "covariance")}
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

    def require_extractor(self, extractor: ClipExtractor) -> None:
        """Refuse features of another network.

        Raises:
            UserError: the weights, the tokenizer or the preprocessing differ from those of the statistics.
        """
        if self.extractor_hash != extractor.content_hash:
            raise UserError(
                f"the reference statistics were made with {self.extractor} ({self.extractor_hash[:12]}), the "
                f"scoring CLIP {str(extractor.path)!r} is {extractor.content_hash[:12]}, so a distance "
                "means nothing: "
                "use that CLIP, or make new statistics with scripts/make_reference.py"
            )

    def describe(self) -> dict[str, str | int]:
        """For manifests: every hash and count, without the numbers."""
        words: dict[str, str | int] = {
            k: v for k, v in asdict(self).items() if k not in ("mean", "covariance")
        }
        return words | {"content_hash": self.content_hash}


def compute_reference(
    pictures: Iterable[Tensor], captions: Sequence[str], extractor: ClipExtractor, source: str
) -> ReferenceStatistics:
    """Statistics of real pictures.

    Args:
        pictures: batches [B, 3, H, W] in [0, 1].
        captions: one for each picture, in the same order.
        extractor: the scoring CLIP.
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
