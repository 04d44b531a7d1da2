"""NASA and NAG written from their equations, slowly: plain softmax attention, text streams kept apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.guidance.methods import Method, Nasa


def steer(plus: Tensor, minus: Tensor, method: Method) -> Tensor:
    """Z for every token of [B, S, D] on its own."""
    if isinstance(method, Nasa):
        return plus - method.scale * minus
    result = torch.empty_like(plus)
    for b in range(plus.shape[0]):
        for i in range(plus.shape[1]):
            z_plus, z_minus = plus[b, i], minus[b, i]
            z = z_plus + method.scale * (z_plus - z_minus)
            r = z.abs().sum() / z_plus.abs().sum()
            z_hat = z * min(float(r), method.tau) / r
            result[b, i] = method.alpha * z_hat + (1 - method.alpha) * z_plus
    return result


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, norms: Any = (None, None)
) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, head by head; q [B, S, D], k and v [B, L, D], bias [B, L]."""
    parts = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        a, b = norms[0](a) if norms[0] else a, norms[1](b) if norms[1] else b
        scores = a @ b.transpose(1, 2) / a.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias[:, None]
        parts.append(torch.softmax(scores, -1) @ c)
    return torch.cat(parts, -1)


class ReferenceCross:
    """A cross-attention layer's processor."""

    def __init__(self, negative: Tensor, mask: Tensor | None, method: Method) -> None:
        self.negative, self.method = negative, method
        self.bias = None if mask is None else (1 - mask.float()) * -10000.0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Any = None,
    ) -> Tensor:
        norms = [norm or (lambda x: x) for norm in (attn.norm_q, attn.norm_k)]  # SANA's, over all heads
        q = norms[0](attn.to_q(hidden_states))
        bias = None if attention_mask is None else attention_mask[:, 0]
        plus, minus = (
            softmax_attention(q, norms[1](attn.to_k(text)), attn.to_v(text), attn.heads, b)
            for text, b in ((encoder_hidden_states, bias), (self.negative, self.bias))
        )
        return attn.to_out[0](steer(plus, minus, self.method))


def cross_attention_network(
    network: Any, inputs: dict[str, Any], negative: Tensor, mask: Tensor | None, method: Method
) -> Tensor:
    """Output of a UNet, or a PixArt or SANA transformer."""
    count = len(inputs["encoder_hidden_states"])
    negative = negative.expand(count, -1, -1)
    mask = None if mask is None else mask.expand(count, -1)
    if getattr(network, "caption_projection", None) is not None:
        negative = network.caption_projection(negative)
        negative = getattr(network, "caption_norm", lambda x: x)(negative)
    former = network.attn_processors
    processors = {
        name: ReferenceCross(negative, mask, method) if "attn2" in name else processor
        for name, processor in former.items()
    }
    network.set_attn_processor(processors)
    try:
        return network(**inputs)[0]
    finally:
        network.set_attn_processor(former)


def sd3(network: Any, inputs: dict[str, Any], negative: Tensor, method: Method) -> Tensor:
    """Output of a Stable Diffusion 3 transformer with the two texts in streams of their own."""
    x = network.pos_embed(inputs["hidden_states"])
    temb = network.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
    texts = [network.context_embedder(inputs["encoder_hidden_states"]), network.context_embedder(negative)]
    for block in network.transformer_blocks:
        if block.use_dual_attention:
            h, gate, shift, scale, gate_mlp, h2, gate2 = block.norm1(x, emb=temb)
        else:
            h, gate, shift, scale, gate_mlp = block.norm1(x, emb=temb)
        attn, outs = block.attn, []
        for text in texts:
            last = block.context_pre_only
            c, *modulation = (
                (block.norm1_context(text, temb),) if last else block.norm1_context(text, emb=temb)
            )
            image = [_by_head(norm, layer(h), attn.heads) for norm, layer in
                     ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k), (None, attn.to_v))]  # fmt: skip
            words = [_by_head(norm, layer(c), attn.heads) for norm, layer in
                     ((attn.norm_added_q, attn.add_q_proj), (attn.norm_added_k, attn.add_k_proj),
                      (None, attn.add_v_proj))]  # fmt: skip
            q, k, v = (torch.cat(pair, 1) for pair in zip(words, image, strict=True))
            outs.append((softmax_attention(q, k, v, attn.heads), modulation))
        length = texts[0].shape[1], texts[1].shape[1]
        z = steer(outs[0][0][:, length[0] :], outs[1][0][:, length[1] :], method)
        x = x + gate[:, None] * attn.to_out[0](z)
        if block.use_dual_attention:
            a = block.attn2
            q, k, v = (_by_head(norm, layer(h2), a.heads) for norm, layer in
                       ((a.norm_q, a.to_q), (a.norm_k, a.to_k), (None, a.to_v)))  # fmt: skip
            x = x + gate2[:, None] * a.to_out[0](softmax_attention(q, k, v, a.heads))
        x = x + gate_mlp[:, None] * block.ff(block.norm2(x) * (1 + scale[:, None]) + shift[:, None])
        if block.context_pre_only:
            continue
        for i, (out, (c_gate, c_shift, c_scale, c_gate_mlp)) in enumerate(outs):
            text = texts[i] + c_gate[:, None] * attn.to_add_out(out[:, : length[i]])
            inner = block.norm2_context(text) * (1 + c_scale[:, None]) + c_shift[:, None]
            texts[i] = text + c_gate_mlp[:, None] * block.ff_context(inner)
    x = network.proj_out(network.norm_out(x, temb))
    b, side, p = len(x), int(x.shape[1] ** 0.5), network.config.patch_size
    x = x.reshape(b, side, side, p, p, network.out_channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, network.out_channels, side * p, side * p)


def flux(network: Any, inputs: dict[str, Any], negative: Tensor, method: Method) -> Tensor:
    """Output of a FLUX transformer with the two texts in streams of their own."""
    x = network.x_embedder(inputs["hidden_states"])
    temb = network.time_text_embed(inputs["timestep"] * 1000, inputs["pooled_projections"])
    texts = [network.context_embedder(inputs["encoder_hidden_states"]), network.context_embedder(negative)]
    image_ids = inputs["img_ids"]
    turns = []
    for text in texts:  # text tokens have position zero
        ids = torch.cat([torch.zeros(text.shape[1], 3), image_ids])
        turns.append(network.pos_embed(ids))
    for block in network.transformer_blocks:
        h, gate, shift, scale, gate_mlp = block.norm1(x, emb=temb)
        attn, outs = block.attn, []
        for text, turn in zip(texts, turns, strict=True):
            c, *modulation = block.norm1_context(text, emb=temb)
            pairs = ((attn.norm_added_q, attn.add_q_proj, attn.norm_q, attn.to_q),
                     (attn.norm_added_k, attn.add_k_proj, attn.norm_k, attn.to_k),
                     (None, attn.add_v_proj, None, attn.to_v))  # fmt: skip
            q, k, v = (
                torch.cat([_by_head(n1, l1(c), attn.heads), _by_head(n2, l2(h), attn.heads)], 1)
                for n1, l1, n2, l2 in pairs
            )
            q, k = (_rotate(y, turn, attn.heads) for y in (q, k))
            outs.append((softmax_attention(q, k, v, attn.heads), modulation))
        length = texts[0].shape[1], texts[1].shape[1]
        z = steer(outs[0][0][:, length[0] :], outs[1][0][:, length[1] :], method)
        x = x + gate[:, None] * attn.to_out[0](z)
        x = x + gate_mlp[:, None] * block.ff(block.norm2(x) * (1 + scale[:, None]) + shift[:, None])
        for i, (out, (c_gate, c_shift, c_scale, c_gate_mlp)) in enumerate(outs):
            text = texts[i] + c_gate[:, None] * attn.to_add_out(out[:, : length[i]])
            inner = block.norm2_context(text) * (1 + c_scale[:, None]) + c_shift[:, None]
            texts[i] = text + c_gate_mlp[:, None] * block.ff_context(inner)
    for block in network.single_transformer_blocks:
        attn, outs = block.attn, []
        for text, turn in zip(texts, turns, strict=True):
            tokens = torch.cat([text, x], 1)
            h, gate = block.norm(tokens, emb=temb)
            q, k = (_rotate(_by_head(n, l(h), attn.heads), turn, attn.heads)
                    for n, l in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k)))  # fmt: skip
            outs.append((softmax_attention(q, k, attn.to_v(h), attn.heads), tokens, h, gate))
        length = [text.shape[1] for text in texts]
        z = steer(outs[0][0][:, length[0] :], outs[1][0][:, length[1] :], method)
        for i, (out, tokens, h, gate) in enumerate(outs):
            out = torch.cat([out[:, : length[i]], z], 1)
            merged = torch.cat([out, block.act_mlp(block.proj_mlp(h))], 2)
            tokens = tokens + gate[:, None] * block.proj_out(merged)
            texts[i] = tokens[:, : length[i]]
        x = tokens[:, length[1] :]
    return network.proj_out(network.norm_out(x, temb))


def flux2(network: Any, inputs: dict[str, Any], negative: Tensor, method: Method) -> Tensor:
    """Output of a FLUX.2 transformer with the two texts in streams of their own, counted from zero each."""
    x = network.x_embedder(inputs["hidden_states"])
    temb = network.time_guidance_embed(inputs["timestep"] * 1000, None)
    modulations = [layer(temb)[:, None].chunk(6, -1) for layer in
                   (network.double_stream_modulation_img, network.double_stream_modulation_txt)]  # fmt: skip
    (shift, scale, gate, shift_mlp, scale_mlp, gate_mlp), c = modulations
    texts = [network.context_embedder(inputs["encoder_hidden_states"]), network.context_embedder(negative)]
    turns = []
    for text in texts:
        words = torch.zeros(text.shape[1], 4)
        words[:, 3] = torch.arange(text.shape[1])
        turns.append(network.pos_embed(torch.cat([words, inputs["img_ids"]])))
    length = [text.shape[1] for text in texts]
    for block in network.transformer_blocks:
        attn, outs = block.attn, []
        h = block.norm1(x) * (1 + scale) + shift
        for text, turn in zip(texts, turns, strict=True):
            inner = block.norm1_context(text) * (1 + c[1]) + c[0]
            pairs = ((attn.norm_added_q, attn.add_q_proj, attn.norm_q, attn.to_q),
                     (attn.norm_added_k, attn.add_k_proj, attn.norm_k, attn.to_k),
                     (None, attn.add_v_proj, None, attn.to_v))  # fmt: skip
            q, k, v = (
                torch.cat([_by_head(n1, l1(inner), attn.heads), _by_head(n2, l2(h), attn.heads)], 1)
                for n1, l1, n2, l2 in pairs
            )
            q, k = (_rotate(y, turn, attn.heads) for y in (q, k))
            outs.append(softmax_attention(q, k, v, attn.heads))
        z = steer(outs[0][:, length[0] :], outs[1][:, length[1] :], method)
        x = x + gate * attn.to_out[0](z)
        x = x + gate_mlp * block.ff(block.norm2(x) * (1 + scale_mlp) + shift_mlp)
        for i, out in enumerate(outs):
            text = texts[i] + c[2] * attn.to_add_out(out[:, : length[i]])
            texts[i] = text + c[5] * block.ff_context(block.norm2_context(text) * (1 + c[4]) + c[3])
    shift, scale, gate = network.single_stream_modulation(temb)[:, None].chunk(3, -1)
    for block in network.single_transformer_blocks:
        attn, outs = block.attn, []
        for text, turn in zip(texts, turns, strict=True):
            tokens = torch.cat([text, x], 1)
            parts = attn.to_qkv_mlp_proj(block.norm(tokens) * (1 + scale) + shift)
            q, k, v, mlp = parts.split([*[attn.inner_dim] * 3, 2 * attn.mlp_hidden_dim], -1)
            q, k = (_rotate(_by_head(n, y, attn.heads), turn, attn.heads)
                    for n, y in ((attn.norm_q, q), (attn.norm_k, k)))  # fmt: skip
            outs.append((softmax_attention(q, k, v, attn.heads), tokens, mlp))
        z = steer(outs[0][0][:, length[0] :], outs[1][0][:, length[1] :], method)
        for i, (out, tokens, mlp) in enumerate(outs):
            first, second = mlp.chunk(2, -1)
            inner = torch.cat([torch.cat([out[:, : length[i]], z], 1), F.silu(first) * second], -1)
            tokens = tokens + gate * attn.to_out(inner)
            texts[i] = tokens[:, : length[i]]
        x = tokens[:, length[1] :]
    return network.proj_out(network.norm_out(x, temb))


def qwen(network: Any, inputs: dict[str, Any], negative: Tensor, mask: Tensor, method: Method) -> Tensor:
    """Output of a Qwen-Image transformer with the two texts, and their masks, in streams of their own."""
    x = network.img_in(inputs["hidden_states"])
    temb = network.time_text_embed(inputs["timestep"], x)
    texts = [network.txt_in(network.txt_norm(y)) for y in (inputs["encoder_hidden_states"], negative)]
    masks = [inputs["encoder_hidden_states_mask"], mask]
    turns = [network.pos_embed(inputs["img_shapes"], max_txt_seq_len=text.shape[1], device=x.device)
             for text in texts]  # fmt: skip
    biases = [torch.where(torch.cat([m, m.new_ones(x.shape[:2])], 1), 0.0, -1e9) for m in masks]
    for block in network.transformer_blocks:
        attn, outs = block.attn, []
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.img_mod(temb)[:, None].chunk(6, -1)
        c = block.txt_mod(temb)[:, None].chunk(6, -1)
        h = block.img_norm1(x) * (1 + scale) + shift
        for text, (of_image, of_text), bias in zip(texts, turns, biases, strict=True):
            inner = block.txt_norm1(text) * (1 + c[1]) + c[0]
            q, k = (
                torch.cat([_turned(_by_head(n1, l1(inner), attn.heads), of_text, attn.heads),
                           _turned(_by_head(n2, l2(h), attn.heads), of_image, attn.heads)], 1)
                for n1, l1, n2, l2 in ((attn.norm_added_q, attn.add_q_proj, attn.norm_q, attn.to_q),
                                       (attn.norm_added_k, attn.add_k_proj, attn.norm_k, attn.to_k))
            )  # fmt: skip
            v = torch.cat([attn.add_v_proj(inner), attn.to_v(h)], 1)
            outs.append(softmax_attention(q, k, v, attn.heads, bias))
        length = [text.shape[1] for text in texts]
        z = steer(outs[0][:, length[0] :], outs[1][:, length[1] :], method)
        x = x + gate * attn.to_out[0](z)
        x = x + gate_mlp * block.img_mlp(block.img_norm2(x) * (1 + scale_mlp) + shift_mlp)
        for i, out in enumerate(outs):
            text = texts[i] + c[2] * attn.to_add_out(out[:, : length[i]])
            texts[i] = text + c[5] * block.txt_mlp(block.txt_norm2(text) * (1 + c[4]) + c[3])
    return network.proj_out(network.norm_out(x, temb))


def z_image(network: Any, inputs: Any, negatives: list[Tensor], method: Method) -> Tensor:
    """Output of a Z-Image transformer, picture by picture, with the two texts in streams of their own."""
    outputs = []
    for picture, t, *texts in zip(*inputs, negatives, strict=True):
        time, streams, x = network.t_embedder(t[None] * network.t_scale), [], None
        for text in texts:
            tokens, words, size, *places, off, off_words = (
                part[0] for part in network.patchify_and_embed([picture], [text], 2, 1)
            )
            turns = [network.rope_embedder(ids)[None, : len(y)] for ids, y in zip(places, (tokens, words))]
            y = torch.where(off[:, None], network.x_pad_token, network.all_x_embedder["2-1"](tokens))[None]
            c = torch.where(off_words[:, None], network.cap_pad_token, network.cap_embedder(words))[None]
            for layer in network.noise_refiner:
                y = layer(y, None, turns[0], time)
            for layer in network.context_refiner:
                c = layer(c, None, turns[1])
            x = y if x is None else x  # the prompt's: behind how many words it stands matters to padding
            streams.append((c, torch.cat(turns, 1)[0]))
        for layer in network.layers:
            scale, gate, scale_mlp, gate_mlp = layer.adaLN_modulation(time)[:, None].chunk(4, -1)
            attn, outs, length = layer.attention, [], x.shape[1]
            for c, turn in streams:
                inner = layer.attention_norm1(torch.cat([x, c], 1)) * (1 + scale)
                q, k = (_turned(_by_head(norm, part(inner), attn.heads), turn, attn.heads)
                        for norm, part in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k)))  # fmt: skip
                outs.append(softmax_attention(q, k, attn.to_v(inner), attn.heads))
            z = steer(outs[0][:, :length], outs[1][:, :length], method)
            for i, (c, turn) in enumerate(streams):
                y = attn.to_out[0](torch.cat([z, outs[i][:, length:]], 1))
                tokens = torch.cat([x, c], 1) + gate.tanh() * layer.attention_norm2(y)
                y = layer.feed_forward(layer.ffn_norm1(tokens) * (1 + scale_mlp))
                tokens = tokens + gate_mlp.tanh() * layer.ffn_norm2(y)
                streams[i] = tokens[:, length:], turn
            x = tokens[:, :length]
        y = network.all_final_layer["2-1"](x, c=time)
        outputs += network.unpatchify([y[0]], [size], 2, 1)
    return torch.stack(outputs)


def _turned(x: Tensor, turns: Tensor, heads: int) -> Tensor:
    """Rotary positions as complex factors [L, d / 2] of each head's pairs of channels."""
    real, imaginary = turns.real, turns.imag
    parts = []
    for part in x.chunk(heads, -1):
        even, odd = part[..., 0::2], part[..., 1::2]
        both = (even * real - odd * imaginary, odd * real + even * imaginary)
        parts.append(torch.stack(both, -1).flatten(2))
    return torch.cat(parts, -1)


def _by_head(norm: Any, x: Tensor, heads: int) -> Tensor:
    """Each head's part of [B, L, D] normed."""
    return x if norm is None else torch.cat([norm(part) for part in x.chunk(heads, -1)], -1)


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Rotary positions: each pair of channels of each head turned by its angle."""
    cos, sin = turn
    parts = []
    for part in x.chunk(heads, -1):
        even, odd = part[..., 0::2], part[..., 1::2]
        c, s = cos[:, 0::2], sin[:, 0::2]
        parts.append(torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(2))
    return torch.cat(parts, -1)
