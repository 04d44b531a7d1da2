"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752), SD Turbo, models of their kind."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.prompts import PromptEncoder


class StableDiffusion(Backbone):
    """A UNet with one CLIP (or OpenCLIP) text encoder."""

    pipeline_class = StableDiffusionPipeline
    denoiser = ("unet", UNet2DConditionModel)
    text_encoders = {"text_encoder": CLIPTextModel}
    tokenizers = {"tokenizer": CLIPTokenizer}

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        return ClipPromptEncoder(
            parts.tokenizers, parts.text_encoders, int(parts.tokenizers[0].model_max_length)
        )

    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        expected = parts.denoiser.config.cross_attention_dim
        return parts.text_encoders[0].config.hidden_size, expected if isinstance(expected, int) else None

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
