"""What a distillation adds to Lightning's checkpoints, and how it takes it back."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_modules.networks.lora import StudentBase
from lightning_modules.networks.student import architecture
from lightning_modules.networks.weights import check_fit

if TYPE_CHECKING:
    from lightning_modules.distillation import OneStepDistillation

COUNTERS = ("student_steps", "fake_score_steps", "skipped_updates")


def add_to_checkpoint(module: OneStepDistillation, checkpoint: dict[str, Any]) -> None:
    """Add the moving average, the counters and what generate and export need to rebuild the student."""
    assert module.student is not None
    checkpoint["ema"] = module.ema.state_dict() if module.ema is not None else None
    checkpoint["counters"] = {name: getattr(module, name) for name in COUNTERS}
    checkpoint["one_step"] = {
        "method": type(module.objective).__name__,
        "teacher": module.teacher_path,
        "start_timestep": module.start_timestep,
        "architecture": architecture(module.student),
        "weights": module.ema is not None,
        "student_steps": module.student_steps,
    }
    if module.student_init is not None:
        checkpoint["one_step"]["student_init"] = module.student_init
    if module.pair_regression is not None:
        checkpoint["one_step"]["trained_on"] = module.pair_regression.trained_on
    if module.student_lora is not None and module.student_base is not None:
        checkpoint["one_step"]["student_lora"] = asdict(module.student_lora)
        checkpoint["one_step"]["student_base"] = asdict(module.student_base)


def take_from_checkpoint(module: OneStepDistillation, checkpoint: dict[str, Any]) -> None:
    """Take over average and counters. Without an average in it, one starts from the student's weights.

    Raises:
        UserError: the checkpoint is of another model, or of an adapter on other weights.
    """
    # sharded checkpoints have no weights here: the strategy has loaded them already
    if "state_dict" in checkpoint:
        check_fit(checkpoint["state_dict"], module.state_dict())
    if module.student_base is not None and "student_base" in (stored := checkpoint.get("one_step", {})):
        StudentBase(**stored["student_base"]).check(module.student_base.hash, "the checkpoint")
    for name, value in checkpoint.get("counters", {}).items():
        setattr(module, name, value)
    if module.ema is None:
        return
    if checkpoint.get("ema"):
        module.ema.load_state_dict(checkpoint["ema"])
    else:
        weights = checkpoint.get("state_dict") or module.state_dict()
        student = {k.removeprefix("student."): v for k, v in weights.items()}
        module.ema.shadow = {name: student[name].float().clone() for name in module.ema.shadow}
