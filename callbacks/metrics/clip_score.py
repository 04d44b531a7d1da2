"""CLIP score: how well a picture fits its prompt.

Hessel et al. 2021, without its factor 2.5 and without its clamp at zero.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import TextImageExtractor, clip_network
from callbacks.metrics.extractors import FeatureExtractor
from common.errors import UserError


class ClipPreset(NamedTuple):
    """A published choice of network and prefix."""

    model: str
    pretrained: str
    prefix: str


PRESETS = {
    # OpenAI's network, whose activation is QuickGELU.
    "clip_vitb32": ClipPreset("ViT-B-32-quickgelu", "openai", ""),
    # GigaGAN's evaluator, which DMD2 and SiD-LSG use.
    "clip_vitg14_photo": ClipPreset("ViT-g-14", "laion2b_s12b_b42k", "A photo depicts "),
}


class ClipScore(ImageMetric):
    """Mean cosine of image and text features. Higher is better.

    Args:
        model: None for the scoring CLIP of the evaluation; a preset (``clip_vitb32``, ``clip_vitg14_photo``);
            a CLIP folder in transformers' format; an open_clip architecture (with ``pretrained``) or
            ``local-dir:<folder>``.
        pretrained: open_clip's tag or file of weights; with a preset, a file in place of its download.
        prefix: put before every prompt (default: the preset's, else none).
        scale: factor of the mean cosine, 1 or 100.

    Raises:
        UserError: weights without a model, or another scale.
    """

    name = "clip_score"
    version = 1

    total: Tensor
    truncated: Tensor

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | None = None,
        prefix: str | None = None,
        scale: float = 1.0,
    ) -> None:
        if model is None and pretrained is not None:
            raise UserError(f"clip_score: pretrained is {pretrained!r}, but no model is named: set `model`")
        if scale not in (1, 100):
            raise UserError(f"clip_score: scale is {scale}; papers use 1 or 100")
        if (preset := PRESETS.get(model or "")) is not None:
            model, pretrained = preset.model, pretrained or preset.pretrained
            prefix = preset.prefix if prefix is None else prefix
        super().__init__(clip_network(model, pretrained))
        self.prefix, self.scale = prefix or "", float(scale)

    def setup_states(self, width: int) -> None:
        """Sum of cosines, and how many prompts were cut."""
        self.add_sum("total")
        self.add_sum("truncated", dtype=torch.long)
        self.num_truncated = 0

    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        extractor, texts = text_extractor(self.extractor, self.name), [self.prefix + p for p in prompts]
        self.total += cosines(features, extractor.text_features(texts)).sum().to(self.total.device)
        self.truncated += extractor.count_truncated(texts)

    def _value(self) -> Tensor:
        self.num_truncated = int(self.truncated)
        return self.scale * self.total / self.count

    def settings(self) -> dict[str, Any]:
        """Prefix and scale, unless they are the default ones."""
        return {} if (self.prefix, self.scale) == ("", 1.0) else {"prefix": self.prefix, "scale": self.scale}

    def details(self) -> dict[str, Any]:
        """The extractor, and how the prompts were put to it."""
        asked = {"prefix": self.prefix, "scale": self.scale, "truncated_prompts": self.num_truncated}
        return super().details() | asked


def cosines(features: Tensor, texts: Tensor) -> Tensor:
    """Cosines [B], float64, on the CPU, of image and text features [B, D]."""
    return torch.nn.functional.cosine_similarity(features.double().cpu(), texts.double().cpu(), dim=-1)


def text_extractor(extractor: FeatureExtractor, metric: str) -> TextImageExtractor:
    """The extractor, if it reads texts; else a UserError."""
    if not isinstance(extractor, TextImageExtractor):
        raise UserError(f"{metric} needs a CLIP, and {extractor.name} reads no texts: name a CLIP as `model`")
    return extractor
