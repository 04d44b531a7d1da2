"""Z-Image (Tongyi-MAI, arXiv 2511.22699): one stream of text and picture tokens on rectified flow.

Text is Qwen 3's, of any length: the network takes lists of tensors, one per picture.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Model

from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.calling import call_denoiser
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder, chat_texts

MAX_TOKENS = 512  # the stock pipeline's default


class ZImage(Backbone):
    """The network is told 1 − σ and predicts x0 − ε."""

    pipeline_class = ZImagePipeline
    denoiser = ("transformer", ZImageTransformer2DModel)
    text_encoders = {"text_encoder": Qwen3Model}
    tokenizers = {"tokenizer": Qwen2Tokenizer}
    conditions = {"siglip_feat_dim": (None,)}
    names_size = True

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        return Qwen3PromptEncoder(parts.tokenizers, parts.text_encoders, MAX_TOKENS)

    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        return parts.text_encoders[0].config.hidden_size, parts.denoiser.config.cap_feat_dim

    def patch(self, denoiser: Any) -> int:
        return int(denoiser.config.all_patch_size[0])

    def guidance_options(self, kappa: float) -> dict[str, Any]:
        return {"guidance_scale": kappa - 1}  # ε_y + γ (ε_y − ε_∅)


class Qwen3PromptEncoder(PromptEncoder):
    """Hidden states before the last layer [B, 512, D], zeros behind a prompt's end, and mask [B, 512]."""

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        ids, mask = self.tokens(chat_texts(self.tokenizers[0], prompts, thinking=True))
        hidden = self.text_encoders[0](ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return {"encoder_hidden_states": hidden * mask[..., None], "encoder_attention_mask": mask}


@call_denoiser.register
def _(network: ZImageTransformer2DModel, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    texts = zip(tensors["encoder_hidden_states"], tensors["encoder_attention_mask"].bool(), strict=True)
    # without values there are shapes alone to be found
    captions = [hidden if mask.is_meta else hidden[mask] for hidden, mask in texts]
    pictures = list(x_t.unsqueeze(2).unbind())  # [C, 1, h, w] each
    output: list[Tensor] = network(pictures, (1000 - t) / 1000, captions, return_dict=False)[0]
    if x_t.is_meta:  # it keeps the turns of its positions where they were used last: without values now
        network.rope_embedder.freqs_cis = None
    return -torch.stack(output).squeeze(2)
