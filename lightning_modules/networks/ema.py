"""Exponential moving average of the student's weights (same rule as diffusers' EMAModel at its defaults)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.networks.weights import difference
from lightning_modules.parallel import gather, scatter_like


class StudentEMA:
    """Shadow of a module's trained parameters in float32.

    After update n the shadow is d * shadow + (1 - d) * weights with d = min(decay, n / (9 + n)), and d = 0
    at n = 1.

    Args:
        module: the network that is averaged; it is referred to, not copied. Parameters that require no
            gradient now (the base of a LoRA student) are left out.
        decay: largest decay.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999) -> None:
        if not 0.0 <= decay < 1.0:
            raise UserError(f"EMA decay {decay} must lie in [0, 1). Set it to e.g. 0.9999, or use no EMA.")
        self.module = module
        self.decay = decay
        self.num_updates = 0
        self.shadow = {
            name: p.detach().to(torch.float32, copy=True)
            for name, p in module.named_parameters()
            if p.requires_grad
        }
        self._swapped = False

    def current_decay(self) -> float:
        """Decay of the latest update (diffusers: (1 + s) / (10 + s) with s = n - 1, bounded by `decay`)."""
        step = self.num_updates - 1
        return 0.0 if step <= 0 else min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average; once per student update."""
        if self._swapped:
            raise RuntimeError("StudentEMA.update() inside swapped() would average the average into itself")
        self.num_updates += 1
        averaged = dict(self._averaged())
        self.shadow = {name: self.shadow[name].to(parameter.device) for name, parameter in averaged.items()}
        weights = [parameter.detach().float() for parameter in averaged.values()]
        # shadow + (1 - d) (weights - shadow), without a tensor in between
        torch._foreach_lerp_([*self.shadow.values()], weights, 1.0 - self.current_decay())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module holds the average inside; its own weights return bit for bit, also on exceptions."""
        if self._swapped:
            raise RuntimeError("StudentEMA.swapped() is already active")
        own = {name: parameter.detach().clone() for name, parameter in self._averaged()}
        self._swapped = True
        try:
            self._write(self.shadow)
            yield
        finally:
            self._write(own)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """{"shadow": {name: float32 tensor}, "decay": float, "num_updates": int}; plain data.

        Shards are gathered on the first process (collective); the others get no shadow.
        """
        return {"shadow": gather(self.shadow), "decay": self.decay, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over shadow and counter; the decay of this object stays (settings win over checkpoints)."""
        if found := difference(state["shadow"], self.shadow):
            raise UserError(
                "The EMA weights in the checkpoint are those of another architecture than the student's: "
                f"{found}. Give a checkpoint of the same model."
            )
        self.shadow = {name: scatter_like(state["shadow"][name], own) for name, own in self.shadow.items()}
        self.num_updates = int(state["num_updates"])

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._averaged():
            parameter.copy_(weights[name])

    def _averaged(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if name in self.shadow)
