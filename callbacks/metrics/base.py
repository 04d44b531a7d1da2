"""What an image metric is to the rest of the project."""

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.reference import ReferenceStatistics
from lightning_modules.errors import UserError


class ImageMetric(Metric):
    """A torchmetrics object fed with pictures and their prompts.

    A subclass sets ``name`` (the stable name in reports and logs), ``version`` (raised when the number
    changes meaning), adds its states in ``setup_states`` and implements ``_add``, ``_value`` and, if it has
    more to tell, ``details``. States are sums with ``dist_reduce_fx="sum"``, so every sample counts once on
    any number of processes.
    """

    full_state_update = False
    name: str = ""
    version: int = 1
    higher_is_better: bool | None = None
    needs_reference: bool = False
    minimum_images: int = 1
    num_images: int = 0
    """Pictures behind the last computed value, over all processes."""
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Through __dict__, past torch's module registry: the CLIP is shared, and is nobody's child.
        self.__dict__["_extractor"] = None
        self.__dict__["reference"] = None

    @property
    def extractor(self) -> ClipExtractor:
        """The CLIP that sees the pictures.

        Raises:
            RuntimeError: ``bind`` was not called.
        """
        extractor = self.__dict__["_extractor"]
        if extractor is None:
            raise RuntimeError(f"{type(self).__name__}.bind() must come before the first update")
        return extractor

    def bind(self, extractor: ClipExtractor, reference: ReferenceStatistics | None = None) -> "ImageMetric":
        """Give the metric its eyes and, if it needs one, its reference; returns itself.

        Raises:
            UserError: it needs a reference and there is none, or one of another extractor.
        """
        if self.needs_reference:
            if reference is None:
                raise UserError(
                    f"{self.name} needs statistics of real pictures: set `reference`, make one with "
                    "scripts/make_reference.py, or take the metric out of `metrics`"
                )
            reference.require_extractor(extractor)
        self.__dict__["_extractor"], self.__dict__["reference"] = extractor, reference
        if "count" not in self._defaults:
            self.setup_states(extractor.width)
        return self

    def update(self, images: Tensor, prompts: list[str], is_padding: Tensor | None = None) -> None:
        """Take in pictures [B, 3, H, W] in [0, 1] and their B prompts; padding samples are left out.

        Raises:
            ValueError: numbers of pictures and prompts differ.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures, but {len(prompts)} prompts")
        keep = [i for i in range(len(prompts)) if is_padding is None or not bool(is_padding[i])]
        if not keep:
            return
        # The whole batch goes through the extractor, whose memory of the last batch the metrics share.
        self._add(self.extractor.image_features(images)[keep], [prompts[i] for i in keep])
        self.count += len(keep)

    def compute(self) -> Tensor:
        """The value over all processes, as a float64 scalar.

        Raises:
            UserError: fewer pictures than ``minimum_images``.
        """
        self.num_images = int(self.count)
        if self.num_images < self.minimum_images:
            raise UserError(
                f"{self.name} needs at least {self.minimum_images} pictures and saw {self.num_images}: "
                "raise the evaluation size"
            )
        return self._value()

    def result(self) -> dict[str, Any]:
        """``{"value", "num_images", "details"}``, as reports hold it. Collective under torch.distributed."""
        value = float(self.compute())
        return {"value": value, "num_images": self.num_images, "details": self.details()}

    def key(self) -> dict[str, Any]:
        """Everything but the pictures that the value depends on, for caches."""
        reference = self.__dict__["reference"]
        return {
            "metric": self.name,
            "metric_version": self.version,
            "extractor": self.extractor.content_hash,
            "reference": reference.content_hash if self.needs_reference else None,
        }

    def details(self) -> dict[str, Any]:
        """What the value depends on."""
        return {
            "extractor": self.extractor.name,
            "extractor_hash": self.extractor.content_hash,
            "preprocessing": self.extractor.preprocessing.describe(),
            "metric_version": self.version,
        }

    @abstractmethod
    def setup_states(self, width: int) -> None:
        """Add the states, ``count`` (a long scalar) among them; ``width`` is the number of features."""

    @abstractmethod
    def _add(self, features: Tensor, prompts: list[str]) -> None:
        """Take in features [B, D] of pictures that count, and their prompts."""

    @abstractmethod
    def _value(self) -> Tensor:
        """The value, from the states summed over all processes."""
