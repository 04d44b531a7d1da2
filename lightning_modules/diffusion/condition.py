"""What a network is conditioned on: encoded prompts, and what stands for no prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.diffusion.broadcast import expand_like


@dataclass(frozen=True)
class Condition:
    """Encoded prompts of a batch, with the encoded empty prompt ∅ beside them.

    Attributes:
        tensors: keyword arguments of the network, each [B, …], e.g. ``{"encoder_hidden_states": [B, L, D]}``.
        null: the same keys for the empty prompt, each [1, …] with the same trailing sizes.

    Raises:
        ValueError: if keys or shapes of the two do not match.
    """

    tensors: Mapping[str, Tensor]
    null: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not self.tensors or self.tensors.keys() != self.null.keys():
            raise ValueError(
                f"condition and null must share their keys: {list(self.tensors)}, {list(self.null)}"
            )
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            raise ValueError("the tensors of a condition must share their batch size")
        for name, tensor in self.tensors.items():
            if self.null[name].shape != (1, *tensor.shape[1:]):
                raise ValueError(
                    f"null {name!r} has shape {tuple(self.null[name].shape)}, not {(1, *tensor.shape[1:])}"
                )

    @property
    def batch_size(self) -> int:
        """B."""
        return len(next(iter(self.tensors.values())))

    def without_text(self, mask: Tensor | None = None) -> Condition:
        """The batch with ∅ for prompts where the boolean ``mask`` [B] is true (None: everywhere)."""
        if mask is None:
            # not a view: another layout than that of prompts would have compiled networks compiled again
            nothing = {n: self._null_like(n).expand_as(x).contiguous() for n, x in self.tensors.items()}
            return Condition(nothing, self.null)
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask must be boolean, got {mask.dtype}")
        dropped = {
            name: torch.where(expand_like(mask.to(x.device), x), self._null_like(name), x)
            for name, x in self.tensors.items()
        }
        return Condition(dropped, self.null)

    def concat(self, other: Condition) -> Condition:
        """Both batches one after the other, [B + B', …]; keeps this one's ∅.

        Raises:
            ValueError: if ``other`` has other keys.
        """
        if self.tensors.keys() != other.tensors.keys():
            raise ValueError(f"conditions with different keys: {list(self.tensors)}, {list(other.tensors)}")
        joined = {name: torch.cat([x, other.tensors[name].to(x)]) for name, x in self.tensors.items()}
        return Condition(joined, self.null)

    def expand(self, batch_size: int) -> Condition:
        """One prompt repeated (as a view) for ``batch_size`` samples; a full batch is returned as it is.

        Raises:
            ValueError: if this condition holds neither 1 nor ``batch_size`` prompts.
        """
        if self.batch_size == batch_size:
            return self
        if self.batch_size != 1:
            raise ValueError(f"a condition of {self.batch_size} prompts does not fit a batch of {batch_size}")
        repeated = {name: x.expand(batch_size, *x.shape[1:]) for name, x in self.tensors.items()}
        return Condition(repeated, self.null)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """On another device, floating-point tensors in another type (masks keep theirs)."""

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        return Condition(
            {name: move(x) for name, x in self.tensors.items()},
            {name: move(x) for name, x in self.null.items()},
        )

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """The samples of a slice, or of an index or boolean tensor."""
        return Condition({name: x[index] for name, x in self.tensors.items()}, self.null)

    def _null_like(self, name: str) -> Tensor:
        return self.null[name].to(self.tensors[name])
