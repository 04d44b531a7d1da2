"""Feature extractors: the networks that see the pictures, and how metrics share them.

A metric names its extractor by a specification (a small frozen dataclass). Metrics with equal specifications
share one loaded network, and several metrics on one network cost one pass for each batch.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class Preprocessing(Protocol):
    """Crop, resize and normalisation in front of a network."""

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to what the network reads."""

    def describe(self) -> str:
        """One line for manifests."""


class FeatureExtractor(ABC):
    """A frozen network that turns pictures into features. A plain object, no module: no checkpoint holds it.

    A subclass sets the attributes and implements ``_image_features`` and ``device``/``to`` of its network.

    Attributes:
        name: the network, in words. ``path``: where its weights are.
        width: number of features.
        content_hash: SHA-256 of everything that makes the features what they are.
        preprocessing: what happens to the pictures before the network.
    """

    name: str
    path: Path
    width: int
    content_hash: str
    preprocessing: Preprocessing
    model: Any

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(iter(self.model.parameters())).device

    def to(self, device: torch.device | str) -> "FeatureExtractor":
        """Move the network; returns itself."""
        self.model.to(device)
        self._last = None
        return self

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Features [B, D], fp32, of pictures [B, 3, H, W] in [0, 1].

        The features of the last batch are kept, so that several metrics cost one pass.
        """
        if self._last is not None and self._last[0] is images:
            return self._last[1]
        with torch.autocast(self.device.type, enabled=False):
            features = self._image_features(images)
        self._last = (images, features)
        return features

    @abstractmethod
    def _image_features(self, images: Tensor) -> Tensor:
        """Features [B, D], fp32, of pictures [B, 3, H, W] in [0, 1], under ``no_grad`` and in fp32."""


class ExtractorSpec(Protocol):
    """What to load: a frozen dataclass, so that equal ones are one network."""

    def load(self) -> FeatureExtractor:
        """Load the network, on the CPU.

        Raises:
            UserError: it can't be loaded.
        """

    def __hash__(self) -> int: ...


_LOADED: WeakValueDictionary[ExtractorSpec, FeatureExtractor] = WeakValueDictionary()


def shared_extractor(spec: ExtractorSpec) -> FeatureExtractor:
    """The extractor of this specification, loaded once and kept for as long as somebody uses it."""
    extractor = _LOADED.get(spec)
    if extractor is None:
        extractor = _LOADED[spec] = spec.load()
    return extractor


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[function(item) for item in items]``, on as many threads as torch may use: PIL gives up the GIL."""
    threads = min(torch.get_num_threads(), os.cpu_count() or 1, len(items))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
