"""Aesthetic score: a linear head on CLIP ViT-L/14, tuned on people's ratings from 1 to 10 (LAION)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.extractors import FeatureExtractor
from callbacks.metrics.judges import JudgedMetric, find_judge, linear_head, read_weights
from callbacks.metrics.pick_score import hub_judge
from callbacks.metrics.reference import ReferenceSource
from common.hashing import hash_file

CLIP_L14 = "openai/clip-vit-large-patch14"
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
_HEAD_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/" + HEAD.replace(
    "+", "%2B"
)


class ClipL14(ClipExtractor):
    """OpenAI's CLIP ViT-L/14, shared by all metrics that name it.

    Args:
        model: its folder; None: in the folder of judges or the hub's cache.
        judges: the folder of judges.

    Raises:
        UserError: it is missing or damaged.
    """

    def __init__(self, model: str | None, judges: str | None) -> None:
        super().__init__(hub_judge("CLIP ViT-L/14", CLIP_L14, model, judges))


class Aesthetic(JudgedMetric):
    """Mean rating of the pictures; the prompts do not matter. Higher is better.

    Args:
        head: file of the head, LAION's improved predictor (five layers without activations) or a single
            layer (default: ``sac+logos+ava1-l14-linearMSE.pth`` in the folder of judges).
        model: folder of CLIP ViT-L/14 (default: in the folder of judges, or the hub's cache).
        judges: folder of judges.
    """

    name = "aesthetic"
    version = 1

    def __init__(self, head: str | None = None, model: str | None = None, judges: str | None = None) -> None:
        super().__init__((ClipL14, model, judges))
        self.head, self.judges = head, judges
        self._weight, self._bias, self._hash = torch.zeros(0), torch.zeros(()), ""

    def bind(
        self,
        extractor: FeatureExtractor | None = None,
        reference: ReferenceSource | None = None,
        device: torch.device | str | None = None,
    ) -> "Aesthetic":
        """As ``ImageMetric.bind``; reads the head, too.

        Raises:
            UserError: network or head is missing, or the head belongs to another network.
        """
        super().bind(extractor, reference, device)
        how = f"curl -L --create-dirs -o '{{place}}' {_HEAD_URL}"
        file = find_judge(self.name, HEAD, how, self.head, self.judges)
        self._weight, self._bias = linear_head(read_weights(file, self.name), self.extractor.width, self.name)
        self._hash = hash_file(file)
        return self

    def judge(self, features: Tensor, prompts: list[str]) -> Tensor:
        return F.normalize(features.double().cpu(), dim=-1) @ self._weight + self._bias

    def settings(self) -> dict[str, Any]:
        """Which head."""
        return {"head": self._hash}
