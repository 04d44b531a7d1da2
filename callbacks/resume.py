"""What happens when a run continues: the configuration wins over the checkpoint, and what differs is said."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.errors import UserError
from common.processes import from_every_rank

_NOT_COMPARED = ("ckpt_path", "experiment", "config", "weights_only")
# What a schedule counts up itself; everything else of its state are settings.
_SCHEDULE_PROGRESS = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_milestones")


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a nested configuration; the parts of a list are numbered."""
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(config, list) and any(isinstance(value, dict) for value in config):
        for number, value in enumerate(config):
            yield from flatten(value, f"{prefix}.{number}")
    else:
        yield prefix, config


def stored_config(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that a checkpoint was made with; nothing of a run from Python."""
    states = checkpoint.get("callbacks", {}).items()
    texts = [state.get("config") for name, state in states if name.startswith("RunFolder")]
    return yaml.safe_load(texts[0]) if texts and texts[0] else {}


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, value in the checkpoint, value now) where both have the key and the values differ."""
    now = dict(flatten(current))
    return [
        (key, value, now[key])
        for key, value in flatten(stored)
        if key in now and now[key] != value and key.split(".")[0] not in _NOT_COMPARED
    ]


@rank_zero_only
def print_differences(checkpoint: dict[str, Any], current: dict[str, Any], path: Path | None) -> None:
    """Print from where a run continues and which settings are no longer those of the checkpoint."""
    print(f"continuing from {path} (step {int(checkpoint['global_step'])})")
    if changed := differences(stored_config(checkpoint), current):
        print("settings that differ from the checkpoint's (those given now are used):")
        for key, before, after in changed:
            print(f"  {key}: {before} -> {after}")


def explain_mismatch(error: BaseException, path: Path) -> str | None:
    """Return PyTorch's words about the first place in which a checkpoint and the model differ, as one line.

    None if the error is something else than a failed `load_state_dict`.
    """
    text = str(error.args[0]) if error.args else ""
    if "loading state_dict" not in text and "loaded state dict" not in text:
        return None
    heading, _, details = text.partition("\n")
    first = (details or heading).strip().splitlines()[0].rstrip(".")
    return (
        f"the checkpoint {path} is of another architecture: {first}. "
        "Give a checkpoint of the same model, or change the model's settings to those of that run"
    )


class ConfigWins(Callback):
    """Applies changed optimizer and schedule settings after their state has been restored.

    `Optimizer.load_state_dict` brings back the learning rate of the checkpoint, whatever the configuration
    says. The settings as the configuration gave them are kept in the checkpoint; of these, the ones that are
    different now are set again. A schedule's progress is kept: its current factor scales the new base
    learning rate, and where the factor is a function of the step, as in LambdaLR, it is that of the schedule
    as it is now (another trainer.max_steps is another slope).
    """

    def __init__(self) -> None:
        self._now: dict[str, list[Any]] = {}
        self._stored: dict[str, list[Any]] | None = None
        self._checkpoint: dict[str, Any] = {}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the checkpoint at hand until there are optimizers."""
        self._checkpoint = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down the fresh settings, before Lightning restores the state."""
        states = self._checkpoint.get("optimizer_states")
        if states is not None and len(states) != len(trainer.optimizers):
            raise UserError(
                f"the checkpoint holds the states of {len(states)} optimizers, and this run has "
                f"{len(trainer.optimizers)}: continue with the objective and the roles that it was saved with"
            )
        replace_foreign_states(states or [], trainer.optimizers)
        self._checkpoint = {}
        self._now = {
            "optimizers": [[_plain(group) for group in one.param_groups] for one in trainer.optimizers],
            "schedules": [_plain(vars(config.scheduler)) for config in trainer.lr_scheduler_configs],
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set again what has changed since the checkpoint."""
        stored, self._stored = self._stored, None
        if stored is None:
            return
        for optimizer, before, now in zip(trainer.optimizers, stored["optimizers"], self._now["optimizers"]):
            apply_groups(optimizer, before, now)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for schedule, before, now in zip(schedules, stored["schedules"], self._now["schedules"]):
            for name, value in now.items():
                if name not in _SCHEDULE_PROGRESS and name in before and before[name] != value:
                    setattr(schedule, name, value)
            if isinstance(schedule, LambdaLR):  # base rate x factor at the schedule's place
                groups = schedule.optimizer.param_groups
                for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                    group["lr"] = base * factor(schedule.last_epoch)
                schedule._last_lr = [group["lr"] for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the settings as the configuration gave them."""
        return self._now

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the settings of the checkpoint for `on_train_start`."""
        self._stored = state_dict or None


def replace_foreign_states(states: list[dict[str, Any]], optimizers: list[Optimizer]) -> None:
    """Put the fresh state of an optimizer in the place of a stored one that is of another kind, and say so.

    Kinds are told apart by the names of their settings. Learning rates stay where their schedule was.
    """
    for place, (stored, optimizer) in enumerate(zip(states, optimizers)):
        fresh = optimizer.state_dict()
        pairs = list(zip(stored["param_groups"], fresh["param_groups"]))
        if all(_settings_of(old) == _settings_of(new) for old, new in pairs):
            continue
        for old, new in pairs:
            new |= {name: old[name] for name in ("lr", "initial_lr") if name in old and name in new}
        states[place] = fresh
        rank_zero_warn(
            f"the checkpoint's optimizer {place + 1} is of another kind than {type(optimizer).__name__}, "
            "which starts anew; weights, steps and schedules go on"
        )


def _settings_of(group: dict[str, Any]) -> set[str]:
    return set(group) - {"params", "param_names", "initial_lr"}


def apply_groups(optimizer: Optimizer, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    """Set what differs in the settings of parameter groups, as they were given before and are now."""
    for group, old, new in zip(optimizer.param_groups, before, now):
        changed = {name: value for name, value in new.items() if old.get(name) != value}
        if "initial_lr" in new:  # a schedule is at work: keep its present factor
            changed.pop("lr", None)
        if "initial_lr" in changed and group.get("initial_lr"):
            group["lr"] = changed["initial_lr"] * group["lr"] / group["initial_lr"]
        group.update(changed)
    if any(group.get("fused") for group in optimizer.param_groups):
        # the fused kernel wants step counts where the weights are, and a checkpoint may be of another one
        optimizer.load_state_dict(optimizer.state_dict())


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are plain values (a checkpoint loads with weights_only=True)."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        if all(item is None or isinstance(item, (bool, int, float, str)) for item in items):
            plain[name] = list(items) if isinstance(value, (list, tuple)) else value
    return plain


def random_states() -> list[dict[str, Any]]:
    """Return the random states of Python, NumPy and torch, per process, as plain data and tensors."""
    version, numbers, gauss = random.getstate()
    # the global generator, which data sets and libraries use
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }
    return from_every_rank(state)


def restore_random_states(states: list[dict[str, Any]] | None, rank: int, processes: int) -> None:
    """Set this process's states, if there are any; another number of processes is told, they mean nothing."""
    if states is None:
        return
    if len(states) != processes:
        rank_zero_warn(
            f"the checkpoint is from {len(states)} processes and this run has {processes}: "
            "random states of dropout and the like start anew"
        )
        return
    state = states[rank]
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
