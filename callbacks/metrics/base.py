"""What an image metric is to the rest of the project.

``metric.bind(…)`` gives it its network and reference; ``prepare(…)`` tells the whole evaluation list, for
those that look at groups or negative prompts; ``update(…)`` takes in each batch; ``results()``, collective
under torch.distributed, tells what was measured; ``reset()`` forgets the pictures. Metrics that name equal
networks share one, and if all are given the same tensor it sees each batch once. ``snapshot()`` and
``restore(…)`` carry what this process has seen over an interruption.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from callbacks.metrics.extractors import ExtractorSpec, FeatureExtractor, shared_extractor
from callbacks.metrics.reference import ReferenceSource, ReferenceStatistics, open_reference
from common.errors import UserError


class ImageMetric(Metric):
    """A torchmetrics object fed with pictures and their prompts.

    A subclass sets ``name`` (the stable name in reports and logs), ``version`` (raised when the number
    changes meaning), adds its states in ``setup_states`` and implements ``_add``, ``_value`` and, if it has
    more to tell, ``settings`` and ``details``. States are sums (``add_sum``), so every sample counts once on
    any number of processes.

    Args:
        spec: the network that sees the pictures; None: the one given to ``bind``.
        reference: file or folder of real pictures; None: the one given to ``bind``.
    """

    full_state_update = False
    name: str = ""
    version: int = 1
    needs_reference: bool = False
    needs_reference_features: bool = False
    minimum_images: int = 1
    num_images: int = 0
    """Pictures behind the last computed value, over all processes."""
    count: Tensor

    def __init__(self, spec: ExtractorSpec | None = None, reference: str | None = None) -> None:
        super().__init__()
        self.spec, self.reference_path = spec, reference
        self._bound: tuple[FeatureExtractor, ReferenceStatistics | None] | None = None

    @property
    def extractor(self) -> FeatureExtractor:
        """The network that sees the pictures.

        Raises:
            RuntimeError: ``bind`` was not called.
        """
        if self._bound is None:
            raise RuntimeError(f"{type(self).__name__}.bind() must come before the first update")
        return self._bound[0]

    @property
    def reference(self) -> ReferenceStatistics:
        """The statistics of real pictures, for metrics that need some."""
        assert self._bound is not None and self._bound[1] is not None
        return self._bound[1]

    def bind(
        self,
        extractor: FeatureExtractor | None = None,
        reference: ReferenceSource | None = None,
        device: torch.device | str | None = None,
    ) -> "ImageMetric":
        """Give the metric its eyes and, if it needs one, its reference; returns itself.

        Args:
            extractor: for metrics that name no network of their own.
            reference: for metrics that name none of their own; a folder's statistics are computed here,
                with all processes, unless they are cached.
            device: where the network goes (default: it stays where it is).

        Raises:
            UserError: there is no network, or no reference where one is needed, or one of another extractor.
        """
        chosen = shared_extractor(self.spec) if self.spec is not None else extractor
        if chosen is None:
            raise UserError(f"{self.name} needs a network that sees the pictures: name one in its settings")
        if device is not None:
            chosen.to(device)
        statistics = None
        if self.needs_reference:
            source = open_reference(self.reference_path) if self.reference_path is not None else reference
            if source is None:
                raise UserError(
                    f"{self.name} needs statistics of real pictures: set `reference`, make one with "
                    "scripts/make_reference.py, or take the metric out of `metrics`"
                )
            statistics = source.statistics(chosen, self.needs_reference_features)
        self._bound = (chosen, statistics)
        if "count" not in self._defaults:
            self.add_sum("count", dtype=torch.long)
            self.setup_states(chosen.width)
        return self

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Add a state of this shape that begins at zero and is summed over the processes."""
        zeros = torch.zeros(shape, dtype=dtype, device=self.device)
        self.add_state(name, zeros, dist_reduce_fx="sum")

    def prepare(
        self,
        captions: Sequence[str],
        groups: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
    ) -> None:
        """Learn the whole evaluation list before the first update: captions, their groups and negatives.

        Most metrics have no use for it.
        """

    def update(
        self,
        images: Tensor,
        prompts: list[str],
        is_padding: Tensor | None = None,
        positions: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Take in pictures [B, 3, H, W] in [0, 1] and their B prompts; padding samples are left out.

        Args:
            positions: [B], the places of the prompts in the list given to ``prepare``.
        """
        places = None if positions is None else [int(place) for place in positions]
        if len(images) != len(prompts) or (places is not None and len(places) != len(prompts)):
            raise ValueError(
                f"{len(images)} pictures, but {len(prompts)} prompts"
                + ("" if places is None else f" and {len(places)} positions")
            )
        keep = [i for i in range(len(prompts)) if is_padding is None or not bool(is_padding[i])]
        if not keep:
            return
        # The whole batch goes through the extractor, whose memory of the last batch the metrics share.
        features = self.extractor.image_features(images)[keep]
        kept_places = None if places is None else [places[i] for i in keep]
        self._add(features, [prompts[i] for i in keep], kept_places)
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

    def results(self) -> dict[str, dict[str, Any]]:
        """``{NAME: {"value", "num_images", "details"}}`` of everything measured. Collective."""
        return {self.name: self.result()}

    def with_parts(
        self, overall: dict[str, Any], parts: Mapping[str, Mapping[str, Any]], *not_shared: str
    ) -> dict[str, dict[str, Any]]:
        """``NAME`` and a ``NAME/PART`` for each part, whose details are those of the whole and its own.

        Args:
            overall: from ``result``; its details of the names ``not_shared`` are its alone.
            parts: each with "value", "num_images" and details of its own.
        """
        shared = {k: v for k, v in overall["details"].items() if k not in not_shared}
        found = {self.name: overall}
        for part, own in parts.items():
            details = shared | {k: v for k, v in own.items() if k not in ("value", "num_images")}
            result = {"value": own["value"], "num_images": own["num_images"], "details": details}
            found[f"{self.name}/{part}"] = result
        return found

    def snapshot(self) -> dict[str, Tensor]:
        """What this process has taken in so far, as tensors on the CPU, for ``restore``."""
        return {name: getattr(self, name).detach().cpu().clone() for name in self._defaults}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Add what a ``snapshot`` holds, possibly one of another process; the settings must be the same."""
        for name in self._defaults:
            state = getattr(self, name)
            state += snapshot[name].to(state.device)
        self._update_count += 1  # torchmetrics warns about values computed before any update
        self._computed = None

    def key(self) -> dict[str, Any]:
        """Everything but the pictures that the value depends on, for caches."""
        return {
            "metric": self.name,
            "metric_version": self.version,
            "extractor": self.extractor.content_hash,
            "reference": self.reference.content_hash if self.needs_reference else None,
        } | self.settings()

    def settings(self) -> dict[str, Any]:
        """Settings other than the defaults on which the value depends; part of ``key``."""
        return {}

    def details(self) -> dict[str, Any]:
        """What the value depends on."""
        details = {
            "extractor": self.extractor.name,
            "extractor_hash": self.extractor.content_hash,
            "preprocessing": self.extractor.preprocessing,
            "metric_version": self.version,
        } | self.settings()
        if self.needs_reference:
            details["reference_num_images"] = self.reference.num_images
            details["reference_hash"] = self.reference.content_hash
        return details

    @abstractmethod
    def setup_states(self, width: int) -> None:
        """Add the states beside ``count``; ``width`` is the number of features."""

    @abstractmethod
    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        """Take in features [B, D] of pictures that count, their prompts, and the places of these."""

    @abstractmethod
    def _value(self) -> Tensor:
        """The value, from the states summed over all processes."""


def bind_metrics(
    metrics: Sequence[ImageMetric],
    extractor: FeatureExtractor | None,
    reference: ReferenceSource | None,
    device: torch.device,
) -> None:
    """``ImageMetric.bind`` of all metrics; a reference folder goes through each network once. Collective."""
    # statistics with the features of single pictures serve the metrics that need none of those
    for metric in sorted(metrics, key=lambda metric: not metric.needs_reference_features):
        metric.bind(extractor, reference, device)


def place_metrics(metrics: Sequence[ImageMetric], device: torch.device) -> None:
    """Move networks and sums of bound metrics to where this process draws."""
    for metric in metrics:
        metric.extractor.to(device)
        # Sums are in float64, which Apple's GPUs lack; NCCL, though, sums only what lies on a GPU.
        metric.to(device if device.type == "cuda" else "cpu")


def refuse_repeated(metrics: Sequence[ImageMetric], owner: str = "metrics") -> None:
    """Raise a UserError if two of the metrics have one name; ``owner`` is the setting that holds them."""
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise UserError(f"{owner} holds the same metric twice: {', '.join(names)}; evaluate twice instead")
