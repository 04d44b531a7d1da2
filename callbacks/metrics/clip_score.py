"""CLIP score: how well a picture fits its prompt.

Hessel et al. 2021, without its factor 2.5 and without its clamp at zero.
"""

from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric


class ClipScore(ImageMetric):
    """Mean cosine of image and text features, times 1. Higher is better."""

    name = "clip_score"
    version = 1
    higher_is_better = True

    total: Tensor
    count: Tensor

    def setup_states(self, width: int) -> None:
        """Sum of cosines, and their number."""
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, features: Tensor, prompts: list[str]) -> None:
        texts = self.extractor.text_features(prompts)
        cosine = torch.nn.functional.cosine_similarity(features.double().cpu(), texts.double().cpu(), dim=-1)
        self.total += cosine.sum().to(self.total.device)

    def _value(self) -> Tensor:
        return self.total / self.count

    def details(self) -> dict[str, Any]:
        """The extractor, and how the prompts were put to it."""
        return super().details() | {"prefix": "", "scale": 1.0}
