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
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from lightning_modules.guidance.processors import attend, joint_projections
from lightning_modules.networks.backbones.base import Backbone, TextToImageParts
from lightning_modules.networks.backbones.calling import call_denoiser
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder

MAX_TOKENS = 256  # of T5: the stock pipeline's default; as many zeros stand for an absent one


class StableDiffusion3(Backbone):
    """Text and picture in one attention; the network predicts ε − x0 and is told 1000 σ.

    Without T5 the prompts end in 256 zeros, as in the stock pipeline. Where they are exactly that, our calls
    of the network compute one of them and count it 256 times (`CountedLastToken`): the same function up to
    rounding, with an eighth of the tokens for the smallest pictures. Not so under NASA and NAG, nor beside
    an adapter with dropout, to which equal tokens aren't equal. Layers of the text give the zeros once.
    """

    pipeline_class = StableDiffusion3Pipeline
    denoiser = ("transformer", SD3Transformer2DModel)
    text_encoders = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5Tokenizer}
    optional = ("text_encoder_3", "tokenizer_3")

    def prepare(self, parts: TextToImageParts) -> None:
        if "text_encoder_3" in parts.left_out:
            parts.denoiser.set_attn_processor(CountedLastToken())

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
    named: dict[str, Any] = dict(tensors)
    if _zeros_count_as_one(network, text := named["encoder_hidden_states"]):
        named["encoder_hidden_states"] = text[:, : 1 - MAX_TOKENS]
        named["joint_attention_kwargs"] = {"last_count": MAX_TOKENS}
    output: Tensor = network(x_t, timestep=t, **named, return_dict=False)[0]
    return output


def _zeros_count_as_one(network: Any, text: Tensor) -> bool:
    """Whether text [B, L, D] ends in the zeros of an absent T5 and the network treats them alike."""
    counting = isinstance(network.transformer_blocks[0].attn.processor, CountedLastToken)
    if not counting or text.is_meta or text.shape[1] <= MAX_TOKENS:
        return False
    adapters = getattr(network, "peft_config", {}).values()
    return not any(one.lora_dropout for one in adapters) and not bool(text[:, -MAX_TOKENS:].any())


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


class CountedLastToken(JointAttnProcessor2_0):
    """Joint attention to text whose last token stands for `last_count` equal ones; of 1, diffusers' own.

    Text has no positions here, so that equal tokens stay equal through all blocks and one need be computed.
    As a key it weighs as many by a score that is higher by log(last_count), or stands there so often.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        *args: Any,
        last_count: int = 1,
        **kwargs: Any,
    ) -> Any:
        """Image tokens [B, S, D], text tokens [B, L, D], each after its output projection."""
        if last_count == 1 or encoder_hidden_states is None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs
            )
        image, words = joint_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (torch.cat([x, y], 2) for x, y in zip(image, words, strict=True))
        # a bias takes the fastest kernels of GPUs away, and half precision rounds it
        by_bias = query.device.type == "cpu" and query.dtype.itemsize >= 4
        tokens = attend_counted(query, key, value, last_count, by_bias)
        image_tokens, text = tokens.split_with_sizes([hidden_states.shape[1], words[0].shape[2]], 1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image_tokens)), text


def attend_counted(query: Tensor, key: Tensor, value: Tensor, count: int, by_bias: bool) -> Tensor:
    """Attention of [B, H, S, d] to [B, H, L, d] whose last key stands for so many: [B, S, H d]."""
    if not by_bias:
        more = [x[:, :, -1:].expand(-1, -1, count - 1, -1) for x in (key, value)]
        return attend(query, *(torch.cat(pair, 2) for pair in zip((key, value), more, strict=True)))
    bias = query.new_zeros(1, 1, 1, key.shape[2])
    bias[..., -1] = math.log(count)
    return attend(query, key, value, bias)
