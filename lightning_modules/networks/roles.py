"""The two score networks of variational score distillation on one set of base weights.

Adapter off: the frozen teacher. Adapter on: the fake score, an online model of the student's samples.
(SwiftBrush, arXiv 2312.05239, section 3; LoRA: arXiv 2106.09685.)
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.guided import guided_prediction
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.networks.backbones.calling import run_network
from lightning_modules.networks.lora import LoraSettings, adapter_parameters, inject_adapter
from lightning_modules.networks.weights import hide_from_state_dict

ADAPTER = "fake_score"


class ScoreModels(nn.Module):
    """Teacher and fake score as functions of (x_t, t, condition); implements the objectives' `Scores`.

    With `lora`, an adapter is put **into `base` itself** (copy the student from it before), and at rest
    the adapter is on; `teacher` switches it off for the duration of the call. Without, the fake score is a
    full copy. The state dict holds only what is trained. Frozen weights stay in evaluation mode.

    Raises:
        UserError: a LoRA target matches no layer.
    """

    def __init__(self, base: nn.Module, schedule: NoiseSchedule, lora: LoraSettings | None) -> None:
        super().__init__()
        self.schedule = schedule
        self.lora = lora
        base.requires_grad_(False).eval()
        self.base = base
        self.full_copy: nn.Module | None = None
        if lora is None:
            self.full_copy = copy.deepcopy(base).to(torch.float32).requires_grad_(True).train()
        else:
            inject_adapter(base, lora, ADAPTER)
        # looked for once: a walk over all modules at every switch costs milliseconds on large networks
        self._adapter_layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        hide_from_state_dict(self, lambda name: name not in trained and not name.startswith("full_copy."))

    # --- the two roles --------------------------------------------------------------------------------------

    def teacher(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        negative: Condition | None = None,
    ) -> Prediction:
        """Prediction of the frozen teacher at x_t [B, C, h, w], t [B]; guidance in kappa form."""
        with self.teacher_network() as network:
            return guided_prediction(
                _caller(network), self.schedule, x_t, t, condition, guidance_scale, negative
            )

    def fake_score(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        negative: Condition | None = None,
    ) -> Prediction:
        """Prediction of the fake score at x_t [B, C, h, w], t [B]; guidance in kappa form."""
        with self._fake_network() as network:
            return guided_prediction(
                _caller(network), self.schedule, x_t, t, condition, guidance_scale, negative
            )

    @contextmanager
    def teacher_network(self) -> Iterator[nn.Module]:
        """The network as the original teacher."""
        with self.adapter(False):
            yield self.base

    @contextmanager
    def _fake_network(self) -> Iterator[nn.Module]:
        """The network as the fake score; without gradients the adapter is folded in, which saves products."""
        if self.full_copy is not None:
            yield self.full_copy
        elif torch.is_grad_enabled() or not all(map(_is_foldable, self._adapter_layers)):
            with self.adapter(True):
                yield self.base
        else:
            with self.adapter(False), _folded(self._adapter_layers):
                yield self.base

    @contextmanager
    def adapter(self, active: bool) -> Iterator[None]:
        """Switch the adapter on or off and restore each layer's former state, also after an exception.

        PEFT's own switch sets `requires_grad` of the adapter as a side effect, which would undo the freezing
        of the other role's turn, and costs more than a flag. Nothing happens with a full copy.
        """
        with _switched(self._adapter_layers, [active] * len(self._adapter_layers)):
            yield

    # --- training and storage -------------------------------------------------------------------------------

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of both roles in the backward pass, where gradients are wanted.

        A block is recomputed as the role it was called as, whichever is on by then.
        """
        for network in self.networks():
            network.enable_gradient_checkpointing(_checkpoint_as_called)  # type: ignore[operator]

    def networks(self) -> list[nn.Module]:
        """The networks that hold the two roles: one, or two with a full copy."""
        return [self.base, *([self.full_copy] if self.full_copy is not None else [])]

    def fake_parameters(self) -> list[nn.Parameter]:
        """Parameters of the fake score, whether or not they require a gradient at the moment."""
        if self.full_copy is not None:
            return list(self.full_copy.parameters())
        return [p for layer in self._adapter_layers for p in adapter_parameters(layer)]

    def train(self, mode: bool = True) -> "ScoreModels":
        """Training mode reaches the fake score only: the teacher must not drop anything out."""
        super().train(mode)
        self.base.eval()
        for layer in self._adapter_layers:
            layer.lora_dropout.train(mode)
        return self


def _caller(network: nn.Module) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """The network as the function that `guided_prediction` calls."""
    return lambda x_t, t, condition: run_network(network, x_t, t, condition)


@contextmanager
def _switched(layers: list[BaseTunerLayer], active: list[bool]) -> Iterator[None]:
    """Switch each layer's adapter on or off and restore its former state."""
    before = [layer.disable_adapters for layer in layers]
    for layer, on in zip(layers, active, strict=True):
        layer._disable_adapters = not on
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def _checkpoint_as_called(block: nn.Module, *inputs: Any) -> Any:
    """The block's output without keeping its activations; recomputed with the adapter as it is now."""
    layers = [module for module in block.modules() if isinstance(module, BaseTunerLayer)]
    active = [not layer.disable_adapters for layer in layers]

    def call(*inputs: Any) -> Any:
        with _switched(layers, active):
            return block(*inputs)

    return checkpoint(call, *inputs, use_reentrant=False)


def _is_foldable(layer: BaseTunerLayer) -> bool:
    """Whether base weights plus the adapter's are exact enough, and faster.

    In bfloat16 a small adapter would be lost. On GPUs the weights' addresses must stay, for captured graphs.
    """
    weight = layer.get_base_layer().weight
    plain = weight.device.type == "cpu" and not isinstance(weight, DTensor)
    dropped = any(module.training and getattr(module, "p", 0.0) > 0 for module in layer.lora_dropout.values())
    return plain and weight.dtype == torch.float32 and not dropped


@contextmanager
def _folded(layers: list[BaseTunerLayer]) -> Iterator[None]:
    """The adapters' updates are in the base weights inside; the original tensors return, not a difference."""
    weights = [layer.get_base_layer().weight for layer in layers]
    originals = [weight.data for weight in weights]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            weight.data = weight.data + layer.get_delta_weight(ADAPTER)
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original
