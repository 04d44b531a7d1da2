"""The average of the student follows diffusers' EMAModel."""

import copy
from collections.abc import Iterator

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from common.errors import UserError
from lightning_modules.networks.ema import StudentEMA


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def walk(module: nn.Module, steps: int) -> Iterator[int]:
    """Change the weights at random `steps` times."""
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        yield step


@pytest.mark.parametrize("decay", [0.9999, 0.5, 0.0])
def test_equals_diffusers(module: nn.Module, decay: float) -> None:
    theirs, ours = EMAModel(module.parameters(), decay=decay), StudentEMA(module, decay)
    for _ in walk(module, 20):
        theirs.step(module.parameters())
        ours.update()
        assert ours.current_decay() == theirs.cur_decay_value
        for a, b in zip(ours.shadow.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert decay == 0.0 or not torch.equal(ours.shadow["0.weight"], module[0].weight)


def test_swapping_is_exact_and_exception_safe(module: nn.Module) -> None:
    ema = StudentEMA(module)
    for _ in walk(module, 5):
        ema.update()
    own = copy.deepcopy(module.state_dict())
    with pytest.raises(KeyError), ema.swapped():
        assert all(torch.equal(p, ema.shadow[n]) for n, p in module.named_parameters())
        with pytest.raises(RuntimeError, match="already"), ema.swapped():
            pass
        with pytest.raises(RuntimeError, match="average"):
            ema.update()
        raise KeyError
    assert all(torch.equal(tensor, own[name]) for name, tensor in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())
    with ema.swapped():
        assert not torch.equal(module[0].weight, own["0.weight"])


def test_state_round_trips_through_a_file(module: nn.Module, tmp_path: object) -> None:
    ema, other = StudentEMA(module, 0.7), StudentEMA(module, 0.7)
    steps = walk(module, 8)
    for _ in range(4):
        next(steps)
        ema.update()
    torch.save(ema.state_dict(), f"{tmp_path}/ema.pt")
    other.load_state_dict(torch.load(f"{tmp_path}/ema.pt", weights_only=True))
    for _ in steps:
        ema.update()
        other.update()
    assert ema.num_updates == other.num_updates == 8
    assert all(torch.equal(ema.shadow[name], other.shadow[name]) for name in ema.shadow)


def test_half_precision_weights_are_averaged_in_float32(module: nn.Module) -> None:
    ema = StudentEMA(module.bfloat16())
    ema.update()
    assert {tensor.dtype for tensor in ema.shadow.values()} == {torch.float32}


def test_bad_values_are_refused(module: nn.Module) -> None:
    with pytest.raises(UserError, match="decay 1"):
        StudentEMA(module, 1.0)
    state = StudentEMA(nn.Linear(3, 4)).state_dict()
    with pytest.raises(UserError, match=r"another architecture.*: 0.weight is not in .* \[4, 3\]"):
        StudentEMA(module).load_state_dict(state)
