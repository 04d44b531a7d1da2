"""What share of a run's time its evaluations take, and a bound for it."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.evaluated import as_student
from common.errors import UserError
from common.processes import from_rank_zero, say


class EvaluationShare(Callback):
    """Prints and logs (``throughput/evaluation_share``) the share of the time so far that validations took.

    A validation that is as long as the last one and would bring the share above ``max_share`` waits until the
    next one is due. The first one is not bounded (its time is not known), nor the evaluation at the end.
    To stand last among the callbacks, so that what they draw at a validation counts.

    Args:
        max_share: of validations in the time since training began; None: no bound.
    """

    def __init__(self, max_share: float | None = 0.1) -> None:
        if max_share is not None and not 0 < max_share <= 1:
            raise UserError(f"EvaluationShare.max_share is {max_share}: it is a share, above 0 and at most 1")
        self.max_share = max_share
        self.total = self.evaluating = self.last = 0.0  # seconds: all, in validations, in the last of them
        self.waited = -1  # the step whose validation was put off
        self._seen = self._begun = 0.0
        self._every: Any = None
        self._has_ended = False

    @property
    def share(self) -> float | None:
        """Of evaluations in the time so far, that at the end included; None before any."""
        last = time.perf_counter() - self._begun if self._has_ended else 0.0
        return (self.evaluating + last) / (self.total + last) if self.evaluating + last > 0 else None

    def _count(self) -> float:
        """Bring the time so far up to now, which is returned."""
        now = time.perf_counter()
        self.total, self._seen = self.total + now - self._seen, now
        return now

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a validation that was put off isn't made up for by a run that continues."""
        self._seen, self._every = time.perf_counter(), trainer.val_check_batch
        self._has_ended = False
        if self.waited == trainer.global_step:
            trainer.val_check_batch = sys.maxsize

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Validations come in their rhythm again."""
        trainer.val_check_batch = self._every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Put off a validation that is due and too dear."""
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if self.max_share is None or not isinstance(self._every, int) or done % self._every or not self.last:
            return
        self._count()
        share = (self.evaluating + self.last) / (self.total + self.last)
        if from_rank_zero(share > self.max_share):
            self.waited, trainer.val_check_batch = trainer.global_step, sys.maxsize
            say(
                f"The validation of step {trainer.global_step:,} is left out: with it evaluations would take "
                f"{share:.1%} of the time so far (EvaluationShare.max_share: {self.max_share:.0%})"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the validation."""
        if trainer.state.fn == "fit" and self._every is not None:
            self._begun = self._count()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it, print and log."""
        if trainer.state.fn != "fit" or self._every is None:
            return
        self.last = self._count() - self._begun
        self.evaluating += self.last
        step, share = as_student(pl_module).student_steps, self.evaluating / self.total
        bound = "" if self.max_share is None else f" (at most {self.max_share:.0%}, else one is left out)"
        say(f"Validation of step {step:,}: {self.last:.3g} s; {share:.1%} of the time so far{bound}")
        for logger in trainer.loggers:
            logger.log_metrics({"throughput/evaluation_share": share}, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is the evaluation at the end."""
        self._begun, self._has_ended = self._count(), True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the share of all evaluations."""
        if not self._has_ended or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        last, self._has_ended, self._every = self._count() - self._begun, False, None
        self.evaluating += last
        share = self.evaluating / self.total
        say(f"Evaluation at the end: {last:.3g} s; all evaluations: {share:.1%} of the run's time")

    def state_dict(self) -> dict[str, Any]:
        """Return the times."""
        return {name: getattr(self, name) for name in ("total", "evaluating", "last", "waited")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        for name, value in state_dict.items():
            setattr(self, name, value)
