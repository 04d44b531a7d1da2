"""Counting the memory of a computation on PyTorch's meta device, where tensors have shapes and no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

BLOCK = 512  # CUDA's allocator rounds up to so many bytes
LOW, HIGH = ("linear", "conv2d"), ("group_norm", "layer_norm")


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that are alive among those made inside; views add nothing.

    Attributes:
        live: bytes now.
        history: bytes after each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.history: list[int] = []
        self._known: set[int] = set()  # addresses of storages

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor.untyped_storage(), made_inside=False)  # weights, say
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor.untyped_storage(), made_inside=True)
        self.history.append(self.live)
        return result

    def _note(self, storage: torch.UntypedStorage, made_inside: bool) -> None:
        address = storage._cdata
        if address not in self._known:
            size = -(-storage.nbytes() // BLOCK) * BLOCK if made_inside else 0
            self._known.add(address)
            self.live += size
            weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.live -= size


class Autocast:
    """A context with the casts of bf16 autocast, which is not to be had for the meta device.

    Weights' casts are not cached, as under Lightning. The functions of `torch.nn.functional` are exchanged: a
    mode of PyTorch would be off in backward passes, where checkpoints run parts of the forward pass again.

    Args:
        enabled: false leaves all types as they are.
        float32_norms: norms in float32, as on a GPU; autocast of the CPU leaves them alone.
        fused_attention: the memory-efficient kernel; false: plain matrix products, as here on the CPU.
    """

    def __init__(
        self, enabled: bool = True, float32_norms: bool = True, fused_attention: bool = True
    ) -> None:
        self.enabled, self.float32_norms, self.fused_attention = enabled, float32_norms, fused_attention
        self._exchanged = ExitStack()

    def __enter__(self) -> Autocast:
        functions: dict[str, Callable[..., Tensor]] = {"scaled_dot_product_attention": self._attention}
        if self.enabled:
            functions |= {name: _casting(getattr(F, name), torch.bfloat16) for name in LOW}
        if self.enabled and self.float32_norms:
            functions |= {name: _casting(getattr(F, name), torch.float32) for name in HIGH}
        self._exchanged.enter_context(patch.multiple(F, **functions))
        return self

    def __exit__(self, *unused: Any) -> None:
        self._exchanged.close()

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **unused: Any
    ) -> Tensor:
        if self.enabled:
            query, key, value, attn_mask = _cast((query, key, value, attn_mask), torch.bfloat16)
        if not self.fused_attention:
            scale = query.shape[-1] ** -0.25
            scores = (query * scale) @ (key * scale).transpose(-2, -1)
            scores = scores if attn_mask is None else scores + attn_mask
            return torch.softmax(scores, -1) @ value  # in bf16 if cast: the CPU's autocast is on inside, too
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, torch.is_grad_enabled()
        )[0]


def _casting(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    def cast(*args: Any, **kwargs: Any) -> Tensor:
        return function(*_cast(args, dtype), **_cast(kwargs, dtype))

    return cast


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def one(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(one, tree)
