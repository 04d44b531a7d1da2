"""Settings that save memory, each by its key in a configuration."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import UserError
from lightning_modules.networks.lora import StudentLoraSettings
from lightning_modules.networks.quantized import QuantizedLinear, quantize_frozen
from lightning_modules.parallel import FullySharded
from lightning_modules.trainer_settings import frozen_dtype
from tests.test_configs import ParseOnly
from tests.test_optimization import EightBit
from tests.tiny_distillation import changed, distillation, fit, snapshot, write_config


@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16"])
def test_type_of_frozen_weights(wanted: str, tiny_sd: Path, tmp_path: Path) -> None:
    """The trained ones stay in float32, and training goes on from bfloat16 ones."""
    module = distillation(tiny_sd, frozen_weights=wanted)
    fit(module, tmp_path, 1)
    half = torch.bfloat16 if wanted == "bfloat16" else torch.float32
    parameters = dict(module.named_parameters())
    frozen = {p.dtype for p in parameters.values() if not p.requires_grad}
    trained = {p.dtype for p in parameters.values() if p.requires_grad}
    assert (frozen, trained) == ({half}, {torch.float32})
    parts = module.memory_parts()
    assert parts["teacher"][1] == parts["teacher"][0] * half.itemsize
    before = snapshot(module)
    fit(module, tmp_path, 2)
    moved = changed(before, snapshot(module))
    assert {name.partition(".")[0] for name in moved} == {"student", "scores"}
    assert all(parameters[name].requires_grad for name in moved)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.1)])
def test_a_frozen_linear_layer_in_few_bits(bits: int, error: float) -> None:
    """Near the layer's own weight, whose product and gradient it has exactly."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain, x = nn.Linear(96, 40).requires_grad_(False), torch.randn(2, 5, 96, requires_grad=True)
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Sequential(plain), nn.Sequential(plain)])
    quantize_frozen([network], bits)
    layer, same = (block[0] for block in network.blocks)  # type: ignore[union-attr]
    assert isinstance(layer, QuantizedLinear) and layer.values is same.values
    whole = layer.whole(torch.float32)
    assert 0 < (whole - plain.weight).norm() < error * plain.weight.norm()
    for_gradient = torch.randn(2, 5, 40)
    outputs = layer(x), nn.functional.linear(x, whole, plain.bias)
    gradients = [torch.autograd.grad(output, x, for_gradient)[0] for output in outputs]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    assert sum(p.numel() * p.element_size() for p in (layer.values, layer.largest)) < 96 * 40 * bits / 8 * 1.2


@pytest.mark.parametrize(("bits", "error"), [("8bit", 0.01), ("4bit", 0.2)])
def test_three_roles_on_a_base_in_few_bits(
    bits: str, error: float, backbone_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    lora = StudentLoraSettings(rank=2, alpha=4.0, targets=["to_q", "to_v"])
    modules = [
        distillation(
            backbone_folder("sd3"), frozen_weights=kind, student_lora=lora, start_timestep=999,
            gradient_checkpointing=kind != "float32",
        )
        for kind in ("float32", bits)
    ]  # fmt: skip
    outputs = []
    for module in modules:
        module.configure_model()
        shape, condition = module.parts.latent_shape, module.generator.prompt_encoder.encode(["a red cat"])
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs.append(module.networks.teacher(x, torch.tensor([500]), condition).x0)
    assert 0 < (outputs[1] - outputs[0]).norm() < error * outputs[0].norm()
    whole, packed = (module.memory_parts() for module in modules)
    assert packed["teacher"][1] < 0.8 * whole["teacher"][1] and "student's base" not in packed
    before = snapshot(modules[1])
    fit(modules[1], tmp_path, 3)
    moved = changed(before, snapshot(modules[1]))
    assert moved == {name for name in before if "lora_" in name}


def test_shards_have_one_type() -> None:
    sharded: Any = types.SimpleNamespace(strategy=FullySharded(), precision="bf16-mixed")
    assert frozen_dtype(sharded) == torch.float32
    with pytest.raises(UserError, match="frozen_weights is bfloat16.*float32"):
        frozen_dtype(sharded, "bfloat16")
    with pytest.raises(UserError, match="frozen_weights is 4bit.*float32"):
        frozen_dtype(sharded, "4bit")


def test_pictures_are_decoded_in_slices(tiny_sd: Path, tmp_path: Path) -> None:
    module = distillation(tiny_sd, decode_slice=2)
    fit(module, tmp_path, 1)
    seen = []
    module.parts.vae.decoder.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    images = module.generator.images(["a red cat"] * 5, range(5))
    assert seen == [2, 2, 1] and len(images) == 5
    module.generator.decoder.slice_size = 16
    torch.testing.assert_close(module.generator.images(["a red cat"] * 5, range(5)), images)


# --- optimizers


class NotInstalled:
    """A finder by which these packages are not there, whether or not they are."""

    @staticmethod
    def find_spec(name: str, *unused: Any) -> None:
        if name.partition(".")[0] in ("bitsandbytes", "torchao"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("name", ["bitsandbytes.optim.Adam8bit", "torchao.optim.AdamW8bit"])
def test_an_8bit_optimizer_that_is_not_installed(
    name: str, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == name.split(".")[0]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled, *sys.meta_path])
    optimizer = {"class_path": name, "init_args": {"lr": 1e-6}}
    config = write_config(tmp_path / "c.yaml", tiny_sd, model__init_args__student={"optimizer": optimizer})
    with pytest.raises(UserError, match=rf'{name} needs the package .*pip install -e "\.\[8bit\]"'):
        ParseOnly(["fit", "--config", str(config)])


def test_an_8bit_optimizer_by_class_path(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in the place of bitsandbytes', which may not be installed; the memory table counts its bytes."""
    package, stand_in = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    stand_in.Adam8bit = package.optim = EightBit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in)
    optimizer = {"class_path": "bitsandbytes.optim.Adam8bit", "init_args": {"lr": 1e-6}}
    config = write_config(tmp_path / "c.yaml", tiny_sd, model__init_args__student={"optimizer": optimizer})
    settings = ParseOnly(["fit", "--config", str(config)]).settings.model.init_args.student.optimizer
    assert settings.class_path.endswith(".EightBit") and settings.init_args.lr == 1e-6


def test_a_fused_optimizer_by_config(tiny_sd: Path, tmp_path: Path) -> None:
    rate = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-6, "fused": True}}
    config = write_config(tmp_path / "c.yaml", tiny_sd, model__init_args__student={"optimizer": rate})
    settings = ParseOnly(["fit", "--config", str(config)]).settings.model.init_args.student.optimizer
    assert settings.init_args.fused is True
