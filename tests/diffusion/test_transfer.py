"""Tensors on their way to the device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.transfer import to_device


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 1)])
def test_a_gpu_is_not_waited_for(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be none here: what would be asked of PyTorch is written down instead."""
    asked: list[Any] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda values: asked.append("pinned") or values)
    monkeypatch.setattr(Tensor, "to", lambda values, *to, **how: asked.append((to, how)) or values)
    assert to_device(torch.ones(2), device).tolist() == [1, 1]
    assert asked == ["pinned", ((device,), {"non_blocking": True})]


def test_other_devices_get_a_plain_copy() -> None:
    values = torch.arange(3)
    assert to_device(values, "cpu") is values
    assert to_device(values, torch.device("meta")).device.type == "meta"
    random = StepRandom(0, 0, torch.arange(2), "meta")
    assert random.uniform("t").dtype == random.normal("x", (3,)).dtype == torch.float32
    assert random.uniform("t").device.type == random.normal("x", (3,)).device.type == "meta"
