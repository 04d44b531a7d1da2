"""A progress bar whose numbers mean something: student updates done and to do, losses, speed, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_ENDLESS_FORMAT = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"


# What is shown where it is logged, beside what modules log for the bar: logged name -> short one.
_BEFORE = {"counts/images_seen": "images"}
_AFTER = {
    "objective/guidance_scale": "κ",
    "throughput/images_per_second": "images/s",
    "memory/peak_gib": "GiB",
}


class StepProgressBar(ProgressBar):
    """tqdm bar over `trainer.max_steps` student updates; other loops get a short-lived bar each.

    The number starts at the checkpoint's step in a resumed run, speed and time left count this session's
    steps only. Behind it stand images seen, what modules log with `prog_bar=True` (both losses), κ, images a
    second and peak memory, as far as they are logged.

    Args:
        refresh_seconds: Least time between two drawings.
    """

    def __init__(self, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._enabled = True
        self._train_bar: tqdm[Any] | None = None
        self._side_bar: tqdm[Any] | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether it draws; `LightningModule.print` asks."""
        return self._enabled

    def disable(self) -> None:
        """Draw nothing (Lightning calls it on all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._enabled:
            tqdm.write(" ".join(str(part) for part in args), file=sys.stderr)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what modules log for the bar, as short text; without version number and `_step` endings."""
        logged: dict[str, Any] = dict(trainer.callback_metrics)
        values = {short: logged[name] for name, short in _BEFORE.items() if name in logged}
        values |= {name.removesuffix("_step"): value for name, value in trainer.progress_bar_metrics.items()}
        values |= {short: logged[name] for name, short in _AFTER.items() if name in logged}
        return {name: _short(value) for name, value in values.items()}

    def _bar(self, what: str, total: float | None, done: int = 0, leave: bool = True) -> tqdm[Any]:
        # a file or a pipe cannot be drawn over: there a line now and then
        pause = self.refresh_seconds if sys.stderr.isatty() else max(self.refresh_seconds, 20.0)
        known = None if total is None or total == float("inf") or total < 0 else int(total)
        return tqdm(
            desc=what,
            total=known,
            initial=done,
            leave=leave,
            unit="step" if leave else "batch",
            bar_format=_FORMAT if known is not None else _ENDLESS_FORMAT,
            mininterval=pause,
            maxinterval=max(pause, 10.0),
            smoothing=0.05,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not self._enabled,
        )

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step the run starts from."""
        total: float = trainer.max_steps
        if (
            total < 0 and trainer.max_epochs and trainer.max_epochs > 0
        ):  # plain epochs: as many steps as they hold
            total = trainer.max_epochs * trainer.num_training_batches / trainer.accumulate_grad_batches
        self._train_bar = self._bar("Training", total, done=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move to the number of updates done (a batch whose update was skipped does not count)."""
        if (bar := self._train_bar) is None:
            return
        if trainer.global_step > bar.n:
            # reading the values waits for the GPU
            if not bar.disable and time.time() - bar.last_print_t >= bar.mininterval:
                bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(trainer.global_step - bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar, with its last values, on the screen."""
        self._close_all(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bar where it stopped, so that messages stand on lines of their own."""
        self._close_all(trainer, pl_module)

    def _close_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_side()
        if self._train_bar is not None:
            self._train_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=True)
            self._train_bar.close()
            self._train_bar = None

    # Validation, test, predict

    def _open_side(self, what: str, counts: float | list[int | float]) -> None:
        total = sum(counts) if isinstance(counts, list) else counts
        self._side_bar = self._bar(what, total, leave=False)

    def _advance_side(self) -> None:
        if self._side_bar is not None:
            self._side_bar.update(1)

    def _close_side(self) -> None:
        if self._side_bar is not None:
            self._side_bar.close()
            self._side_bar = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar over the batches of the validation."""
        if not trainer.sanity_checking:
            self._open_side("Evaluating", trainer.num_val_batches)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count a batch."""
        self._advance_side()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close it and show the new values; the time of a validation is no part of the speed of training."""
        self._close_side()
        if (bar := self._train_bar) is not None:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=True)
            bar.last_print_t = time.time()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar over the batches of the test."""
        self._open_side("Testing", trainer.num_test_batches)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count a batch."""
        self._advance_side()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close it."""
        self._close_side()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar over the batches of the prediction."""
        self._open_side("Predicting", trainer.num_predict_batches)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count a batch."""
        self._advance_side()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close it."""
        self._close_side()


def _short(value: Any) -> str:
    number = value.item() if isinstance(value, Tensor) else value
    if not isinstance(number, float):
        return str(number)
    return f"{number:.0f}" if number.is_integer() and abs(number) < 1e15 else f"{number:.4g}"
