"""PickScore: how likely people would pick a picture for its prompt, as a CLIP tuned on their choices says.

Kirstain et al. 2023 (arXiv 2305.01569), section 4.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import cosines
from callbacks.metrics.judges import JudgedMetric, find_judge, in_hub_cache

PICK_SCORE, PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScoreExtractor(ClipExtractor):
    """The network of PickScore, with the tokenizer and image processor of the CLIP that it was tuned from.

    Args:
        model: its folder, in which the latter two may lie, too; None: in the folder of judges or hub's cache.
        judges: the folder of judges.

    Raises:
        UserError: a folder is missing or damaged.
    """

    def __init__(self, model: str | None, judges: str | None) -> None:
        folder = hub_judge("pick_score", PICK_SCORE, model, judges)
        own = (folder / "preprocessor_config.json").is_file() and (folder / "tokenizer_config.json").is_file()
        super().__init__(folder, None if own else hub_judge("pick_score", PROCESSOR, None, judges))


def hub_judge(metric: str, repository: str, given: str | None, judges: str | None) -> Path:
    """The folder of a model of the hub.

    Raises:
        UserError: it is missing.
    """
    name, how = repository.rpartition("/")[2], f"hf download {repository} --local-dir {{place}}"
    return find_judge(metric, name, how, given, judges, in_hub_cache(repository))


class PickScore(JudgedMetric):
    """Mean of exp(logit scale) × cosine of picture and prompt, about 100 times the cosine. Higher is better.

    Args:
        model: folder of the weights (default: ``PickScore_v1`` in the folder of judges, or the hub's cache).
        judges: folder of judges.
    """

    name = "pick_score"
    version = 1

    def __init__(self, model: str | None = None, judges: str | None = None) -> None:
        super().__init__((PickScoreExtractor, model, judges))

    def judge(self, features: Tensor, prompts: list[str]) -> Tensor:
        extractor = self.extractor
        assert isinstance(extractor, ClipExtractor)
        # s(x, y) = E_txt(x) · E_img(y) · T, with features of unit length            equation 1
        scale = extractor.clip.model.logit_scale.exp().double().cpu()
        return scale * cosines(features, extractor.text_features(prompts))

    def details(self) -> dict[str, Any]:
        """What differs from the authors' script."""
        return super().details() | {"differs": "fp32 on 8-bit pictures in memory"}
