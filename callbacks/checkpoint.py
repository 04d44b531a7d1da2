"""Checkpoints of a run: only complete ones, of whole student updates, readable with `weights_only=True`."""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

from callbacks.loggers import MetricsCSV, log_now
from callbacks.resume import random_states, restore_random_states
from callbacks.run_folder import REPLACED, numbered, run_dir
from callbacks.time_limit import StopRequests
from common.errors import UserError, first_line
from common.processes import from_every_rank
from lightning_modules.checkpoints import FORMAT, KEY, read
from reports.run_report import direction


class RunCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt`, `best.ckpt` and `step_<n>.ckpt` in the run folder.

    A step is a student update. Saved are: every `every_n_steps` steps, the last step, and, when the run is
    asked to stop (see `callbacks.time_limit`), the step in progress once it is complete. An error between two
    steps (in a validation, say) is saved too; one inside a step leaves the last complete checkpoint, since
    some of the weights would be a step ahead of the others. A validation that was interrupted, or due, is
    run again when the run continues. Lightning's ModelCheckpoint treats manual optimization as a special
    case (skipped steps, warnings); this does not.

    Args:
        every_n_steps: Steps between checkpoints.
        monitor: Validation metric that decides `best.ckpt`, or several: the first of them that a validation
            logs. Where none is logged there is no best.ckpt, with a warning; a run that ends before its first
            validation leaves its last checkpoint as best.ckpt, with a notice. None: no best.ckpt.
        mode: "min", "max", or "auto": what is better of a metric that the project knows.
        keep_step_checkpoints: How many `step_<n>.ckpt` are kept: 0 none, n the newest n, -1 all of them.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        monitor: str | list[str] | None = "val/frechet_distance",
        mode: str = "min",
        keep_step_checkpoints: int = 0,
    ) -> None:
        if every_n_steps < 1 or mode not in ("min", "max", "auto") or keep_step_checkpoints < -1:
            raise UserError(
                f"RunCheckpoint: every_n_steps is {every_n_steps} (at least 1), mode {mode!r} ('min', "
                f"'max' or 'auto'), keep_step_checkpoints {keep_step_checkpoints} (-1 or more)"
            )
        self.every_n_steps, self.keep_step_checkpoints = every_n_steps, keep_step_checkpoints
        self.monitors = [monitor] if isinstance(monitor, str) else monitor or []
        self.mode = mode
        if mode == "auto" and (unknown := [name for name in self.monitors if not direction(name)]):
            raise UserError(
                f"RunCheckpoint: nobody says whether a higher {unknown[0]} is better; set mode to min or max"
            )
        self.best_monitor: str | None = None  # of the best score
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.saved_step = self.validated_step = -1
        self.requests = StopRequests()
        self._between_steps = self._has_validated = self._has_warned = False
        self._random_states: list[dict[str, Any]] | None = None  # to be restored
        self._states_before_validation: list[dict[str, Any]] | None = None

    def folder(self, trainer: Trainer) -> Path:
        """Return the folder of the checkpoints."""
        return run_dir(trainer) / "checkpoints"

    # When

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write files in the plain way, unless the run has a way of its own."""
        strategy = trainer.strategy
        if type(getattr(strategy, "_checkpoint_io", None) or TorchCheckpointIO()) is TorchCheckpointIO:
            strategy.checkpoint_io = PlainFile()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore random states, watch for signals, remove leftovers, run a validation that was cut off."""
        restore_random_states(self._random_states, trainer.global_rank, trainer.world_size)
        if trainer.is_global_zero:
            remove_leftovers(self.folder(trainer))
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

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here to `on_train_batch_end` the weights are not those of a whole step."""
        self._between_steps = False
        # again, for what Lightning and callbacks may have drawn since training began
        restore_random_states(self._random_states, trainer.global_rank, trainer.world_size)
        self._random_states = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save if it is time, if this is the last step, or if somebody wants the run to stop.

        Where a validation follows the last step, that is saved after it: a run that has done all its steps
        is not resumed into a validation.
        """
        self._between_steps = True
        decided = self.requests.decide(trainer)
        is_last, is_due = _is_last(trainer), _validation_is_due(trainer)
        self._states_before_validation = random_states() if is_due else None
        if is_last and is_due:
            return
        if trainer.global_step != self.saved_step and (self._is_time(trainer) or is_last or decided):
            log_now(trainer, _tables(trainer))  # Lightning would after the checkpoint
            self.save(trainer)
        if decided:
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
        is_best = bool(self.monitors) and self._is_best(trainer)
        # last.ckpt too: it must know the best score, or a resumed run would take a worse one for the best,
        # and that this validation is done
        if is_best or step == self.saved_step or _is_last(trainer):
            self.save(trainer, best=is_best)

    def _is_best(self, trainer: Trainer) -> bool:
        """Whether this validation has the best score so far, which is noted."""
        self._has_validated = True
        monitor = next((name for name in self.monitors if name in trainer.callback_metrics), None)
        value = None if monitor is None else trainer.callback_metrics[monitor]
        if value is None and not self._has_warned:
            self._has_warned = True
            names = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            rank_zero_warn(
                f"RunCheckpoint.monitor is {' or '.join(map(repr, self.monitors))}, which this validation "
                f"does not log, so nothing decides best.ckpt; its metrics are: {', '.join(names) or 'none'}"
            )
        if value is None or not math.isfinite(score := float(value)):
            return False
        assert monitor is not None
        if self.best_monitor not in (monitor, None):
            rank_zero_info(f"best.ckpt is decided by {monitor} from here on, before by {self.best_monitor}")
            self.best_score = None
        is_lower_better = direction(monitor) < 0 if self.mode == "auto" else self.mode == "min"
        sign = 1 if is_lower_better else -1
        is_best = self.best_score is None or sign * score < sign * self.best_score
        if is_best:
            self.best_score, self.best_step, self.best_monitor = score, trainer.global_step, monitor
        return is_best

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a run that ended otherwise than by its number of steps, or before its first validation."""
        if trainer.global_step != self.saved_step:
            self.save(trainer)
        undecided = self.best_score is None and not self._has_validated
        if self.monitors and trainer.enable_validation and undecided:
            # without a score: the first validation of a continued run decides anew
            if trainer.is_global_zero:
                give_name(self.folder(trainer) / "last.ckpt", self.folder(trainer) / "best.ckpt")
            rank_zero_info(
                "the run ended before its first validation (trainer.val_check_interval is "
                f"{trainer.val_check_interval}): best.ckpt is last.ckpt, not decided by "
                f"{' or '.join(self.monitors)}"
            )
            trainer.strategy.barrier("run-checkpoint-best")
        self.requests.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what is whole. Not in a run of several processes: the others may be anywhere."""
        if trainer.state.fn == "fit" and trainer.world_size == 1:
            self._save_if_whole(trainer)
        self.requests.release()

    def _save_if_whole(self, trainer: Trainer) -> None:
        if self._between_steps and 0 < trainer.global_step != self.saved_step:
            self.save(trainer)

    # How

    def _is_time(self, trainer: Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0

    def save(self, trainer: Trainer, best: bool = False) -> None:
        """Write the present state once and give it its names, `best.ckpt` among them where it is the best.

        Every process must call this, between two steps. Where the file system refuses, what was saved before
        is as it was, and a UserError says so.
        """
        self.saved_step, before, step = trainer.global_step, self.saved_step, trainer.global_step
        folder = self.folder(trainer)
        names = ["last", "best"] if best else ["last"]
        names += [f"step_{step}"] if self.keep_step_checkpoints and self._is_time(trainer) else []
        for table in _tables(trainer):  # the rows up to here must not be lost
            table.flush()
        failure = None
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False) | {KEY: FORMAT}
        try:
            trainer.strategy.save_checkpoint(checkpoint, folder / "saving.tmp")  # makes the folder, too
            if trainer.is_global_zero:
                publish(folder / "saving.tmp", [folder / f"{name}.ckpt" for name in names])
                if self.keep_step_checkpoints >= 0:
                    steps = numbered(folder, r"step_(\d+)\.ckpt")
                    for path in steps[: len(steps) - self.keep_step_checkpoints]:
                        remove(path)
        except (OSError, RuntimeError, CheckpointException) as error:  # torch wraps what the file raises
            if "DataLoader worker" in str(error):  # it is raised wherever the run happens to be
                raise
            failure = why_not_written(root_cause(error))
        # raised by one process alone it would leave the others waiting
        if failure := next(filter(None, from_every_rank(failure)), None):
            if trainer.is_global_zero:
                remove(folder / "saving.tmp")
            kept = f"that of step {before} is as it was" if before > 0 else "earlier ones are untouched"
            raise UserError(
                f"the checkpoint of step {step} cannot be written into {folder}: {failure}; {kept}. Then "
                "continue with --ckpt_path last"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, the last validation, the random states of all processes.

        In a validation the random states are those before it, since a resumed run begins it anew.
        """
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "best_monitor": self.best_monitor,
            "validated_step": self.validated_step,
            "random_states": self._states_before_validation or random_states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; the random states are set when training starts."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
        self.best_monitor = state_dict.get("best_monitor")
        self._random_states = state_dict["random_states"]
        self.validated_step = state_dict.get("validated_step", -1)


def _tables(trainer: Trainer) -> list[MetricsCSV]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]


def _is_last(trainer: Trainer) -> bool:
    return 0 < trainer.max_steps <= trainer.global_step or trainer.should_stop


def _validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the step just done, by the number of batches (the only way to set it)."""
    every, is_on = trainer.val_check_batch, trainer.enable_validation
    if not is_on or trainer.check_val_every_n_epoch is not None or not isinstance(every, int) or every < 1:
        return False
    return (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % every == 0


# Files: written to a temporary name, then given their names, each in one step


class PlainFile(TorchCheckpointIO):
    """Writes a checkpoint straight to its file.

    Lightning's own copies the whole checkpoint in memory, then writes it to the system's folder for temporary
    files, where a killed run leaves it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file, and make its folder."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Read the file, or the folder of shards that another run wrote, whole."""
        content: dict[str, Any] = read(Path(path))
        return content


def root_cause(error: BaseException) -> BaseException:
    """Return the file system's error behind another one, or that itself."""
    if isinstance(error, CheckpointException):  # of shards: any process's, raised on all of them
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def why_not_written(error: BaseException) -> str:
    """What the file system said, and what to do about it."""
    advice = {
        **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
        **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions"),
        **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "the folder has gone: bring it back"),
        errno.EIO: "the disk reports a fault: have it checked before going on",
    }.get(getattr(error, "errno", 0))
    return first_line(error) + (f"; {advice}" if advice else "")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing; a folder that was being replaced gets its name back."""
    for aside in folder.glob(f"*{REPLACED}"):
        target = folder / f"{aside.name.removesuffix(REPLACED)}.ckpt"
        if not target.exists():
            os.replace(aside, target)
    for leftover in folder.glob("*.tmp"):
        remove(leftover)


def publish(temporary: Path, targets: list[Path]) -> None:
    """Give a complete checkpoint its names, each atomically; a reader sees the old file or the new one."""
    _flush_to_disk(temporary)
    for target in targets[1:]:
        give_name(temporary, target)
    _replace(temporary, targets[0])
    _flush_to_disk(targets[0].parent)


def give_name(source: Path, target: Path) -> None:
    """Give a complete checkpoint another name, too."""
    staged = target.with_suffix(".link.tmp")
    remove(staged)
    try:
        os.link(source, staged)
    except OSError:  # a folder, or a file system without hard links
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, staged)
        _flush_to_disk(staged)
    _replace(staged, target)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir() or (source.is_dir() and target.exists()):  # folders can't be replaced in one call
        aside = target.with_suffix(REPLACED)
        remove(aside)
        os.replace(target, aside)
        os.replace(source, target)
        remove(aside)
    else:
        os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
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
