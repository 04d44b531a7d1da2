"""Ends a run before the queue does."""

from __future__ import annotations

import re
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoint import RunCheckpoint
from callbacks.stopping import Stop
from common.errors import UserError

_LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


class TimeLimit(Callback):
    """Saves and stops after the first step (or evaluation batch) past a limit, with exit status 75.

    The time counts from when the run is built: each session of a run that is continued has the whole
    limit. The final evaluation is not interrupted, so leave room for it, and for the longest step.

    Args:
        limit: "HH:MM:SS" or, as for SLURM, "D-HH:MM:SS"; a number is seconds (YAML reads an unquoted
            11:30:00 as that number).

    Raises:
        UserError: another form, no time at all, or a run without RunCheckpoint.
    """

    def __init__(self, limit: str | int) -> None:
        self.started = time.monotonic()
        self.seconds = parse_limit(limit)
        self._checkpoint: RunCheckpoint | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the callback that saves and stops."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, RunCheckpoint)]
        if not found and stage == "fit":
            raise UserError("TimeLimit needs RunCheckpoint to save and stop: add it to trainer.callbacks")
        self._checkpoint = found[0] if found else None

    def _look(self) -> None:
        if self._checkpoint is not None and time.monotonic() - self.started >= self.seconds:
            self._checkpoint.requests.asked = max(self._checkpoint.requests.asked, Stop.TIME_LIMIT)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look at the clock; RunCheckpoint comes after this callback and acts in the same step."""
        self._look()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look at the clock in evaluations, too."""
        self._look()


def parse_limit(limit: str | int) -> float:
    """Return the seconds of a limit.

    Raises:
        UserError: not of the form "HH:MM:SS" or "D-HH:MM:SS", or no time at all.
    """
    seconds = float(limit) if isinstance(limit, int) else 0.0
    if isinstance(limit, str) and (match := _LIMIT.fullmatch(limit.strip())):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60.0 + rest
    if seconds <= 0:
        raise UserError(f'TimeLimit.limit is {limit!r}; give "HH:MM:SS" or "D-HH:MM:SS", e.g. "11:30:00"')
    return seconds
