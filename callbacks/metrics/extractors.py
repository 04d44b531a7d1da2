"""Feature extractors: the networks that see the pictures, and how metrics share them.

A metric names its network by the extractor's class and its arguments. Metrics that name equal ones share one
loaded network, and several metrics on one network cost one pass for each batch.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
ExtractorSpec = tuple[Any, ...]
"""The class of an extractor and its arguments, which can be hashed."""


class FeatureExtractor(ABC):
    """A frozen network that turns pictures into features. A plain object, no module: no checkpoint holds it.

    A subclass sets ``model`` and ``width`` (the number of features) and implements ``_image_features``.

    Args:
        name: the network, in words. ``path``: where its weights are.
        content_hash: SHA-256 of everything that makes the features what they are.
        preprocessing: what happens to the pictures before the network, in words.
    """

    width: int
    model: Any

    def __init__(self, name: str, path: Path, content_hash: str, preprocessing: str) -> None:
        self.name, self.path = name, path
        self.content_hash, self.preprocessing = content_hash, preprocessing
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(iter(self.model.parameters())).device

    def to(self, device: torch.device | str) -> None:
        """Move the network."""
        self.model.to(device)
        self._last = None

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Features [B, D], fp32, of pictures [B, 3, H, W] in [0, 1].

        The features of the last batch are kept, so that several metrics cost one pass.
        """
        if self._last is None or self._last[0] is not images:
            with torch.autocast(self.device.type, enabled=False):
                self._last = (images, self._image_features(images))
        return self._last[1]

    @abstractmethod
    def _image_features(self, images: Tensor) -> Tensor:
        """Features [B, D], fp32, of pictures [B, 3, H, W] in [0, 1], under ``no_grad`` and in fp32."""


class Pixels(FeatureExtractor):
    """No network: the features are the pictures themselves, [B, 3, H, W], fp32 in [0, 1].

    A metric on pixels gives ``(Pixels,)`` as its ``spec``; see docs/python.md.
    """

    width = 3

    def __init__(self) -> None:
        super().__init__("pixels", Path(), "pixels", "none")
        self.model = torch.nn.Identity()

    @property
    def device(self) -> torch.device:
        """There is nothing to be anywhere."""
        return torch.device("cpu")

    def _image_features(self, images: Tensor) -> Tensor:
        return images.float()


_LOADED: WeakValueDictionary[ExtractorSpec, FeatureExtractor] = WeakValueDictionary()


def shared_extractor(spec: ExtractorSpec) -> FeatureExtractor:
    """The extractor that this names, loaded once (on the CPU) and kept for as long as somebody uses it."""
    extractor = _LOADED.get(spec)
    if extractor is None:
        kind, *arguments = spec
        extractor = _LOADED[spec] = kind(*arguments)
    return extractor


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[function(item) for item in items]``, on as many threads as torch may use: PIL gives up the GIL."""
    threads = min(torch.get_num_threads(), os.cpu_count() or 1)
    if threads < 2:  # a thread in a forked process may wait for ever
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def by_size(images: Tensor | Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Batches [b, 3, H, W] of pictures of equal size, with the places of these in the list."""
    if isinstance(images, Tensor):
        return [(list(range(len(images))), images)]
    sizes: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(i)
    return [(members, torch.stack([images[i] for i in members])) for members in sizes.values()]
