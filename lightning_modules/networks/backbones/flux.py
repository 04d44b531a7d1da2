"""FLUX.1 (Black Forest Labs): joint attention on rectified flow, text by T5 and CLIP's pooled text.

Guidance is distilled into FLUX.1-dev, which takes its scale as an input.
"""

from collections.abc import Mapping

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.calling import GUIDANCE, call_denoiser
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder

MAX_TOKENS = 512  # of T5: the stock pipeline's default


class Flux(Backbone):
    """Latents are packed, 2 x 2 places to a token; the network predicts ε − x0 and is told σ."""

    pipeline_class = FluxPipeline
    denoiser = ("transformer", FluxTransformer2DModel)
    text_encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5Tokenizer}
    packing = 2
    names_size = True

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        return T5ClipPromptEncoder(
            parts.tokenizers, parts.text_encoders, int(parts.tokenizers[0].model_max_length)
        )

    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        return parts.text_encoders[1].config.d_model, parts.denoiser.config.joint_attention_dim


class T5ClipPromptEncoder(PromptEncoder):
    """Hidden states of T5 [B, 512, D], padding included, and pooled text of CLIP [B, P]."""

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        clip, t5 = self.text_encoders
        pooled = clip(self.tokens(prompts)[0]).pooler_output
        hidden = t5(self.tokens(prompts, 1, MAX_TOKENS)[0])[0]
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


@call_denoiser.register
def _(network: FluxTransformer2DModel, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    named = dict(tensors)
    _, _, height, width = x_t.shape
    guidance = named.pop(GUIDANCE, None)
    if network.config.guidance_embeds and guidance is None:
        guidance = torch.ones_like(t)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(height // 2), torch.arange(width // 2))
    tokens = network(
        hidden_states=pack(x_t),
        timestep=t / 1000,
        guidance=guidance,
        txt_ids=x_t.new_zeros(named["encoder_hidden_states"].shape[1], 3),
        img_ids=places.to(x_t),
        **named,
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


def pack(x: Tensor) -> Tensor:
    """Latents [B, C, h, w] as tokens [B, h w / 4, 4 C], a place of 2 x 2 each."""
    blocks = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, h/2, 2, w/2, 2]
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: latents [B, C, height, width]."""
    blocks = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
