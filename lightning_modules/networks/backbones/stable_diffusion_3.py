"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): a transformer with joint attention on rectified
flow; two CLIP text encoders and T5, which may be left out."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MAX_TOKENS = 256  # of T5: the stock pipeline's default


def clip_texts(encoders: Sequence[Any], ids: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
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

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Any = None, *args, **kw):
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, None, *args, **kw)
        with self.mode:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kw)


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
