"""What happens when a run continues: the configuration wins over the checkpoint, and what differs is said."""

from __future__ import annotations

import random
import re
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

from common.processes import from_every_rank

_SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)"
)
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
    """Return the configuration a checkpoint was made with; where it holds none, its hyperparameters."""
    for name, state in checkpoint.get("callbacks", {}).items():
        if name.startswith("RunFolder") and isinstance(state, dict) and state.get("config"):
            return yaml.safe_load(state["config"])
    hyper_parameters = dict(checkpoint.get("hyper_parameters", {}))
    hyper_parameters.pop("_instantiator", None)
    class_path = hyper_parameters.pop("_class_path", None)
    if not hyper_parameters:
        return {}
    model: dict[str, Any] = {"init_args": hyper_parameters}
    return {"model": {"class_path": class_path, **model} if class_path else model}


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
    """Return one message naming the first parameter in which a checkpoint and the model differ.

    None if the error is something else than a failed `load_state_dict`.
    """
    text = str(error.args[0]) if error.args else ""
    advice = "give a checkpoint of the same model, or change the model's settings to those of that run"
    start = f"the checkpoint {path} is of another architecture:"
    if sized := _SIZE_MISMATCH.search(text):
        return f"{start} {sized[1]} has shape {sized[2]} in it and {sized[3]} in the model; {advice}"
    if missing := re.search(r'Missing key\(s\) in state_dict: "([^"]+)"', text):
        return f"{start} it has no {missing[1]}; {advice}"
    if unexpected := re.search(r'Unexpected key\(s\) in state_dict: "([^"]+)"', text):
        return f"{start} the model has no {unexpected[1]}; {advice}"
    if "loaded state dict" in text and "parameter group" in text:
        return f"{start} its optimizer has other parameters than the model's; {advice}"
    return None


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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down the fresh settings, before Lightning restores the state."""
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._now = {
            "optimizers": [
                [_plain(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers
            ],
            "schedules": [_plain(vars(schedule)) for schedule in schedules],
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set again what has changed since the checkpoint."""
        stored, self._stored = self._stored, None
        if stored is None:
            return
        for optimizer, before, now in zip(trainer.optimizers, stored["optimizers"], self._now["optimizers"]):
            _apply_groups(optimizer, before, now)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for schedule, before, now in zip(schedules, stored["schedules"], self._now["schedules"]):
            for name, value in now.items():
                if name not in _SCHEDULE_PROGRESS and name in before and before[name] != value:
                    setattr(schedule, name, value)
            if isinstance(schedule, LambdaLR):
                _apply_factors(schedule)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings as the configuration gave them."""
        return self._now

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the settings of the checkpoint for `on_train_start`."""
        self._stored = state_dict or None


def _apply_groups(optimizer: Optimizer, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    for group, old, new in zip(optimizer.param_groups, before, now):
        for name, value in new.items():
            if old.get(name) == value or name == "lr":
                continue
            if name == "initial_lr" and group.get(
                "initial_lr"
            ):  # a schedule is at work: keep its present factor
                group["lr"] = value * group["lr"] / group["initial_lr"]
            group[name] = value
        if "initial_lr" not in new and old.get("lr") != new["lr"]:
            group["lr"] = new["lr"]
        if group.get("fused"):
            _steps_to_weights(optimizer, group)


def _steps_to_weights(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Put step counts where the weights are, in float32: a fused kernel takes no others.

    Other kernels keep them on the CPU, and a checkpoint may come from one.
    """
    for weight in group["params"]:
        state = optimizer.state.get(weight, {})
        if isinstance(step := state.get("step"), torch.Tensor):
            state["step"] = step.to(device=weight.device, dtype=torch.float32)


def _apply_factors(schedule: LambdaLR) -> None:
    """Set the learning rates to base rate x factor at the schedule's place, as its next step would."""
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        rate = base * factor(schedule.last_epoch)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    schedule._last_lr = [group["lr"] for group in groups]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are plain values (a checkpoint loads with weights_only=True)."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        items = value if isinstance(value, (list, tuple)) else [value]
        if all(item is None or isinstance(item, (bool, int, float, str)) for item in items):
            plain[name] = list(items) if isinstance(value, (list, tuple)) else value
    return plain


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
    return from_every_rank(state)


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
