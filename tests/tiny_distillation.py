"""Distillations of the tiny Stable Diffusion, from Python and from the command line, for tests."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor, nn

from datamodules.prompts import PromptDataModule
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.networks.lora import LoraSettings
from lightning_modules.objectives.base import Networks, Objective, StudentSample, Terms
from lightning_modules.objectives.swiftbrush import SwiftBrush
from lightning_modules.optimization import FakeScoreSettings, RoleOptimization

PROMPTS = [f"a {color} {thing}" for color in ("red", "blue", "green") for thing in ("cat", "dog", "cup")]
LORA = LoraSettings(rank=2, alpha=4.0, targets=["to_q", "to_v"])


class Hooks(L.Callback):
    """Calls `on_start` when training starts and `after_step` after each batch, with the module."""

    def __init__(
        self, on_start: Callable[..., Any] | None = None, after_step: Callable[..., Any] | None = None
    ):
        self.on_start, self.after_step = on_start, after_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on_start is not None:
            self.on_start(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.after_step is not None:
            self.after_step(pl_module)


def watch_updates(module: OneStepDistillation, watcher: Callable[[str, Callable[[], bool]], bool]) -> None:
    """Put `watcher(role, update)` in place of every optimizer update; it must call `update()`."""
    update = module._update

    def watched(role: str) -> bool:
        return watcher(role, lambda: update(role))

    module._update = watched  # type: ignore[method-assign]


def watch_batches(module: OneStepDistillation) -> list[list[str]]:
    """The prompts of every batch to come, as they come."""
    train, seen = module.training_step, list[list[str]]()

    def watched(batch: dict[str, Any], batch_idx: int) -> None:
        seen.append(batch["prompts"])
        train(batch, batch_idx)

    module.training_step = watched  # type: ignore[method-assign]
    return seen


class Pull(Objective):
    """Draws the student's latents to one value, by way of a trained number of its own."""

    def __init__(self, target: float = 0.0) -> None:
        super().__init__()
        self.target = target
        self.own = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.own.weight)

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        touched = self.own(torch.ones(1, 1)).sum()  # a way into the objective's network, never to be taken
        return Terms({"near": (sample.x0 - self.target).square().mean(), "own": touched * sample.x0.mean()})

    def fake_score_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        assert not sample.x0.requires_grad
        t = torch.full((len(sample.x0),), 100)
        prediction = networks.fake_score(sample.x0, t, sample.condition).epsilon
        return Terms({"fit": prediction.square().mean(), "own": (self.own.weight - 1).square().sum()})

    def parameters_of(self, role: str) -> list[dict[str, Any]]:
        return [{"params": [*self.own.parameters()], "lr": 0.25}] if role == "fake_score" else []


def adam(learning_rate: float = 1e-2, **settings: Any) -> RoleOptimization:
    """Adam for one role."""
    return RoleOptimization(functools.partial(torch.optim.Adam, lr=learning_rate), **settings)


def distillation(teacher: Path, objective: Objective | None = None, **settings: Any) -> OneStepDistillation:
    """A module with a fast fake score (so that the student's gradient is not small) and a short EMA.

    ``lora``: the fake score's adapter, null for a full copy.
    """
    lora = settings.pop("lora", LORA)
    defaults: dict[str, Any] = {
        "student": adam(1e-3), "fake_score": adam(1e-2), "teacher": str(teacher), "start_timestep": 625,
        "ema_decay": 0.5,
    }  # fmt: skip
    settings = defaults | settings
    if settings["fake_score"] is not None:
        settings["fake_score"] = FakeScoreSettings(**vars(settings["fake_score"]), lora=lora)
    return OneStepDistillation(objective or SwiftBrush(dropout_per_sample=True), **settings)


def prompt_data(batch_size: int = 4, micro_batch_size: int | None = None) -> PromptDataModule:
    """Nine prompts, of which the first two are evaluated, too."""
    return PromptDataModule(
        PROMPTS, batch_size=batch_size, micro_batch_size=micro_batch_size, eval_captions=PROMPTS, eval_size=2
    )


def trainer(folder: Path, steps: int, callbacks: Sequence[L.Callback] = (), **settings: Any) -> L.Trainer:
    """A quiet trainer without validation and checkpoints."""
    defaults = {
        "max_steps": steps, "max_epochs": -1, "accelerator": "cpu", "limit_val_batches": 0, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "check_val_every_n_epoch": None, "default_root_dir": folder,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **(defaults | settings))


def fit(
    module: OneStepDistillation, folder: Path, steps: int, *callbacks: L.Callback, batch_size: int = 4,
    micro_batch_size: int | None = None, **settings: Any,
) -> L.Trainer:  # fmt: skip
    """Train for some student updates; the same weights whatever ran before."""
    L.seed_everything(0, verbose=False)
    run = trainer(folder, steps, callbacks, **settings)
    run.fit(module, prompt_data(batch_size, micro_batch_size))
    return run


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that are no longer bit for bit the same."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def reached(module: torch.nn.Module) -> set[str]:
    """First words of the names of the parameters with a gradient that is not zero."""
    return {n.partition(".")[0] for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def write_config(path: Path, teacher: Path, **changes: Any) -> Path:
    """A YAML file for `fit`; a change's name is a dotted key with two underscores for a dot."""
    rate = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    model = {
        "teacher": str(teacher),
        "start_timestep": 625,
        "objective": {"class_path": "lightning_modules.objectives.swiftbrush.SwiftBrush"},
        "student": {"optimizer": rate, "warmup_steps": 3},
        "fake_score": {
            "optimizer": rate,
            "warmup_steps": 3,
            "lora": {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v"]},
        },
        "ema_decay": 0.5,
    }
    prompts = {"prompts": PROMPTS, "batch_size": 4, "eval_captions": PROMPTS, "eval_size": 2}
    config: dict[str, Any] = {
        "seed_everything": 0,
        "model": {"class_path": "lightning_modules.distillation.OneStepDistillation", "init_args": model},
        "data": {"class_path": "datamodules.prompts.PromptDataModule", "init_args": prompts},
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "limit_val_batches": 0, "log_every_n_steps": 1,
            "enable_progress_bar": False, "default_root_dir": str(path.parent / "runs"),
        },
    }  # fmt: skip
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(yaml.safe_dump(config))
    return path
