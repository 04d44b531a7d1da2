"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): a transformer with joint attention on
rectified flow; two CLIP text encoders and T5, which may be left out."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.calling import call_denoiser
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder

MAX_TOKENS = 256  # of T5: the stock pipeline's default


class StableDiffusion3(Backbone):
    """Text and picture in one attention; the network predicts ε − x0 and is told 1000 σ."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser = ("transformer", SD3Transformer2DModel)
    text_encoders = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5Tokenizer}
    optional = ("text_encoder_3", "tokenizer_3")

    def prompt_encoder(self, parts: TextToImageParts) -> PromptEncoder:
        width = parts.denoiser.config.joint_attention_dim
        return ClipT5PromptEncoder(parts.tokenizers, parts.text_encoders, width)

    def text_width(self, parts: TextToImageParts) -> tuple[int, int | None]:
        clips, others = parts.text_encoders[:2], parts.text_encoders[2:]
        expected = parts.denoiser.config.joint_attention_dim
        widths = [other.config.d_model for other in others] or [expected]
        return max(sum(clip.config.hidden_size for clip in clips), *widths), expected


@call_denoiser.register
def _(network: SD3Transformer2DModel, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    output: Tensor = network(x_t, timestep=t, **tensors, return_dict=False)[0]
    return output


class ClipT5PromptEncoder(PromptEncoder):
    """Text of both CLIPs, then T5's (or zeros in its place) [B, L + 256, D], and pooled text [B, P]."""

    def __init__(self, tokenizers: list[Any], text_encoders: list[Any], width: int) -> None:
        super().__init__(tokenizers, text_encoders, int(tokenizers[0].model_max_length))
        self.width = width

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        ids = [self.tokens(prompts, place)[0] for place in range(2)]
        hidden, pooled = clip_texts(self.text_encoders[:2], ids, self.width)
        if len(self.text_encoders) > 2:
            t5 = self.text_encoders[2](self.tokens(prompts, 2, MAX_TOKENS)[0])[0]
        else:
            t5 = hidden.new_zeros(len(prompts), MAX_TOKENS, self.width)
        return {"encoder_hidden_states": torch.cat([hidden, t5.to(hidden)], 1), "pooled_projections": pooled}


def clip_texts(encoders: Iterable[Any], ids: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Hidden states before the last layer [B, L, width] and pooled text [B, P] of both CLIPs side by side.

    Zeros fill the hidden states up to T5's width.
    """
    outputs = [encoder(x, output_hidden_states=True) for encoder, x in zip(encoders, ids, strict=True)]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
    return F.pad(hidden, (0, width - hidden.shape[-1])), pooled


class RepeatedLastToken(JointAttnProcessor2_0):
    """Joint attention to text whose last token stands for `count` equal ones.

    Text has no positions here: equal tokens stay equal, and weigh as one whose score is higher by log(count).
    So the 256 zeros in the place of T5 cost one token.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.mode = _LastKeyMode(math.log(count))

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **more: Any
    ) -> Any:
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, **more)
        with self.mode:
            return super().__call__(attn, hidden_states, encoder_hidden_states, **more)


class _LastKeyMode(TorchFunctionMode):
    """Attention inside adds `bias` to the scores of the last key."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            mask = args[0].new_zeros(1, 1, 1, args[1].shape[2])
            mask[..., -1] = self.bias
            kwargs = {**kwargs, "attn_mask": mask}
        return func(*args, **(kwargs or {}))
