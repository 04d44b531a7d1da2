"""Statistics of real pictures: mean and covariance of their features, and the hashes of their origin.

For precision and recall the features themselves too. They come from a file, or from a folder of pictures,
which goes through each network once and is then found again by content.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from callbacks.metrics.extractors import FeatureExtractor, by_size, in_threads
from common.errors import UserError
from common.files import user_cache_dir, written_whole
from common.hashing import hash_file, hash_json, hash_tensors, hash_texts, to_uint8
from common.processes import from_every_rank, rank_and_world_size
from datamodules.picture_files import SUFFIXES, Frame, read_picture
from lightning_modules.networks.model_names import asset_path

log = logging.getLogger(__name__)
VERSION = 1
"""Raised when the statistics of the same pictures change, so that cached ones are made again."""
UNFRAMED = "as they are"
"""The name of no crop and resize before the network's own."""
_OTHERS = {".npz", ".npy", ".pkl", ".pickle", ".pt", ".pth", ".mat"}
_PICTURES = "give the folder of real pictures, whose statistics are then made and kept"
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
    """Mean [D] and unbiased covariance [D, D] from sums: cov = (sum x x^T - n mu mu^T) / (n - 1)."""
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
        words = self._words() | {"content_hash": self.content_hash}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(Path(path)) as partial:
            partial.write_bytes(save(self._tensors(), metadata=words))

    @classmethod
    def load(cls, path: str | Path) -> "ReferenceStatistics":
        """Read what ``save`` wrote.

        Raises:
            UserError: no such file, another kind of file, or contents that do not match the stored hash.
        """
        if not Path(path).is_file():
            raise UserError(f"no reference statistics at {str(path)!r}: {_PICTURES}")
        if Path(path).suffix in _OTHERS:
            raise UserError(
                f"{str(path)!r} holds statistics of another tool, whose network and resizing may differ, so "
                f"that a distance to them would mean nothing: {_PICTURES}"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                words = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in _TENSORS if name in file.keys()}  # noqa: SIM118
            stored = words.pop("content_hash")
            statistics = cls(**tensors, **(words | {"num_images": int(words["num_images"])}))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{str(path)!r} holds no reference statistics of this project: {_PICTURES}"
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
        if self.extractor_hash != extractor.content_hash:
            raise UserError(
                f"the reference statistics were made with {self.extractor} ({self.extractor_hash[:12]}), the "
                f"network {str(extractor.path)!r} that sees the pictures is {extractor.content_hash[:12]}, "
                "so a distance means nothing: use that network, or make new statistics (of a CLIP folder by "
                "scripts/make_reference.py, else from a folder of real pictures)"
            )
        if features and self.features is None:
            raise UserError(
                f"the reference statistics of {self.source} hold no features of single pictures, which "
                "precision and recall compare: name the folder of real pictures as the reference instead"
            )
        return self

    def describe(self) -> dict[str, Any]:
        """For manifests: every hash and count, without the numbers."""
        return self._words() | {"num_images": self.num_images, "content_hash": self.content_hash}


def compute_reference(
    pictures: Iterable[Tensor], captions: Sequence[str], extractor: FeatureExtractor, source: str
) -> ReferenceStatistics:
    """Statistics of real pictures.

    Args:
        pictures: batches [B, 3, H, W] in [0, 1].
        captions: one for each picture, in the same order.
        extractor: the network that sees them.
        source: where the pictures come from, in words.
    """
    sums, digest = FeatureSums(extractor.width), hashlib.sha256()
    for images in pictures:
        sums.add(extractor.image_features(images))
        digest.update(to_uint8(images).cpu().contiguous().numpy().tobytes())
    if sums.count != len(captions):
        raise ValueError(f"{sums.count} pictures, but {len(captions)} captions")
    return ReferenceStatistics(
        *sums.mean_and_covariance(),
        num_images=sums.count,
        extractor=extractor.name,
        extractor_hash=extractor.content_hash,
        captions_hash=hash_texts(captions),
        pictures_hash=digest.hexdigest(),
        preprocessing=extractor.preprocessing,
        source=source,
    )


class ReferenceFolder:
    """Real pictures in a folder and its subfolders, as a reference for any network.

    Args:
        folder: where they are.
        transform: crop and resize before the network's own preprocessing (default: none).
        preprocessing: names ``transform``; part of the key under which statistics are cached.
        minimum: fewer pictures than this are refused.
        skip_corrupt: leave out pictures that can't be read, with a warning, instead of refusing the folder.
        batch_size: pictures per pass and process.
        cache_dir: where statistics are kept (default: ``user_cache_dir()``).

    Raises:
        UserError: no such folder, or fewer pictures than ``minimum`` (2 at least).
    """

    def __init__(
        self,
        folder: str | Path,
        transform: Callable[[Image.Image], Image.Image] | None = None,
        preprocessing: str = UNFRAMED,
        minimum: int = 2,
        skip_corrupt: bool = False,
        batch_size: int = 64,
        cache_dir: Path | None = None,
    ) -> None:
        self.folder, self.transform, self.preprocessing = Path(folder), transform, preprocessing
        self.minimum, self.skip_corrupt, self.batch_size = max(2, minimum), skip_corrupt, batch_size
        self.cache_dir = cache_dir if cache_dir is not None else user_cache_dir()
        if not self.folder.is_dir():
            raise UserError(f"no folder of real pictures at {str(folder)!r}: set `reference`")
        self.files = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        self._require(len(self.files))
        self._known: dict[Path, ReferenceStatistics] = {}

    def _require(self, count: int) -> None:
        if count < self.minimum:
            raise UserError(
                f"the reference folder {str(self.folder)!r} holds {count} readable pictures, and "
                f"{self.minimum} are needed: complete it, or name another one"
            )

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the files, in the order of their names; collective."""
        own = [
            (place, digest)
            for places in self._batches("hashing the reference")
            for place, digest in zip(places, in_threads(hash_file, [self.files[i] for i in places]))
        ]
        digests = sorted(pair for share in from_every_rank(own) for pair in share)
        return hash_texts([digest for _, digest in digests])

    @cached_property
    def _names_and_sizes(self) -> str:
        listed = [f"{path.relative_to(self.folder).as_posix()} {path.stat().st_size}" for path in self.files]
        return hash_texts(listed)

    def describe(self) -> dict[str, Any]:
        """For manifests: name, number of files, and their hash.

        That is ``content_hash``, by which statistics are cached, once these were asked for: it reads every
        file, with all processes. Before, and where no metric compares with the folder, one of names and
        sizes.
        """
        known = self.__dict__.get("content_hash")  # where a cached_property keeps its value
        told = (
            {"hash_of_names_and_sizes": self._names_and_sizes} if known is None else {"content_hash": known}
        )
        return {"folder": self.folder.name, "files": len(self.files)} | told

    def _batches(self, label: str) -> Iterator[list[int]]:
        """The places of this process's pictures in ``files``, batch by batch, under a progress bar."""
        rank, world = rank_and_world_size()
        places = list(range(rank, len(self.files), world))
        starts = range(0, len(places), self.batch_size)
        for start in tqdm(starts, desc=label, unit="batch", disable=rank > 0):
            yield places[start : start + self.batch_size]

    def statistics(self, extractor: FeatureExtractor, features: bool = False) -> ReferenceStatistics:
        """The statistics in the features of this network: found in the cache, or computed now and kept there.

        Collective: every process takes its share of the pictures. Those that hold the features of single
        pictures serve without them, too, so ask for these first.

        Args:
            extractor: the network that sees the pictures.
            features: keep the features of single pictures too.

        Raises:
            UserError: a picture can't be read (it is named), or too few can.
        """
        for holds_features in (True,) if features else (False, True):
            found = self._find(self._path(extractor, holds_features))
            if found is not None:
                return found if features else replace(found, features=None)
        path, statistics = self._path(extractor, features), self._compute(extractor, features)
        self._known[path] = statistics
        if rank_and_world_size()[0] == 0:
            try:
                statistics.save(path)
            except OSError as error:
                log.warning("%s can't be written: these statistics will be computed again: %s", path, error)
        return statistics

    def _path(self, extractor: FeatureExtractor, features: bool) -> Path:
        key = {
            "version": VERSION,
            "pictures": self.content_hash,
            "extractor": extractor.content_hash,
            "preprocessing": self.preprocessing,
            "features": features,
            "skip_corrupt": self.skip_corrupt,
        }
        return self.cache_dir / f"reference-{hash_json(key)[:16]}.safetensors"

    def _find(self, path: Path) -> ReferenceStatistics | None:
        # Cached only where every process finds it: those that do not would wait for the others for ever.
        if path not in self._known and all(from_every_rank(path.is_file())):
            statistics = ReferenceStatistics.load(path)
            self._require(statistics.num_images)
            self._known[path] = statistics
        return self._known.get(path)

    def _compute(self, extractor: FeatureExtractor, keep: bool) -> ReferenceStatistics:
        sums, rows = FeatureSums(extractor.width), [torch.zeros(0, extractor.width)]
        places: list[int] = []
        corrupt: list[str] = []
        for batch in self._batches(f"real pictures through {extractor.name}"):
            read = dict(zip(batch, in_threads(self._read, [self.files[i] for i in batch])))
            corrupt += [found for found in read.values() if isinstance(found, str)]
            if corrupt and not self.skip_corrupt:
                break
            pictures = {place: found for place, found in read.items() if isinstance(found, Tensor)}
            features = torch.zeros(len(pictures), extractor.width)
            for members, images in by_size(list(pictures.values())):
                features[members] = extractor.image_features(images.to(extractor.device).float() / 255).cpu()
            sums.add(features)
            if keep:
                rows.append(features)
                places += pictures
        self._report([text for share in from_every_rank(corrupt) for text in share])
        shares = from_every_rank((sums.total, sums.outer, sums.count, places, torch.cat(rows)))
        count = sum(share[2] for share in shares)
        self._require(count)
        total, outer = (torch.stack([share[i] for share in shares]).sum(0) for i in (0, 1))
        order = torch.tensor([place for share in shares for place in share[3]], dtype=torch.long).argsort()
        return ReferenceStatistics(
            *mean_and_covariance(total, outer, count),
            num_images=count,
            extractor=extractor.name,
            extractor_hash=extractor.content_hash,
            captions_hash=hash_texts([]),
            pictures_hash=self.content_hash,
            preprocessing=f"{self.preprocessing}; {extractor.preprocessing}",
            source=f"{count:,} pictures of the folder {self.folder.name}",
            features=torch.cat([share[4] for share in shares])[order] if keep else None,
        )

    def _report(self, corrupt: list[str]) -> None:
        if corrupt and not self.skip_corrupt:
            raise UserError(
                f"{corrupt[0]}, or let pictures of the reference that can't be read be skipped (evaluate: "
                "--skip-corrupt true; the reference is another one then)"
            )
        if corrupt:
            log.warning("%d pictures of %s are skipped: %s, …", len(corrupt), self.folder, corrupt[0])

    def _read(self, path: Path) -> Tensor | str:
        """A picture [3, H, W], 8-bit, or what is wrong with it."""
        try:
            picture = read_picture(path)
        except UserError as error:
            return str(error)
        if self.transform is not None:
            picture = self.transform(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


ReferenceSource = ReferenceStatistics | ReferenceFolder
"""Where a metric gets its statistics of real pictures from: a file's contents, or a folder."""


def open_reference(path: str | Path) -> ReferenceSource:
    """The reference at a path, as it is: a folder of real pictures, or a file of statistics."""
    resolved = asset_path(path)
    return ReferenceFolder(resolved) if resolved.is_dir() else ReferenceStatistics.load(resolved)


def framed_reference(
    reference: str | Path, frame: Frame | None, minimum: int | None = None, skip_corrupt: bool = False
) -> ReferenceSource:
    """The reference of an evaluation: real pictures, which get the frame of the drawn ones, or statistics.

    Args:
        reference: the path.
        frame: crop and resize of drawn and real pictures.
        minimum: least number of real pictures.
        skip_corrupt: leave out pictures of a folder that can't be read.

    Raises:
        UserError: nothing there, too few pictures, or statistics of pictures prepared in another way.
    """
    path, needed = asset_path(reference), UNFRAMED if frame is None else frame.describe()
    if path.is_dir():
        transform = None if frame is None else frame.picture
        return ReferenceFolder(path, transform, needed, minimum or 2, skip_corrupt)
    statistics = ReferenceStatistics.load(path)
    # "<crop and resize>; <the network's own>", or the network's own alone
    before, separator, _ = statistics.preprocessing.partition("; ")
    if (before if separator else UNFRAMED) != needed:
        raise UserError(
            f"{path} holds statistics of pictures prepared as {statistics.preprocessing!r}, but "
            f"{needed!r} is needed: name the folder of real pictures instead"
        )
    if minimum is not None and statistics.num_images < minimum:
        raise UserError(
            f"{path} holds statistics of {statistics.num_images} pictures, and {minimum} are needed: "
            "give those of all pictures"
        )
    return statistics


def describe_reference(reference: ReferenceSource | None, captions: Sequence[str]) -> dict[str, Any] | None:
    """The reference in words; where it has captions, whether these are the evaluation's."""
    if reference is None:
        return None
    if isinstance(reference, ReferenceFolder):
        return reference.describe()
    described = reference.describe()
    if reference.captions_hash != hash_texts([]):
        described["captions_are_those_of_the_evaluation"] = reference.captions_hash == hash_texts(captions)
    return described
