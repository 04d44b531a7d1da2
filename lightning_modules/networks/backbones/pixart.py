"""PixArt-α (Chen et al., arXiv 2310.00426): a diffusion transformer with a T5 text encoder."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder

MAX_TOKENS = 120  # the paper's, section 2.3; the stock pipeline's default


class PixArtAlpha(Backbone):
    """A transformer that attends to T5 text with a mask and may be told the picture's size."""

    pipeline_class = PixArtAlphaPipeline
    denoiser = ("transformer", PixArtTransformer2DModel)
    text_encoders = {"text_encoder": T5EncoderModel}
    tokenizers = {"tokenizer": T5Tokenizer}

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        size = parts.picture_size if parts.denoiser.use_additional_conditions else None
        return T5PromptEncoder(parts.tokenizers, parts.text_encoders, size)

    def call_options(self, parts: TextToImageParts) -> dict[str, Any]:
        # the folder's own size, whichever it is; prompts as the student was trained on, not rewritten
        return {"use_resolution_binning": False, "clean_caption": False}

    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        return parts.text_encoders[0].config.d_model, parts.denoiser.config.caption_channels


class T5PromptEncoder(PromptEncoder):
    """Hidden states [B, 120, D] and mask [B, 120]; with ``picture_size``, it [B, 2] and its ratio [B, 1] too.

    Prompts are put into lower case, as PixArt was trained; markup and web addresses are not cleaned away (the
    stock pipeline's ``clean_caption``).
    """

    def __init__(
        self, tokenizers: list[Any], text_encoders: list[Any], picture_size: tuple[int, int] | None
    ) -> None:
        super().__init__(tokenizers, text_encoders, MAX_TOKENS)
        self.picture_size = picture_size

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        ids, mask = self.tokens([prompt.lower().strip() for prompt in prompts])
        hidden = self.text_encoders[0](ids, attention_mask=mask)[0]
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def picture_conditions(self, count: int) -> dict[str, Tensor]:
        if self.picture_size is None:
            return {}
        size = torch.tensor([self.picture_size], dtype=torch.float32, device=self.device)
        ratio = size[:, :1] / size[:, 1:]
        return {"resolution": size.expand(count, -1), "aspect_ratio": ratio.expand(count, -1)}


def plain_call(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Arguments that make any PixArt draw at its own size and take prompts as they are; {} for others."""
    if not type(pipeline).__name__.startswith("PixArt"):
        return {}
    return {"use_resolution_binning": False, "clean_caption": False}
