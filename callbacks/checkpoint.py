"""Checkpoints of a run: only complete ones, of whole student updates, readable with `weights_only=True`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.checkpoint_files import PlainFile, give_name, publish, remove, remove_leftovers, root_cause
from callbacks.loggers import MetricsCSV, log_now
from callbacks.resume import random_states, restore_random_states
from callbacks.run_folder import run_dir
from callbacks.stopping import StopRequests
from common.errors import UserError, first_line
from lightning_modules.checkpoints import FORMAT, KEY


class RunCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt`, `best.ckpt` and `step_<n>.ckpt` in the run folder.

    A step is a student update. Saved are: every `every_n_steps` steps, the last step, and, when the run is
    asked to stop (see `callbacks.stopping`), the step in progress once it is complete. An error between two
    steps (in a validation, say) is saved too; one inside a step leaves the last complete checkpoint, since
    some of the weights would be a step ahead of the others. A validation that was interrupted, or due, is
    run again when the run continues. Lightning's ModelCheckpoint treats manual optimization as a special
    case (skipped steps, warnings); this does not.

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
        if every_n_steps < 1 or mode not in ("min", "max") or keep_step_checkpoints < -1:
            raise UserError(
                f"RunCheckpoint: every_n_steps is {every_n_steps} (at least 1), mode {mode!r} ('min' or "
                f"'max'), keep_step_checkpoints {keep_step_checkpoints} (-1 or more)"
            )
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.keep_step_checkpoints = keep_step_checkpoints
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.saved_step = self.validated_step = -1
        self.requests = StopRequests()
        self._between_steps = False
        self._has_validated = False
        self._has_warned = False
        self._random_states: list[dict[str, Any]] | None = None
        self._states_before_validation: list[dict[str, Any]] | None = None
        self._table: MetricsCSV | None = None

    def folder(self, trainer: Trainer) -> Path:
        """Return the folder of the checkpoints."""
        return run_dir(trainer) / "checkpoints"

    # When

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write files in the plain way, unless the run has a way of its own; find metrics.csv."""
        strategy = trainer.strategy
        if type(getattr(strategy, "_checkpoint_io", None) or TorchCheckpointIO()) is TorchCheckpointIO:
            strategy.checkpoint_io = PlainFile()
        tables = [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
        self._table = tables[0] if tables else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore random states, watch for signals, remove leftovers, run a validation that was cut off."""
        self._restore_random_states(trainer, again=True)
        if trainer.is_global_zero:
            remove_leftovers(self.folder(trainer))
        if self._table is not None:
            self._table.open()
        self._between_steps, self._has_validated = True, False
        # a checkpoint named by its path brings the best score of another run, whose best.ckpt is not here
        if not trainer.strategy.broadcast((self.folder(trainer) / "best.ckpt").exists()):
            self.best_score = self.best_step = None
        self.requests.watch(trainer)
        if 0 < trainer.global_step != self.validated_step and _validation_is_due(trainer):
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        """Lightning takes a checkpoint written before a validation for one written after it."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        self._states_before_validation = random_states()
        trainer.validating = True
        loop.run()
        loop.reset_restart_stage()
        trainer.training = True
        self._random_states = random_states()  # Lightning draws a number when it now skips the validation

    def _restore_random_states(self, trainer: Trainer, again: bool = False) -> None:
        """`again`: also at the first batch, for what Lightning and callbacks may draw until then."""
        if self._random_states is not None:
            restore_random_states(self._random_states, trainer)
            self._random_states = self._random_states if again else None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here to `on_train_batch_end` the weights are not those of a whole step."""
        self._between_steps = False
        self._restore_random_states(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save if it is time, if this is the last step, or if somebody wants the run to stop.

        Where a validation follows the last step, that is saved after it: a run that has done all its steps
        is not resumed into a validation.
        """
        self._between_steps = True
        step = trainer.global_step
        decided = self.requests.decide(trainer)
        is_last, is_due = _is_last(trainer), _validation_is_due(trainer)
        self._states_before_validation = random_states() if is_due else None
        waits = is_last and is_due
        if step != self.saved_step and not waits and (step % self.every_n_steps == 0 or is_last or decided):
            if self._table is not None:
                log_now(trainer, [self._table])  # so that the checkpoint can hold this step's row
            self.save(trainer, keep=step % self.every_n_steps == 0)
        if decided and not waits:
            log_now(trainer, trainer.loggers)  # Lightning will not get to it
            self.requests.leave(trainer, decided, self.saved_step)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop in a validation during training, too."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if decided := self.requests.decide(trainer):
            if not _is_last(trainer):
                self._save_if_whole(trainer)
            self.requests.leave(trainer, decided, self.saved_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.validated_step = step = trainer.global_step
        self._states_before_validation = None
        is_best = self.monitor is not None and self._is_best(trainer)
        # last.ckpt too: it must know the best score, or a resumed run would take a worse one for the best,
        # and that this validation is done
        if is_best or step == self.saved_step or _is_last(trainer):
            self.save(trainer, keep=step % self.every_n_steps == 0, best=is_best)

    def _is_best(self, trainer: Trainer) -> bool:
        """Whether this validation has the best score so far, which is noted."""
        self._has_validated = True
        value = trainer.callback_metrics.get(str(self.monitor))
        if value is None and not self._has_warned:
            self._has_warned = True
            names = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            rank_zero_warn(
                f"RunCheckpoint.monitor is {self.monitor!r}, which this validation does not log, so nothing "
                f"decides best.ckpt; its metrics are: {', '.join(names) or 'none'}"
            )
        if value is None or not math.isfinite(score := float(value)):
            return False
        sign = 1 if self.mode == "min" else -1
        if self.best_score is not None and sign * score >= sign * self.best_score:
            return False
        self.best_score, self.best_step = score, trainer.global_step
        return True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a run that ended otherwise than by its number of steps, or before its first validation."""
        if trainer.global_step != self.saved_step:
            self.save(trainer)
        undecided = self.best_score is None and not self._has_validated
        if self.monitor is not None and trainer.enable_validation and undecided:
            self._take_last_for_best(trainer)
        self.requests.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what is whole. Not in a run of several processes: the others may be anywhere."""
        if trainer.state.fn == "fit" and trainer.world_size == 1:
            self._save_if_whole(trainer)
        self.requests.release()

    def _save_if_whole(self, trainer: Trainer) -> None:
        if self._between_steps and 0 < trainer.global_step != self.saved_step:
            self.save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """metrics.csv of a run that had done all its steps: the row that waited in the checkpoint."""
        if self._table is not None:
            self._table.open()

    # How

    def _take_last_for_best(self, trainer: Trainer) -> None:
        """Without a score: the first validation of a continued run decides anew."""
        last, best = (self.folder(trainer) / f"{name}.ckpt" for name in ("last", "best"))
        if trainer.is_global_zero:
            give_name(last, best)
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
        before, step = self.saved_step, trainer.global_step
        self.saved_step = step
        folder = self.folder(trainer)
        temporary = folder / "saving.tmp"
        trainer.save_checkpoint(temporary, weights_only=False)  # makes the folder, too
        failure = None
        if trainer.is_global_zero:
            names = ["last", *([f"step_{step}"] if keep and self.keep_step_checkpoints else [])]
            names += ["best"] if best else []
            failure = self._publish(trainer, temporary, [folder / f"{name}.ckpt" for name in names])
        if failure := trainer.strategy.broadcast(failure):
            kept = f"that of step {before} is as it was" if before > 0 else "earlier ones are untouched"
            raise UserError(
                f"the checkpoint of step {step} cannot be written into {folder}: {failure}; {kept}. Make "
                "room and continue with --ckpt_path last"
            )

    def _publish(self, trainer: Trainer, temporary: Path, targets: list[Path]) -> str | None:
        """Give the checkpoint its names; return what the file system objects to, if anything."""
        try:
            strategy = trainer.strategy
            if error := getattr(strategy, "save_error", None) or getattr(
                strategy.checkpoint_io, "error", None
            ):
                raise error
            publish(temporary, targets)
            self._forget_old(targets[0].parent)
        except (OSError, RuntimeError) as error:
            remove(temporary)
            return first_line(root_cause(error))
        return None

    def _forget_old(self, folder: Path) -> None:
        if self.keep_step_checkpoints < 0:
            return
        paths = sorted(folder.glob("step_*.ckpt"), key=lambda path: int(path.stem.removeprefix("step_")))
        for path in paths[: len(paths) - self.keep_step_checkpoints]:
            remove(path)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the format."""
        checkpoint[KEY] = FORMAT

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, the last validation, the random states of all processes, the waiting row.

        In a validation the random states are those before it, since a resumed run begins it anew.
        """
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "validated_step": self.validated_step,
            "random_states": self._states_before_validation or random_states(),
            "row": self._table.waiting() if self._table is not None else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; the random states are set when training starts."""
        self.best_score = state_dict["best_score"]
        self.best_step = state_dict["best_step"]
        self._random_states = state_dict["random_states"]
        self.validated_step = state_dict.get("validated_step", -1)
        if self._table is not None and self._table.resume_step is not None:
            self._table.restore(state_dict.get("row", {}))


def _is_last(trainer: Trainer) -> bool:
    return 0 < trainer.max_steps <= trainer.global_step or trainer.should_stop


def _validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the step just done, by the number of batches (the only way to set it)."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or trainer.check_val_every_n_epoch is not None:
        return False
    if not isinstance(every, int) or every < 1:
        return False
    return (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % every == 0
