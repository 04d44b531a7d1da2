"""One role's optimizer, schedule and clipping."""

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from common.errors import UserError
from lightning_modules.optimization import RoleOptimization, StepNumbers
from tests.tiny_distillation import Pull, distillation, fit, snapshot


def role(optimizer: Any = torch.optim.SGD, learning_rate: float = 1.0, **settings: Any) -> RoleOptimization:
    return RoleOptimization(functools.partial(optimizer, lr=learning_rate), **settings)


def rates(optimization: RoleOptimization, max_steps: int, steps: int) -> list[float]:
    """Learning rates of the first updates."""
    optimizer, schedule = optimization.build([{"params": [nn.Parameter(torch.zeros(1))]}], max_steps)
    used = []
    for _ in range(steps):
        used.append(round(optimizer.param_groups[0]["lr"], 6))
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize(
    ("settings", "max_steps", "expected"),
    [
        ({}, -1, [1, 1, 1, 1]),
        ({"warmup_steps": 2}, -1, [0, 0.5, 1, 1]),
        ({"schedule": "linear"}, 4, [1, 0.75, 0.5, 0.25, 0]),
        ({"schedule": "linear", "warmup_steps": 2}, 4, [0, 0.5, 1, 0.5, 0]),
        ({"schedule": "cosine"}, 4, [1, 0.853553, 0.5, 0.146447, 0]),
    ],
)
def test_learning_rates(settings: dict[str, Any], max_steps: int, expected: list[float]) -> None:
    assert rates(role(**settings), max_steps, len(expected)) == pytest.approx(expected, abs=1e-6)


def test_groups_keep_their_own_learning_rate() -> None:
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))]},
        {"params": [nn.Parameter(torch.ones(1))], "lr": 3.0},
    ]
    optimizer, schedule = role(schedule="linear").build(groups, 2)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "step"}, "schedule is 'step': choose one of constant, linear, cosine"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        role(**settings)


def test_falling_schedules_need_an_end() -> None:
    with pytest.raises(UserError, match="cosine schedule needs trainer.max_steps"):
        role(schedule="cosine").build([{"params": [nn.Parameter(torch.zeros(1))]}], -1)


@pytest.mark.parametrize(
    ("clip_norm", "expected"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (None, [3.0, 4.0])]
)
def test_clipping(clip_norm: float | None, expected: list[float]) -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    norm = role(clip_norm=clip_norm).clip(iter([weight, nn.Parameter(torch.zeros(1))]))
    assert norm.item() == pytest.approx(5.0)
    assert weight.grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_norm_tells_of_gradients_that_are_not_finite(clip_norm: float | None) -> None:
    for value in (float("nan"), float("inf")):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([1.0, value])
        assert not torch.isfinite(role(clip_norm=clip_norm).clip([weight]))


@pytest.mark.parametrize(
    ("optimizer", "values"),
    [
        (torch.optim.Adam, 2), (torch.optim.AdamW, 2), (torch.optim.SGD, 0), (torch.optim.RMSprop, 1),
        (functools.partial(torch.optim.SGD, momentum=0.9), 1),
        (functools.partial(torch.optim.Adam, amsgrad=True), 3),
        (functools.partial(torch.optim.Adam, fused=True), 2),
    ],
)  # fmt: skip
def test_state_per_weight(optimizer: Any, values: float) -> None:
    assert role(optimizer).state_per_weight() == (values, 4 * values)


class EightBit(torch.optim.Optimizer):
    """Keeps a byte for each weight and a scale for each row."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 1, "first": p.new_zeros(p.shape, dtype=torch.uint8),
                                 "scale": p.new_zeros(len(p))}  # fmt: skip


def test_state_in_eight_bits_is_counted_in_bytes() -> None:
    assert role(EightBit).state_per_weight() == (1 + 1 / 256, 1 + 4 / 256)


@pytest.mark.parametrize(
    ("settings", "fused"), [({}, True), ({"foreach": True}, None), ({"fused": False}, False)]
)
def test_one_kernel_updates_all_weights_unless_told_otherwise(settings: dict[str, Any], fused: Any) -> None:
    ours, plain = (nn.Parameter(torch.linspace(-1, 1, 33)) for _ in range(2))
    optimizer, _ = role(functools.partial(torch.optim.Adam, **settings), 0.1).build([{"params": [ours]}], -1)
    assert optimizer.param_groups[0]["fused"] is fused
    loop = torch.optim.Adam([plain], lr=0.1, foreach=False)
    for step in range(3):
        ours.grad, plain.grad = (torch.linspace(step, 2, 33) for _ in range(2))
        optimizer.step()
        loop.step()
    torch.testing.assert_close(ours, plain)
    assert not torch.equal(ours, torch.linspace(-1, 1, 33))


def test_optimizers_without_such_a_kernel() -> None:
    optimizer, _ = role(torch.optim.RMSprop).build([{"params": [nn.Parameter(torch.zeros(1))]}], -1)
    assert "fused" not in optimizer.param_groups[0]


def test_kernels_that_need_their_step_counts_elsewhere_are_not_chosen() -> None:
    optimizer, _ = role(torch.optim.Adagrad).build([{"params": [nn.Parameter(torch.zeros(1))]}], -1)
    assert optimizer.param_groups[0]["fused"] is None


def test_each_role_has_its_own_optimizer_and_norm(tiny_sd: Path, tmp_path: Path) -> None:
    """The student's rate and norm are a million times the fake score's: nothing of it may move the other."""
    roles = {
        "student": RoleOptimization(lambda groups: torch.optim.SGD(groups, lr=1.0), clip_norm=1.0),
        "fake_score": RoleOptimization(lambda groups: torch.optim.SGD(groups, lr=1e-3), clip_norm=1e-3),
    }
    module = distillation(tiny_sd, Pull(3.0), **roles)
    before: dict[str, torch.Tensor] = {}

    class Start(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            before.update(snapshot(module))

    run = fit(module, tmp_path, 1, Start())
    assert [one.param_groups[0]["lr"] for one in run.optimizers] == [1.0, 1e-3]

    def moved(prefix: str) -> float:
        parts = [(p - before[n]).square().sum() for n, p in module.named_parameters() if n.startswith(prefix)]
        return float(torch.stack(parts).sum().sqrt())

    assert moved("student.") == pytest.approx(1.0, rel=1e-3)  # rate x norm
    own = {"scores.", "objective."}  # whose own rate is 0.25, see Pull
    assert 0 < sum(map(moved, own)) <= 1.01 * (1e-3 * 1e-3 + 0.25 * 1e-3)


def test_numbers_of_micro_batches() -> None:
    """Means are weighted by the micro-batch; counts are totals, the mean over processes being taken later."""
    numbers = StepNumbers()
    for value, share in ((4.0, 0.25), (8.0, 0.75)):
        numbers.note_all("objective", {"rms": value, "nonfinite_gradients": 1}, share, world_size=2)
    assert {name: float(value) for name, value in numbers._values.items()} == {
        "objective/rms": 7.0,
        "objective/nonfinite_gradients": 4.0,
    }
