"""Reads the checkpoints of this version of the project."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint

from common.errors import UserError, first_line

FORMAT = 1
"""Raised when what a checkpoint holds changes so that other versions can't read it; none in it means 1."""
KEY = "checkpoint_format"


def read(path: Path, whole: bool = True) -> Any:
    """Content of a checkpoint, on the CPU; runs no code from a file, whose tensors stay on disk until used.

    Args:
        path: the file, or the folder of a checkpoint in shards.
        whole: of shards, too; false leaves out what is in them.

    Raises:
        UserError: it is missing, cut short, or holds more than plain data and tensors.
    """
    try:
        if whole and is_sharded(path):
            return consolidated(path)
        file = path / "meta.pt" if path.is_dir() else path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of a different type for each kind of damage
        raise UserError(
            f"{path} can't be read as a checkpoint: {first_line(error)}; give one that `fit` wrote"
        ) from error


def check_format(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another version of the project with a UserError."""
    found = checkpoint.get(KEY, 1)
    if found != FORMAT:
        age = "a later" if isinstance(found, int) and found > FORMAT else "another"
        raise UserError(
            f"{path} was written by {age} version of this project (checkpoint format {found}, this one reads "
            f"{FORMAT}); continue it with that version, or export its student there and start from the folder"
        )


def is_sharded(path: Path) -> bool:
    """Whether the path is the folder of a checkpoint in shards."""
    return path.is_dir() and (path / "meta.pt").is_file()


def consolidated(path: Path) -> dict[str, Any]:
    """Return what a single process would have saved, on the CPU; takes the memory of the whole checkpoint.

    PyTorch reads the index of such a folder by pickle, which can run code: take them from people you trust.
    """
    content: dict[str, Any] = _load_distributed_checkpoint(path)
    numbers = sorted(int(name[len("optimizer_") :]) for name in content if name.startswith("optimizer_"))
    content["optimizer_states"] = [_by_number(content.pop(f"optimizer_{number}")) for number in numbers]
    return content


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """Optimizer states by the parameter's place in its groups, as `Optimizer.load_state_dict` wants them."""
    numbers: dict[str, int] = {}
    groups = []
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    states = {numbers[name]: values for name, values in state["state"].items()}
    return {"state": states, "param_groups": groups}
