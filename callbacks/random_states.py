"""The states of the global random generators, as plain data for checkpoints."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn


def random_states() -> list[dict[str, Any]]:
    """Return the random states of Python, NumPy and torch, per process, as plain data and tensors."""
    version, numbers, gauss = random.getstate()
    # the global generator, which data sets and libraries use
    name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            name,
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, state)
    return gathered


def restore_random_states(states: list[dict[str, Any]], trainer: Trainer) -> None:
    """Set this process's states; if the number of processes has changed, warn, as they then mean nothing."""
    if len(states) != trainer.world_size:
        rank_zero_warn(
            f"the checkpoint is from {len(states)} processes and this run has {trainer.world_size}: "
            "random states of dropout and the like start anew"
        )
        return
    state = states[trainer.global_rank]
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
