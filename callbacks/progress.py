"""A progress bar whose numbers mean something: student updates done and to do, losses, speed, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from tqdm import tqdm

_SHORT = {"objective/guidance_scale": "κ", "counts/images_seen": "images",
          "throughput/images_per_second": "images/s", "memory/peak_gib": "GiB"}  # fmt: skip
"""What is shown where it is logged, behind what modules log for the bar: logged name -> short one."""


class StepProgressBar(TQDMProgressBar):
    """Lightning's bar over `trainer.max_steps` student updates; other loops get a short-lived bar each.

    The number starts at the checkpoint's step in a resumed run, speed and time left count this session's
    steps only. Behind it stand what modules log with `prog_bar=True` (both losses), κ, images seen, images a
    second and peak memory, as far as they are logged.

    Args:
        refresh_seconds: Least time between two drawings; in a file or a pipe, which cannot be drawn over, it
            is at least 20 s.
    """

    def __init__(self, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        self._pause = refresh_seconds if sys.stderr.isatty() else max(refresh_seconds, 20.0)
        self._drawn = 0.0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self.is_enabled:
            tqdm.write(" ".join(str(part) for part in args), file=sys.stderr)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what modules log for the bar, as short text; without version number and `_step` endings."""
        logged: dict[str, Any] = dict(trainer.callback_metrics)
        values: dict[str, Any] = {
            name.removesuffix("_step"): value for name, value in trainer.progress_bar_metrics.items()
        }
        values |= {short: logged[name] for name, short in _SHORT.items() if name in logged}
        return {name: _short(value) for name, value in values.items()}

    def _bar(self, what: str, total: float, done: int = 0, leave: bool = False) -> Tqdm:
        self._drawn = time.monotonic()
        return Tqdm(
            desc=what, total=int(total) if 0 <= total < float("inf") else None, initial=done, leave=leave,
            unit="step" if leave else "batch", mininterval=self._pause, maxinterval=max(self._pause, 10.0),
            smoothing=0.05, dynamic_ncols=True, file=sys.stderr, disable=self.is_disabled,
        )  # fmt: skip

    def init_train_tqdm(self) -> Tqdm:
        trainer, total = self.trainer, float(self.trainer.max_steps)
        if total < 0 and trainer.max_epochs and trainer.max_epochs > 0:  # as many steps as the epochs hold
            total = trainer.max_epochs * trainer.num_training_batches / trainer.accumulate_grad_batches
        return self._bar("Training", total, done=trainer.global_step, leave=True)

    def init_validation_tqdm(self) -> Tqdm:
        return self._bar("Evaluating", sum(self.trainer.num_val_batches))

    def init_test_tqdm(self) -> Tqdm:
        return self._bar("Testing", sum(self.trainer.num_test_batches))

    def init_predict_tqdm(self) -> Tqdm:
        return self._bar("Predicting", sum(self.trainer.num_predict_batches))

    def _should_update(self, current: int, total: int | float) -> bool:
        """Whether a bar of batches is drawn: time decides, where Lightning counts batches."""
        is_due = self.is_enabled and time.monotonic() - self._drawn >= self._pause
        self._drawn = time.monotonic() if is_due else self._drawn
        return is_due

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """No new bar for each data loader."""
        return False

    def on_train_epoch_start(self, *_: Any) -> None:
        """The bar goes on: epochs mean nothing here."""

    def on_train_epoch_end(self, *_: Any) -> None:
        """The same."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move to the number of updates done (a batch whose update was skipped does not count)."""
        bar = self.train_progress_bar
        if trainer.global_step > bar.n:
            # reading the values waits for the GPU
            if not bar.disable and time.time() - bar.last_print_t >= bar.mininterval:
                bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(trainer.global_step - bar.n)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the new values; the time of a validation is no part of the speed of training."""
        super().on_validation_end(trainer, pl_module)
        if self._train_progress_bar is not None:
            self._train_progress_bar.last_print_t = time.time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bars where they stopped, with the last values, so that messages have their own lines."""
        if (train := self._train_progress_bar) is not None:
            train.set_postfix(self.get_metrics(trainer, pl_module), refresh=True)
        for bar in (self._val_progress_bar, self._test_progress_bar, self._predict_progress_bar, train):
            if bar is not None:
                bar.close()
        self._train_progress_bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self.on_train_end(trainer, pl_module)


def _short(value: Any) -> str:
    number = value.item() if isinstance(value, Tensor) else value
    if not isinstance(number, float):
        return str(number)
    return f"{number:.0f}" if number.is_integer() and abs(number) < 1e15 else f"{number:.4g}"
