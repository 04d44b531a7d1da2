"""What changes when a run continues with other optimizer settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from callbacks.resume import apply_groups, replace_foreign_states


def optimizer_with_state(device: str) -> tuple[torch.optim.Adam, nn.Parameter]:
    """As restored from a run without the fused kernel: the step count on the CPU."""
    weight = nn.Parameter(torch.zeros(2, device=device))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    optimizer.state[weight] = {
        "step": torch.tensor(3.0, dtype=torch.float64),
        "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight),
    }  # fmt: skip
    return optimizer, weight


@pytest.mark.parametrize("now", [True, None])
def test_step_counts_go_to_the_weights_where_the_fused_kernel_needs_them(now: Any) -> None:
    """The meta device stands for a GPU."""
    optimizer, weight = optimizer_with_state("meta")
    apply_groups(optimizer, [{"lr": 0.1, "fused": None}], [{"lr": 0.1, "fused": now}])
    step = optimizer.state[weight]["step"]
    expected = ("meta", torch.float32) if now else ("cpu", torch.float64)
    assert (step.device.type, step.dtype) == expected
    assert optimizer.param_groups[0]["fused"] is now


def test_the_count_itself_is_kept() -> None:
    optimizer, weight = optimizer_with_state("cpu")
    apply_groups(optimizer, [{"lr": 0.1, "fused": None}], [{"lr": 0.1, "fused": True}])
    weight.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[weight]["step"].item() == 4
    assert (weight < 0).all()


def test_the_state_of_another_optimizer_is_left_out() -> None:
    """Its learning rate stays, which a schedule has moved; of the same kind everything does."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    adam = torch.optim.Adam([weight], lr=0.1)
    adam.step()
    adam.param_groups[0] |= {"lr": 0.05, "initial_lr": 0.1}
    for other in (torch.optim.RMSprop([weight], lr=0.3), torch.optim.SGD([weight], lr=0.3)):
        other.param_groups[0]["initial_lr"] = 0.3
        states = [adam.state_dict()]
        with pytest.warns(
            UserWarning, match=f"of another kind than {type(other).__name__}, which starts anew"
        ):
            replace_foreign_states(states, [other])
        other.load_state_dict(states[0])
        other.step()
        assert (other.param_groups[0]["lr"], other.param_groups[0]["initial_lr"]) == (0.05, 0.1)
    states = [adam.state_dict()]
    replace_foreign_states(states, [torch.optim.Adam([weight], lr=0.3)])
    assert states[0]["state"][0]["step"] == 1
