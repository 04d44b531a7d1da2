"""Statistics of a folder of real pictures: computed once for each network, then found again by content."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from callbacks.metrics.extractors import FeatureExtractor, file_hash, in_threads
from callbacks.metrics.reference import (
    FeatureSums,
    ReferenceSource,
    ReferenceStatistics,
    mean_and_covariance,
)
from common.errors import UserError, first_line
from common.files import user_cache_dir
from common.hashing import hash_json, hash_texts
from common.processes import from_every_rank, rank_and_world_size
from lightning_modules.networks.loading import asset_path

log = logging.getLogger(__name__)
EXTENSIONS = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VERSION = 1
"""Raised when the statistics of the same pictures change, so that cached ones are made again."""
UNFRAMED = "as they are"
"""The name of no crop and resize before the network's own."""
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_reference(path: str | Path) -> ReferenceSource:
    """The reference at a path: a folder of real pictures, or a file of statistics.

    Raises:
        UserError: there is nothing at the path, or no reference.
    """
    resolved = asset_path(path)
    return ReferenceFolder(resolved) if resolved.is_dir() else ReferenceStatistics.load(resolved)


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
        self.files = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
        self._require(len(self.files))
        self._digests: list[str] | None = None
        self._known: dict[Path, ReferenceStatistics] = {}

    def _require(self, count: int) -> None:
        if count < self.minimum:
            raise UserError(
                f"the reference folder {str(self.folder)!r} holds {count} readable pictures, and "
                f"{self.minimum} are needed: complete it, or name another one"
            )

    @property
    def content_hash(self) -> str:
        """SHA-256 of the files, in the order of their names; collective."""
        if self._digests is None:
            rank, world = rank_and_world_size()
            own = [
                digest
                for start in self._starts(rank, world, "hashing the reference")
                for digest in in_threads(file_hash, self._share(start, rank, world))
            ]
            shares = from_every_rank(own)
            self._digests = [shares[i % world][i // world] for i in range(len(self.files))]
        return hash_texts(self._digests)

    def _share(self, start: int, rank: int, world: int) -> list[Path]:
        return self.files[rank::world][start : start + self.batch_size]

    def _starts(self, rank: int, world: int, label: str) -> tqdm:
        own = len(self.files[rank::world])
        return tqdm(range(0, own, self.batch_size), desc=label, unit="batch", disable=rank > 0)

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
        rank, world = rank_and_world_size()
        sums, rows = FeatureSums(extractor.width), [torch.zeros(0, extractor.width)]
        places: list[int] = []
        corrupt: list[str] = []
        for start in self._starts(rank, world, f"real pictures through {extractor.name}"):
            features, found, unread = self._batch(start, rank, world, extractor)
            sums.add(features)
            corrupt += unread
            if keep:
                rows.append(features)
                places += found
            if corrupt and not self.skip_corrupt:
                break
        self._report([name for share in from_every_rank(corrupt) for name in share])
        shares = from_every_rank((sums.total, sums.outer, sums.count, places, torch.cat(rows)))
        count = sum(share[2] for share in shares)
        self._require(count)
        total, outer = (torch.stack([share[i] for share in shares]).sum(0) for i in (0, 1))
        mean, covariance = mean_and_covariance(total, outer, count)
        order = torch.tensor([place for share in shares for place in share[3]], dtype=torch.long).argsort()
        return ReferenceStatistics(
            mean=mean,
            covariance=covariance,
            num_images=count,
            extractor=extractor.name,
            extractor_hash=extractor.content_hash,
            captions_hash=hash_texts([]),
            pictures_hash=self.content_hash,
            preprocessing=f"{self.preprocessing}; {extractor.preprocessing.describe()}",
            source=f"{count:,} pictures of the folder {self.folder.name}",
            features=torch.cat([share[4] for share in shares])[order] if keep else None,
        )

    def _report(self, corrupt: list[str]) -> None:
        if not corrupt:
            return
        named = "; ".join(corrupt[:3]) + (f"; and {len(corrupt) - 3} more" if len(corrupt) > 3 else "")
        if not self.skip_corrupt:
            raise UserError(
                f"the reference folder {str(self.folder)!r} holds a picture that can't be read: {named}. "
                "Fetch it again, or let corrupt pictures be skipped (evaluate: --skip-corrupt true; the "
                "reference is another one then)"
            )
        log.warning("%d corrupt pictures of %s are skipped: %s", len(corrupt), self.folder, named)

    def _batch(
        self, start: int, rank: int, world: int, extractor: FeatureExtractor
    ) -> tuple[Tensor, list[int], list[str]]:
        """Features [b, D] of the readable pictures of a batch, their places, and what could not be read."""
        read = in_threads(self._read, self._share(start, rank, world))
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(read):
            if isinstance(picture, Tensor):
                by_shape.setdefault(tuple(picture.shape), []).append(i)
        parts, places = [torch.zeros(0, extractor.width)], []
        for members in by_shape.values():
            images = torch.stack([read[i] for i in members]).to(extractor.device).float() / 255  # type: ignore[misc]
            parts.append(extractor.image_features(images).cpu())
            places += [rank + world * (start + i) for i in members]
        return torch.cat(parts), places, [text for text in read if isinstance(text, str)]

    def _read(self, path: Path) -> Tensor | str:
        """A picture [3, H, W], 8-bit, or what is wrong with it."""
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except _UNREADABLE as error:
            return f"{path.relative_to(self.folder)} ({first_line(error)})"
        if self.transform is not None:
            picture = self.transform(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
