"""Checkpoints of a run: only complete ones, of whole student updates, readable with `weights_only=True`."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.random_states import random_states, restore_random_states
from callbacks.run_folder import run_dir
from lightning_modules.errors import UserError


class RunCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt`, `best.ckpt` and `step_<n>.ckpt` in the run folder.

    A step is a student update. Saved are: every `every_n_steps` steps, the last step, and, on Ctrl-C or
    SIGTERM, the step in progress once it is complete. An error between two steps (in a validation, say) is
    saved too; one inside a step leaves the last complete checkpoint, since some of the weights would be a
    step ahead of the others. Lightning's ModelCheckpoint treats manual optimization as a special case
    (skipped steps, warnings); this does not.

    Args:
        every_n_steps: Steps between checkpoints.
        monitor: Validation metric that decides `best.ckpt`. Where the metric is not logged there is no
            best.ckpt, with a warning; a run that ends before its first validation leaves its last checkpoint
            as best.ckpt, with a notice. None: no best.ckpt.
        mode: "min" or "max".
        keep_step_checkpoints: How many `step_<n>.ckpt` are kept: 0 none, n the newest n, -1 all of them.

    Raises:
        UserError: a setting out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        monitor: str | None = "val/frechet_distance",
        mode: str = "min",
        keep_step_checkpoints: int = 0,
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"RunCheckpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        if mode not in ("min", "max"):
            raise UserError(f"RunCheckpoint.mode is {mode!r}; it must be 'min' or 'max'")
        if keep_step_checkpoints < -1:
            raise UserError(
                f"RunCheckpoint.keep_step_checkpoints is {keep_step_checkpoints}; it must be -1 or more"
            )
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.keep_step_checkpoints = keep_step_checkpoints
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.saved_step = -1
        self._between_steps = False
        self._interrupted = False
        self._has_validated = False
        self._has_warned = False
        self._sigint_handler: Any = None
        self._random_states: list[dict[str, Any]] | None = None

    def folder(self, trainer: Trainer) -> Path:
        """Return the folder of the checkpoints."""
        return run_dir(trainer) / "checkpoints"

    # When

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore random states, watch for Ctrl-C, remove leftovers of a killed run."""
        if self._random_states is not None:
            restore_random_states(self._random_states, trainer)
            self._random_states = None
        if trainer.is_global_zero:
            for leftover in self.folder(trainer).glob("*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self._between_steps, self._interrupted, self._has_validated = True, False, False
        # a checkpoint named by its path brings the best score of another run, whose best.ckpt is not here
        if not trainer.strategy.broadcast((self.folder(trainer) / "best.ckpt").exists()):
            self.best_score = self.best_step = None
        if threading.current_thread() is threading.main_thread():
            self._sigint_handler = signal.signal(signal.SIGINT, self._on_sigint)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here to `on_train_batch_end` the weights are not those of a whole step."""
        self._between_steps = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save if it is time, if this is the last step, or if somebody wants the run to stop."""
        self._between_steps = True
        step = trainer.global_step
        stopping = self._is_asked_to_stop(trainer)
        is_last = 0 < trainer.max_steps <= step or trainer.should_stop
        if step != self.saved_step and (step % self.every_n_steps == 0 or is_last or stopping):
            self.save(trainer, keep=step % self.every_n_steps == 0)
        if stopping:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop in a validation during training, too."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._is_asked_to_stop(trainer):
            self._save_if_whole(trainer)
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.monitor is None:
            return
        self._has_validated = True
        value = trainer.callback_metrics.get(self.monitor)
        if value is None and not self._has_warned:
            self._has_warned = True
            names = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            rank_zero_warn(
                f"RunCheckpoint.monitor is {self.monitor!r}, which this validation does not log, so nothing "
                f"decides best.ckpt; its metrics are: {', '.join(names) or 'none'}"
            )
        if value is None or not math.isfinite(score := float(value)):
            return
        sign = 1 if self.mode == "min" else -1
        if self.best_score is None or sign * score < sign * self.best_score:
            self.best_score, self.best_step = score, trainer.global_step
            # last.ckpt too: it must know the best score, or a resumed run would take a worse one for the best
            self.save(trainer, best=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a run that ended otherwise than by its number of steps, or before its first validation."""
        if trainer.global_step != self.saved_step:
            self.save(trainer)
        undecided = self.best_score is None and not self._has_validated
        if self.monitor is not None and trainer.enable_validation and undecided:
            self._take_last_for_best(trainer)
        self._restore_sigint()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what is whole. Not in a run of several processes: the others may be anywhere."""
        if trainer.state.fn == "fit" and trainer.world_size == 1:
            self._save_if_whole(trainer)
        self._restore_sigint()

    def _save_if_whole(self, trainer: Trainer) -> None:
        if self._between_steps and 0 < trainer.global_step != self.saved_step:
            self.save(trainer)

    def _on_sigint(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        print("\nstopping after this step, which is then saved (Ctrl-C again: at once)", flush=True)

    def _restore_sigint(self) -> None:
        if self._sigint_handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._sigint_handler)
            self._sigint_handler = None

    def _is_asked_to_stop(self, trainer: Trainer) -> bool:
        asked = self._interrupted or trainer.received_sigterm
        # signals do not reach all processes in the same step, and saving takes all of them
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        return asked

    def _stop(self, trainer: Trainer) -> None:
        rank_zero_info(f"stopped after step {trainer.global_step}; --ckpt_path last continues from there")
        raise SIGTERMException if trainer.received_sigterm else KeyboardInterrupt

    # How

    def _take_last_for_best(self, trainer: Trainer) -> None:
        """Without a score: the first validation of a continued run decides anew."""
        last, best = (self.folder(trainer) / f"{name}.ckpt" for name in ("last", "best"))
        if trainer.is_global_zero:
            _give_name(last, best)
            rank_zero_info(
                "the run ended before its first validation (trainer.val_check_interval is "
                f"{trainer.val_check_interval}): best.ckpt is last.ckpt, not decided by {self.monitor}"
            )
        trainer.strategy.barrier("run-checkpoint-best")

    def save(self, trainer: Trainer, keep: bool = False, best: bool = False) -> None:
        """Write the present state once and give it its names; every process must call this.

        Args:
            trainer: The trainer, between two steps.
            keep: Also as `step_<n>.ckpt`, if such checkpoints are kept.
            best: Also as `best.ckpt`.
        """
        step = self.saved_step = trainer.global_step
        folder = self.folder(trainer)
        temporary = folder / "saving.tmp"
        trainer.save_checkpoint(temporary, weights_only=False)  # makes the folder, too
        if trainer.is_global_zero:
            names = ["last.ckpt"]
            names += [f"step_{step}.ckpt"] if keep and self.keep_step_checkpoints else []
            names += ["best.ckpt"] if best else []
            _publish(temporary, [folder / name for name in names])
            self._forget_old(folder)
        trainer.strategy.barrier("run-checkpoint")

    def _forget_old(self, folder: Path) -> None:
        if self.keep_step_checkpoints < 0:
            return
        paths = sorted(folder.glob("step_*.ckpt"), key=lambda path: int(path.stem.removeprefix("step_")))
        for path in paths[: len(paths) - self.keep_step_checkpoints]:
            _remove(path)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and the random states of all processes."""
        return {"best_score": self.best_score, "best_step": self.best_step, "random_states": random_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; the random states are set when training starts."""
        self.best_score = state_dict["best_score"]
        self.best_step = state_dict["best_step"]
        self._random_states = state_dict["random_states"]


def _publish(temporary: Path, targets: list[Path]) -> None:
    """Give a complete checkpoint its names, each atomically; a reader sees the old file or the new one."""
    _flush_to_disk(temporary)
    for target in targets[1:]:
        _give_name(temporary, target)
    _replace(temporary, targets[0])
    _flush_to_disk(targets[0].parent)


def _give_name(source: Path, target: Path) -> None:
    """Give a complete checkpoint another name, too."""
    staged = target.with_suffix(".link.tmp")
    _remove(staged)
    if source.is_dir():
        shutil.copytree(source, staged)
    else:
        try:
            os.link(source, staged)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, staged)
            _flush_to_disk(staged)
    _replace(staged, target)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():  # a folder (sharded checkpoint) cannot be replaced in one call
        aside = target.with_suffix(".old.tmp")
        _remove(aside)
        os.replace(target, aside)
        os.replace(source, target)
        _remove(aside)
    else:
        os.replace(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder and the files in it, so that a rename never precedes the content."""
    for item in [*path.iterdir(), path] if path.is_dir() and path.suffix == ".tmp" else [path]:
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
