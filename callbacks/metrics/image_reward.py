"""ImageReward: how people would rate a picture for its prompt, by BLIP and a head tuned on their rankings.

Xu et al. 2023 (arXiv 2304.05977), version 1.0, on transformers' BLIP.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers import AutoTokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from callbacks.metrics.extractors import FeatureExtractor, in_threads
from callbacks.metrics.judges import JudgedMetric, find_judge, in_hub_cache, linear_head, read_weights
from callbacks.metrics.pick_score import hub_judge
from common.errors import UserError, first_line
from common.hashing import hash_file, hash_folder, to_uint8

FILE, REPOSITORY, TOKENIZER = "ImageReward.pt", "zai-org/ImageReward", "google-bert/bert-base-uncased"
# of the reward over the rankings it was tuned on: rewards have mean 0 and deviation 1 there
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
_HEAD_WIDTH = 64  # of each attention head, in both towers

_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)
"""BLIP's own names of the vision tower's weights, and transformers'; those of the text tower are the same."""


class ImageRewardExtractor(FeatureExtractor):
    """BLIP with ImageReward's head; the features of a picture are the vision tower's tokens [B, N, D].

    Args:
        checkpoint: ``ImageReward.pt``; None: in the folder of judges or the hub's cache.
        tokenizer: folder of BERT's tokenizer; None: in the folder of judges or the hub's cache.
        judges: the folder of judges.

    Raises:
        UserError: something is missing, damaged, or belongs to another network.
    """

    def __init__(self, checkpoint: str | None, tokenizer: str | None, judges: str | None) -> None:
        how = f"hf download {REPOSITORY} {FILE} --local-dir $(dirname {{place}})"
        others = [folder / FILE for folder in in_hub_cache(REPOSITORY, FILE)]
        file = find_judge("image_reward", FILE, how, checkpoint, judges, others)
        words = hub_judge("image_reward", TOKENIZER, tokenizer, judges)
        weights = read_weights(file, "image_reward")
        self.model = nn.Module()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(words), trust_remote_code=False)
            self.model.vision, self.model.text = towers(weights)
        except Exception as error:  # a lacking weight, another shape, no tokenizer: each raises another type
            raise UserError(
                f"image_reward: {file} and the tokenizer {words} are not those of ImageReward 1.0 "
                f"({first_line(error)}); fetch them again"
            ) from error
        self.model.requires_grad_(False).eval()
        self.width = self.model.text.config.hidden_size
        self.weight, self.bias = linear_head(part_of(weights, "mlp."), self.width, "image_reward")
        side = self.model.vision.config.image_size
        self._transform = v2.Compose(
            [
                v2.Resize(side, v2.InterpolationMode.BICUBIC),
                v2.CenterCrop(side),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
            ]
        )
        content = hashlib.sha256(f"image_reward {hash_file(file)} {hash_folder(words)}".encode()).hexdigest()
        resized = f"8-bit, resize shortest to {side} bicubic, centre crop"
        super().__init__("ImageReward 1.0 (BLIP ViT-L/16)", file, content, resized)

    def _image_features(self, images: Tensor) -> Tensor:
        values = list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
        pixels = torch.stack(in_threads(lambda picture: self._transform(Image.fromarray(picture)), values))
        tokens: Tensor = self.model.vision(pixels.to(self.device)).last_hidden_state
        return tokens

    @torch.no_grad()
    def rewards(self, features: Tensor, prompts: list[str]) -> Tensor:
        """Rewards [B], float64, of the pictures' tokens [B, N, D] and their prompts."""
        words = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            read = self.model.text(
                input_ids=words.input_ids,
                attention_mask=words.attention_mask,
                encoder_hidden_states=features.to(self.device),
            )
        first = read.last_hidden_state[:, 0].double().cpu()
        return (first @ self.weight + self.bias - MEAN) / DEVIATION


def part_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def towers(weights: Mapping[str, Tensor]) -> tuple[BlipVisionModel, BlipTextModel]:
    """Vision and text tower of BLIP in transformers' classes, their sizes read from the weights.

    Args:
        weights: ``blip.visual_encoder.…`` and ``blip.text_encoder.…``.

    Raises:
        KeyError, RuntimeError: weights are missing, or are of another network.
    """
    vision, text = (part_of(weights, f"blip.{name}_encoder.") for name in ("visual", "text"))
    for pattern, name in _VISION:
        vision = {re.sub(pattern, name, old): weight for old, weight in vision.items()}
    patch, places = vision["embeddings.patch_embedding.weight"], vision["embeddings.position_embedding"]
    side = round((places.shape[1] - 1) ** 0.5) * patch.shape[-1]
    eye = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=len(patch), num_attention_heads=len(patch) // _HEAD_WIDTH, image_size=side,
            intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]), patch_size=patch.shape[-1],
            num_hidden_layers=_layers(vision, "encoder.layers."), layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    table, positions = (text[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
    reader = BlipTextModel(
        BlipTextConfig(
            vocab_size=len(table), hidden_size=table.shape[1], encoder_hidden_size=len(patch),
            num_attention_heads=table.shape[1] // _HEAD_WIDTH, max_position_embeddings=len(positions),
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_layers(text, "encoder.layer."), is_decoder=True,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    eye.load_state_dict(vision)
    reader.load_state_dict({name: w for name, w in text.items() if name != "embeddings.position_ids"})
    return eye, reader


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.split(".")[0]) for name in part_of(weights, prefix))


class ImageReward(JudgedMetric):
    """Mean reward, about normal over the pictures that it was tuned on. Higher is better.

    Args:
        checkpoint: file of the weights (default: ``ImageReward.pt`` in the folder of judges or hub's cache).
        tokenizer: folder of BERT's tokenizer (default: ``bert-base-uncased``, there too).
        judges: folder of judges.
    """

    name = "image_reward"
    version = 1

    def __init__(
        self, checkpoint: str | None = None, tokenizer: str | None = None, judges: str | None = None
    ) -> None:
        super().__init__((ImageRewardExtractor, checkpoint, tokenizer, judges))

    def judge(self, features: Tensor, prompts: list[str]) -> Tensor:
        assert isinstance(self.extractor, ImageRewardExtractor)
        return self.extractor.rewards(features, prompts)

    def details(self) -> dict[str, Any]:
        """How long a prompt may be."""
        return super().details() | {"tokens": TOKENS}
