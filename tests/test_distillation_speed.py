"""What keeps a training step fast: graphs compiled once, and nothing that waits for the device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from lightning_modules import compiling
from lightning_modules import optimization as step_numbers
from lightning_modules.compiling import CompiledNetworks
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.guidance.scales import FixedGuidance, UniformGuidance
from lightning_modules.networks.loading import load_parts
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.optimization import StepNumbers
from lightning_modules.trainer_settings import channels_last
from tests.tiny_distillation import PROMPTS, Hooks, distillation, fit, snapshot

# --- waiting


class Waits(TorchDispatchMode):
    """Counts operations whose result the program needs to go on: on a GPU each waits for all before it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        return func(*args, **(kwargs or {}))


def waits(module: OneStepDistillation, folder: Path, **settings: Any) -> list[int]:
    """How often each of three training steps waits."""
    train, counts = module.training_step, []

    def counted(batch: dict[str, Any], batch_idx: int) -> None:
        with Waits() as mode:
            train(batch, batch_idx)
        counts.append(mode.count)

    module.training_step = counted  # type: ignore[method-assign]
    fit(module, folder, 3, **settings)
    return counts


def test_a_step_waits_twice(tiny_sd: Path, tmp_path: Path) -> None:
    """To know whether each role's gradient is finite, whatever the batch, its parts and the diagnostics."""
    random = SwiftBrush(guidance_scale=UniformGuidance(2.0, 5.0), dropout_per_sample=True)
    assert waits(distillation(tiny_sd, random), tmp_path) == [2, 2, 2]
    assert waits(distillation(tiny_sd), tmp_path, micro_batch_size=2) == [2, 2, 2]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_numbers_of_the_cpu_are_sent_in_one_copy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU."""
    sent: list[list[float]] = []
    logged: dict[str, Tensor] = {}
    send = step_numbers.to_device
    monkeypatch.setattr(step_numbers, "to_device", lambda v, to: sent.append(v.tolist()) or send(v, to))
    module: Any = SimpleNamespace(
        device=torch.device(device), trainer=SimpleNamespace(world_size=1),
        log=lambda name, value, **_: logged.update({name: value}),
    )  # fmt: skip
    numbers = StepNumbers()
    numbers.note("train/a", 1.0)
    numbers.note("b", torch.tensor(2.0, device=device))
    numbers.note("c", torch.tensor(3.0))
    numbers.note("c", 4.0, 0.5)
    numbers.log(module)
    assert list(logged) == ["train/a", "b", "c"]
    assert {value.device.type for value in logged.values()} == {device}
    if device == "meta":
        assert sent == [[1, 5]]
    else:
        assert [value.item() for value in logged.values()] == [1, 2, 5]


# --- layout


def test_channels_last_changes_no_number_that_is_trained(tiny_sd: Path) -> None:
    """Frozen weights and activations change their order in memory, trained ones and results do not."""
    unet = load_parts(tiny_sd).denoiser
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 16, 16)
    expected = unet(*inputs).sample
    trained = [unet.conv_in.weight, unet.down_blocks[0].attentions[0].proj_in.weight]
    for weight in unet.parameters():
        weight.requires_grad_(any(weight is one for one in trained))
    channels_last([unet])
    orders = []
    unet.conv_out.register_forward_hook(lambda layer, given, output: orders.append(given[0].stride(1)))
    torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    assert orders == [1], "channels are not last behind all blocks"
    assert all(weight.is_contiguous() for weight in trained)
    assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


# --- compiling


def test_nothing_is_compiled_again_when_prompts_guidance_and_turns_change(
    smaller_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    counts: list[int] = []

    def train(compile: bool) -> OneStepDistillation:
        objective = SwiftBrush(guidance_scale=UniformGuidance(2.0, 5.0), prompt_dropout=0.5)
        module = distillation(smaller_sd, objective, compile=compile)
        fit(module, tmp_path, 3, Hooks(after_step=lambda _: counts.append(len(graphs))))
        return module

    plain = train(False)
    assert counts == [0, 0, 0]
    compiled = train(True)
    # student; scores without gradient (the fake score's adapter is folded in on the CPU); fake score with one
    assert counts[3:] == [3, 3, 3]
    compiled.generator.images(PROMPTS[:3], [1, 2, 3])
    assert len(graphs) == 3, "evaluations are not compiled"
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for name, value in snapshot(plain).items():
        torch.testing.assert_close(snapshot(compiled)[name], value, rtol=1e-4, atol=1e-5)


def test_a_random_negative_scale_is_refused(tiny_sd: Path) -> None:
    """A fixed one is no obstacle, nor is a random one without compiling."""

    def configure(scale: Any, compile: bool) -> None:
        distillation(tiny_sd, SwiftBrush(student_negatives=scale), compile=compile).configure_model()

    with pytest.raises(UserError, match="random student_negatives.*Set compile to false, or"):
        configure(UniformGuidance(0, 1), True)
    configure(UniformGuidance(0, 1), False)
    configure(FixedGuidance(0.5), True)


def test_networks_run_as_they_are_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: calls.append(1) or graph.forward)
    network = nn.Linear(2, 2)
    networks = CompiledNetworks([network], "default")
    network(torch.ones(1, 2))
    with pytest.raises(KeyError), networks.active():
        network(torch.ones(1, 2))
        raise KeyError
    network(torch.ones(5, 2))
    assert calls == [1]


@pytest.mark.parametrize("mode", ["fast", "none"])
def test_unknown_modes(mode: str) -> None:
    with pytest.raises(
        UserError, match=f"compile is '{mode}': set it to true, false or one of default, reduce"
    ):
        CompiledNetworks([nn.Linear(1, 1)], mode)
