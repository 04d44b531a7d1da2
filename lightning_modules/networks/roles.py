"""Student, teacher and fake score as functions; the two scores on one set of base weights.

Adapter off: the frozen teacher. Adapter on: the fake score, an online model of the student's samples.
(SwiftBrush, arXiv 2312.05239, section 3; LoRA: arXiv 2106.09685.)
"""

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.guided import guided_prediction
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.networks.backbones.calling import GUIDANCE, rescale, run_network, takes_guidance
from lightning_modules.networks.lora import LoraSettings, adapter_parameters, inject_adapter
from lightning_modules.networks.weights import hide_from_state_dict

ADAPTER = "fake_score"


class RoleNetwork:
    """One role as a function of noised samples; implements the objectives' `Network`.

    Args:
        schedule: with which its output is read.
        network: a context in which the network of the role is ready to be called.

    Attributes:
        calls_with_gradient: calls so far that autograd follows into weights.
        most_at_once: most samples of one pass without gradient, guidance having two of each; None: all.
    """

    def __init__(
        self, schedule: NoiseSchedule, network: Callable[[], AbstractContextManager[nn.Module]]
    ) -> None:
        self._schedule, self._network = schedule, network
        self.calls_with_gradient = 0
        self.most_at_once: int | None = None

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        negative: Condition | None = None,
        *,
        features: Sequence[str] = (),
    ) -> Prediction:
        """Prediction at x_t [B, C, h, w], t [B]; guidance in kappa form.

        Raises:
            ValueError: the network has no layer of a name in `features`.
        """

        def call(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            size = len(x_t) if torch.is_grad_enabled() or features else self.most_at_once or len(x_t)
            slices = [slice(start, start + size) for start in range(0, len(x_t), size)]
            if len(slices) == 1:
                return run_network(network, x_t, t, condition)
            return torch.cat([run_network(network, x_t[i], t[i], condition[i]) for i in slices])

        self.calls_with_gradient += torch.is_grad_enabled()
        with self._network() as network, captured(network, features) as outputs:
            embedded = GUIDANCE if takes_guidance(network) else None
            prediction = guided_prediction(
                call, self._schedule, x_t, t, condition, guidance_scale, negative, embedded, rescale(network)
            )
        # under guidance the pass with text is the second half
        return replace(prediction, features={name: out[-len(x_t) :] for name, out in outputs.items()})

    def weights(self) -> dict[str, nn.Parameter]:
        """The network's weights by name."""
        with self._network() as network:
            return dict(network.named_parameters())


@contextmanager
def captured(network: nn.Module, features: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of these layers of the network, by name, while it is called inside.

    Raises:
        ValueError: it has no layer of such a name.
    """
    outputs: dict[str, Tensor] = {}
    if not features:
        yield outputs
        return
    layers = dict(network.named_modules())
    if unknown := [name for name in features if name not in layers]:
        close = difflib.get_close_matches(unknown[0], layers, n=3, cutoff=0.3)
        raise ValueError(f"the network has no layer {unknown[0]!r}; near it are {', '.join(close)}")

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            kept: Tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(network, FSDPModule) and kept.requires_grad:
                # shards are gathered when a gradient comes to the network's output; to this one it need not
                kept.register_hook(lambda gradient: network.unshard() and None)
            outputs.setdefault(name, kept)

        return hook

    handles = [layers[name].register_forward_hook(keep(name)) for name in features]
    compiled, network._compiled_call_impl = network._compiled_call_impl, None  # a graph calls no hooks
    try:
        yield outputs
    finally:
        network._compiled_call_impl = compiled
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class RunNetworks:
    """The networks of a run as an objective sees them (its `Networks`)."""

    schedule: NoiseSchedule
    student: RoleNetwork
    teacher: RoleNetwork
    fake_score: RoleNetwork


class ScoreModels(nn.Module):
    """Teacher and fake score as functions of (x_t, t, condition).

    With `lora`, an adapter is put **into `base` itself** (copy the student from it before), and at rest
    the adapter is on; `teacher` switches it off for the duration of the call. Without, the fake score is a
    full copy. The state dict holds only what is trained. Frozen weights stay in evaluation mode.

    Args:
        base: the teacher's network.
        schedule: the teacher's.
        lora: adapter of the fake score; None: a full copy.
        with_fake_score: False: there is no fake score at all.

    Raises:
        UserError: a LoRA target matches no layer.
    """

    def __init__(
        self,
        base: nn.Module,
        schedule: NoiseSchedule,
        lora: LoraSettings | None,
        with_fake_score: bool = True,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.lora = lora
        base.requires_grad_(False).eval()
        self.base = base
        self.full_copy: nn.Module | None = None
        self.with_fake_score = with_fake_score
        if with_fake_score and lora is None:
            self.full_copy = copy.deepcopy(base).to(torch.float32).requires_grad_(True).train()
        elif with_fake_score and lora is not None:
            inject_adapter(base, lora, ADAPTER)
        # looked for once: a walk over all modules at every switch costs milliseconds on large networks
        self._adapter_layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        hide_from_state_dict(self, lambda name: name not in trained and not name.startswith("full_copy."))
        self.teacher = RoleNetwork(schedule, self.teacher_network)
        self.fake_score = RoleNetwork(schedule, self._fake_network)

    def with_student(self, student: nn.Module) -> RunNetworks:
        """Both, and the student beside them."""
        own = RoleNetwork(self.schedule, lambda: nullcontext(student))
        return RunNetworks(self.schedule, own, self.teacher, self.fake_score)

    # --- the two roles --------------------------------------------------------------------------------------

    @contextmanager
    def teacher_network(self) -> Iterator[nn.Module]:
        """The network as the original teacher."""
        with self.adapter(False):
            yield self.base

    @contextmanager
    def _fake_network(self) -> Iterator[nn.Module]:
        """The network as the fake score; without gradients the adapter is folded in, which saves products."""
        if not self.with_fake_score:
            raise ValueError("the objective does not name fake_score among its roles, so there is none")
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
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is None:  # in few bits
        return False
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
