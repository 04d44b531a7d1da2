"""Attention processors that attend to the prompt as diffusers does and to a negative prompt besides.

Cross-attention: the negative text has keys and values of its own. Joint attention: it is carried through the
blocks behind the prompt's tokens, where everything but attention treats tokens one by one.

Shapes: B images, S image tokens, L text tokens (L⁺, L⁻), D channels, H heads, d channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from lightning_modules.guidance.methods import Method


class NegativeText:
    """The negative prompts at hand, shared by the processors of one network.

    Args:
        method: how they act.
        project: what the network does to text before its attention layers (None: nothing).

    Attributes:
        lengths: L⁺ and L⁻ of a network with joint attention.
        size: tokens of a picture, in Z-Image.
        mask: as given to `set`.
        cache: keys and values by layer, kept while gradients are off, until the prompts change.
        calls: of the network since the prompts changed, where they are counted.
        active: whether the processors do anything but what the stock ones do.
    """

    def __init__(self, method: Method, project: Callable[[Tensor], Tensor] | None = None) -> None:
        self.method = method
        self.project = project
        self.lengths: tuple[int, int] | None = None
        self.size = 0
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.present: Tensor | None = None
        self.mask: Tensor | None = None
        self.calls, self.active = 0, True
        self._raw: Tensor | None = None
        self._projected: Tensor | None = None
        self._bias: Tensor | None = None

    def set(self, embeddings: Tensor, mask: Tensor | None = None, present: Tensor | None = None) -> None:
        """Take encoded negative prompts.

        Args:
            embeddings: [N, L⁻, D], N images or 1 for all.
            mask: [N, L⁻], 1 at tokens to be attended to; None for all of them.
            present: boolean [B], false for images that have no negative prompt; None if all have one.
        """
        self._raw, self._projected, self.present, self.mask = embeddings, None, present, mask
        self.calls, self.active = 0, True
        # the bias that diffusers makes of such a mask
        self._bias = None if mask is None else (1 - mask.to(embeddings.dtype))[:, None, None] * -10000.0
        self.cache.clear()

    def hidden_states(self, like: Tensor) -> Tensor:
        """The text [N, L⁻, D] as attention layers get it, in type and place as `like`."""
        if self._raw is None:
            raise UserError(
                "No prompt was encoded inside negative_prompting: call the pipeline in it, and for a network "
                "alone use negative_attention."
            )
        if self.project is None:
            return self._raw.to(like)
        if self._projected is None:
            self._projected = self.project(self._raw)
        return self._projected.to(like)

    def bias(self, like: Tensor) -> Tensor | None:
        """What is added to attention scores, [N, 1, 1, L⁻], or None."""
        return None if self._bias is None else self._bias.to(like)

    def steer(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The method's Z [B, S, D]; Z⁺ itself for images without a negative prompt."""
        steered = self.method(positive, negative)
        if self.present is None:
            return steered
        return torch.where(self.present.to(steered.device)[:, None, None], steered, positive)


class NegativeProcessor:
    """What the processors have in common.

    Args:
        text: the negative prompts.
        stock: the processor it stands in for.
        index: number of the layer.
    """

    def __init__(self, text: NegativeText, stock: Any, index: int) -> None:
        self.text, self.stock, self.index = text, stock, index


class NegativeCrossAttention(NegativeProcessor):
    """Stands in for diffusers' `AttnProcessor2_0` (or SANA's) in a cross-attention layer."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of image tokens [B, S, D] to text [B, L⁺, D'] and negative text: [B, S, D]."""
        if encoder_hidden_states is None or not self.text.active:  # a layer used for self-attention
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        residual = hidden_states
        batch_size, length, _ = encoder_hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch_size)
            attention_mask = attention_mask.view(batch_size, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = self._projected(attn, attn.to_q(hidden_states), attn.norm_q)
        positive = attend(query, *self._keys_values(attn, encoder_hidden_states), attention_mask)
        key, value = self._negative_keys_values(attn, encoder_hidden_states)
        if len(key) not in (1, batch_size):
            raise UserError(f"{len(key)} negative prompts do not fit a batch of {batch_size} images.")
        key, value = (x.expand(batch_size, -1, -1, -1) for x in (key, value))
        negative = attend(query, key, value, self.text.bias(query))
        hidden_states = self.text.steer(positive, negative)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _negative_keys_values(self, attn: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, H, L⁻, d] of the negative text; with gradients on, computed every time."""
        if torch.is_grad_enabled():
            return self._keys_values(attn, self.text.hidden_states(like))
        if self.index not in self.text.cache:
            self.text.cache[self.index] = self._keys_values(attn, self.text.hidden_states(like))
        return self.text.cache[self.index]

    def _projected(self, attn: Any, x: Tensor, norm: Any) -> Tensor:
        """Heads [B, H, L, d] of a projection [B, L, H d], normed in each head, or (SANA) over all of them."""
        if isinstance(self.stock, SanaAttnProcessor2_0):
            return _split_heads(_normed(norm, x), attn.heads)
        return _normed(norm, _split_heads(x, attn.heads))

    def _keys_values(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, H, L, d] of text [N, L, D] by the layer's projections."""
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        key = self._projected(attn, attn.to_k(text), attn.norm_k)
        return key, _split_heads(attn.to_v(text), attn.heads)


class NegativeJointSD3(NegativeProcessor):
    """Stands in for diffusers' `JointAttnProcessor2_0` in Stable Diffusion 3; the text is [B, L⁺ + L⁻, D]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, S, D], text tokens [B, L⁺ + L⁻, D], each after its output projection."""
        if not self.text.active:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        assert encoder_hidden_states is not None and self.text.lengths is not None
        size, split = hidden_states.shape[1], self.text.lengths[0]
        image, words = joint_projections(attn, hidden_states, encoder_hidden_states)
        positive = attend(*(torch.cat([x, y[:, :, :split]], 2) for x, y in zip(image, words, strict=True)))
        negative = attend(*(torch.cat([x, y[:, :, split:]], 2) for x, y in zip(image, words, strict=True)))
        text = torch.cat([positive[:, size:], negative[:, size:]], 1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        steered = self.text.steer(positive[:, :size], negative[:, :size])
        return attn.to_out[1](attn.to_out[0](steered)), text


class NegativeJointFlux(NegativeProcessor):
    """Stands in for diffusers' `FluxAttnProcessor`, in blocks with two streams and with one.

    And for FLUX.2's `Flux2AttnProcessor`, in blocks with two streams.

    Tokens come as [B, L⁺ + L⁻ + S, D], in one tensor or two; each carries its rotary position.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image tokens and text tokens, each after its output projection; all in one if they came so."""
        if not self.text.active:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise UserError("Negative prompts for FLUX do not work with an attention mask. Leave it out.")
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            words = [layer(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in layers]
            words[:2] = attn.norm_added_q(words[0]), attn.norm_added_k(words[1])
            query, key, value = (
                torch.cat([x, y], 1) for x, y in zip(words, (query, key, value), strict=True)
            )
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        tokens = _attend_apart(self.text, self.stock, query, key, value)
        if encoder_hidden_states is None:
            return tokens
        text, image = tokens.split_with_sizes([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())


class NegativeParallelFlux2(NegativeProcessor):
    """Stands in for diffusers' `Flux2ParallelSelfAttnProcessor`: attention and MLP in common layers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """All tokens [B, L⁺ + L⁻ + S, D]."""
        if not self.text.active:
            unsteered: Tensor = self.stock(attn, hidden_states, attention_mask, image_rotary_emb)
            return unsteered
        parts = attn.to_qkv_mlp_proj(hidden_states)
        width = attn.mlp_hidden_dim * attn.mlp_mult_factor
        projected, mlp = parts.split_with_sizes([parts.shape[-1] - width, width], -1)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected.chunk(3, -1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        tokens = _attend_apart(self.text, self.stock, query, key, value)
        output: Tensor = attn.to_out(torch.cat([tokens, attn.mlp_act_fn(mlp)], -1))
        return output


class NegativeJointQwen(NegativeProcessor):
    """Stands in for diffusers' `QwenDoubleStreamAttnProcessor2_0`; text [B, L⁺ + L⁻, D], like its mask.

    The negative text has the positions of the prompt's.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, S, D], text tokens [B, L⁺ + L⁻, D], each after its output projection."""
        assert encoder_hidden_states is not None and self.text.lengths is not None
        if not self.text.active:
            unsteered: tuple[Tensor, Tensor] = self.stock(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask,
                image_rotary_emb,
            )  # fmt: skip
            return unsteered
        lengths, (turns, turns_of_text) = self.text.lengths, image_rotary_emb
        image = self._projected(attn, hidden_states, turns, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        masks: Sequence[Tensor | None] = (None, None)
        if encoder_hidden_states_mask is not None:
            everywhere = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2])
            masks = [
                torch.cat([mask, everywhere], 1)[:, None, None]
                for mask in encoder_hidden_states_mask.split_with_sizes(lengths, 1)
            ]
        found = []
        for words, mask in zip(encoder_hidden_states.split_with_sizes(lengths, 1), masks, strict=True):
            tokens = self._projected(
                attn, words, turns_of_text[: words.shape[1]], ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
            )  # fmt: skip
            both = (torch.cat([x, y], 1) for x, y in zip(tokens, image, strict=True))
            out = dispatch_attention_fn(*both, attn_mask=mask, backend=self.stock._attention_backend)
            found.append(out.flatten(2, 3).to(hidden_states.dtype).split_with_sizes(
                [words.shape[1], hidden_states.shape[1]], 1
            ))  # fmt: skip
        (plus, positive), (minus, negative) = found
        steered = self.text.steer(positive, negative)
        return attn.to_out[1](attn.to_out[0](steered)), attn.to_add_out(torch.cat([plus, minus], 1))

    @staticmethod
    def _projected(
        attn: Any, x: Tensor, turns: Tensor, layers: tuple[str, str, str], norms: tuple[str, str]
    ) -> list[Tensor]:
        """Queries and keys, turned by their positions, and values of one stream, [B, L, H, d]."""
        query, key, value = (getattr(attn, name)(x).unflatten(-1, (attn.heads, -1)) for name in layers)
        query, key = _normed(getattr(attn, norms[0]), query), _normed(getattr(attn, norms[1]), key)
        return [*(apply_rotary_emb_qwen(y, turns, use_real=False) for y in (query, key)), value]


class NegativeSingleZImage(NegativeProcessor):
    """Stands in for diffusers' `ZSingleStreamAttnProcessor` where picture and text are one stream.

    Rows are the pictures with their prompts, then the same with the negative text, which has the positions of
    a prompt: [2 B, S + L, D]. Steered tokens of a picture go into both.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
    ) -> Tensor:
        """All tokens [2 B, S + L, D] after the output projection."""
        if not self.text.active:
            unsteered: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis
            )
            return unsteered
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1))
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            _turned(_normed(norm, x), freqs_cis) for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
        )
        mask = None if attention_mask is None else attention_mask[:, None, None]
        tokens = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self.stock._attention_backend
        )
        tokens = tokens.flatten(2, 3).to(query.dtype)
        steered = self.text.steer(*tokens[:, : self.text.size].chunk(2))
        tokens = torch.cat([torch.cat([steered, steered]), tokens[:, self.text.size :]], 1)
        output: Tensor = attn.to_out[1](attn.to_out[0](tokens))
        return output


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """[B, L, H, d] with each pair of channels turned by complex factors [B, L, d / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, :, None]).flatten(3).to(x.dtype)


def _attend_apart(text: NegativeText, stock: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, L⁺ + L⁻ + S, H, d] each -> [B, L⁺ + L⁻ + S, H d], image tokens steered."""
    assert text.lengths is not None
    (plus, minus), parts = text.lengths, (query, key, value)
    backend = stock._attention_backend
    without = [torch.cat([x[:, :plus], x[:, plus + minus :]], 1) for x in parts]
    positive = dispatch_attention_fn(*without, backend=backend).flatten(2, 3).to(query.dtype)
    negative = dispatch_attention_fn(*(x[:, plus:] for x in parts), backend=backend)
    negative = negative.flatten(2, 3).to(query.dtype)
    steered = text.steer(positive[:, plus:], negative[:, minus:])
    return torch.cat([positive[:, :plus], negative[:, :minus], steered], 1)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H d] -> [B, H, L, d]."""
    return x.view(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def joint_projections(
    attn: Any, image: Tensor, text: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Queries, keys and values [B, H, L, d] of both streams of joint attention."""
    of_text = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
    own = _projections(attn, image, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
    return own, _projections(attn, text, *of_text)


def _projections(
    attn: Any, x: Tensor, layers: tuple[str, str, str], norms: tuple[str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one stream."""
    query, key, value = (_split_heads(getattr(attn, name)(x), attn.heads) for name in layers)
    return _normed(getattr(attn, norms[0]), query), _normed(getattr(attn, norms[1]), key), value


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of [B, H, S, d] to [B, H, L, d], heads put side by side: [B, S, H d]."""
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return out.transpose(1, 2).flatten(2).to(query.dtype)
