"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752), SD Turbo and models of their kind; SDXL
(Podell et al., arXiv 2307.01952) and SDXL Turbo."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder


class StableDiffusion(Backbone):
    """A UNet with one CLIP (or OpenCLIP) text encoder."""

    pipeline_class = StableDiffusionPipeline
    denoiser = ("unet", UNet2DConditionModel)
    text_encoders = {"text_encoder": CLIPTextModel}
    tokenizers = {"tokenizer": CLIPTokenizer}
    conditions = {
        "class_embed_type": (None,), "num_class_embeds": (None,), "addition_embed_type": (None, "text"),
        "encoder_hid_dim_type": (None, "text_proj"),
    }  # fmt: skip

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        return ClipPromptEncoder(
            parts.tokenizers, parts.text_encoders, int(parts.tokenizers[0].model_max_length)
        )

    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        expected = parts.denoiser.config.cross_attention_dim
        width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
        return width, expected if isinstance(expected, int) else None

    def extras(self, parts: TextToImageParts) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class ClipPromptEncoder(PromptEncoder):
    """The last hidden states [B, L, D] of one CLIP text encoder."""

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        ids, mask = self.tokens(prompts)
        encoder = self.text_encoders[0]
        # Stable Diffusion attends to padding too, unless its text encoder says otherwise.
        masked = getattr(encoder.config, "use_attention_mask", False)
        return {"encoder_hidden_states": encoder(ids, attention_mask=mask if masked else None)[0]}


class StableDiffusionXL(StableDiffusion):
    """A UNet with two text encoders side by side, the second one's pooled text, and the picture's size."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
    conditions = StableDiffusion.conditions | {"addition_embed_type": (None, "text", "text_time")}

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        return SdxlPromptEncoder(
            parts.tokenizers, parts.text_encoders, parts.picture_size, zero_null=self._zero_null(parts)
        )

    def extras(self, parts: TextToImageParts) -> dict[str, Any]:
        # the watermark is drawn into pictures if a library happens to be installed: not what was distilled
        return {"force_zeros_for_empty_prompt": self._zero_null(parts), "add_watermarker": False}

    @staticmethod
    def _zero_null(parts: TextToImageParts) -> bool:
        return bool(parts.index.get("force_zeros_for_empty_prompt", True))


class SdxlPromptEncoder(PromptEncoder):
    """Hidden states before the last layer of both encoders [B, L, D + D'], pooled text [B, P], sizes [B, 6].

    The sizes (section 2.2 of the paper) are those of a whole, uncropped picture of the model's own size, as
    in the stock pipeline. No prompt is all zeros if the model's ``force_zeros_for_empty_prompt`` says so (it
    does in SDXL), which is not the same as the empty prompt encoded.
    """

    def __init__(
        self, tokenizers: list[Any], text_encoders: list[Any], picture_size: tuple[int, int], zero_null: bool
    ) -> None:
        super().__init__(tokenizers, text_encoders, int(tokenizers[0].model_max_length))
        self.picture_size, self.zero_null = picture_size, zero_null

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        outputs = [
            encoder(self.tokens(prompts, place)[0], output_hidden_states=True)
            for place, encoder in enumerate(self.text_encoders)
        ]
        return {
            "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            "text_embeds": outputs[1].text_embeds,
        }

    def picture_conditions(self, count: int) -> dict[str, Tensor]:
        sizes = torch.tensor([*self.picture_size, 0, 0, *self.picture_size], dtype=torch.float32)
        return {"time_ids": sizes.to(self.device).expand(count, -1)}

    def embed_null(self) -> dict[str, Tensor]:
        empty = self.embed([""])
        if not self.zero_null:
            return empty
        texts = ("encoder_hidden_states", "text_embeds")
        return {name: torch.zeros_like(x) if name in texts else x for name, x in empty.items()}
