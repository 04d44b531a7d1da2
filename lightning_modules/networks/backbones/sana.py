"""SANA (Xie et al., arXiv 2410.10629): a transformer with linear attention on rectified flow.

Its latents are those of a deep-compression autoencoder; text is encoded by Gemma 2 behind an instruction.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizer

from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.calling import call_denoiser
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder

MAX_TOKENS = 300  # the stock pipeline's default


class Sana(Backbone):
    """The network predicts ε − x0, attends to text with a mask, and is told 1000 σ times its own scale."""

    pipeline_class = SanaPipeline
    denoiser = ("transformer", SanaTransformer2DModel)
    vae = AutoencoderDC
    text_encoders = {"text_encoder": Gemma2Model}
    tokenizers = {"tokenizer": GemmaTokenizer}
    names_size = True

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        return GemmaPromptEncoder(parts.tokenizers, parts.text_encoders, MAX_TOKENS)

    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        return parts.text_encoders[0].config.hidden_size, parts.denoiser.config.caption_channels

    def call_options(self, parts: TextToImageParts) -> dict[str, Any]:
        return super().call_options(parts) | {"use_resolution_binning": False}


class GemmaPromptEncoder(PromptEncoder):
    """Hidden states [B, 300, D] and mask [B, 300]: the first token and the last 299.

    A prompt stands behind the stock pipeline's instruction to elaborate it; the empty one stands by itself,
    as the pipeline has it for no prompt.
    """

    def __init__(self, tokenizers: list[Any], text_encoders: list[Any], max_length: int) -> None:
        super().__init__(tokenizers, text_encoders, max_length)
        tokenizers[0].padding_side = "right"
        default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        self.instruction = "\n".join(default)

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        texts = [prompt.lower().strip() for prompt in prompts]
        kept = [0, *range(1 - self.max_length, 0)]
        with_instruction = len(self.tokenizers[0].encode(self.instruction)) + self.max_length - 2
        lengths = {"": self.max_length, self.instruction: with_instruction}
        rows: list[tuple[Tensor, Tensor]] = []
        for text in texts:
            before = self.instruction if text else ""
            ids, mask = self.tokens([before + text], 0, lengths[before])
            hidden = self.text_encoders[0](ids, attention_mask=mask)[0]
            rows.append((hidden[:, kept], mask[:, kept]))
        hidden, masks = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": masks}


@call_denoiser.register
def _(network: SanaTransformer2DModel, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    time = t * network.config.timestep_scale
    output: Tensor = network(x_t, timestep=time, **tensors, return_dict=False)[0]
    return output[:, : x_t.shape[1]]  # channels beyond are a learned variance
