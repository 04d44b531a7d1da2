"""What asks a run to stop: Ctrl-C, SIGTERM, a requeue signal of SLURM, a time limit. It obeys between steps.

Lightning's own SIGTERM handler broadcasts from inside the handler, where the other processes expect another
collective, and its SLURM handler saves in the middle of a step; both are replaced while training.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from enum import IntEnum
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from common.errors import UserError

TIME_LIMIT_STATUS = 75
"""Exit status of a run that its time limit has ended; sysexits.h calls it EX_TEMPFAIL, "try again later"."""
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that nobody saves: RunCheckpoint looks at the limit."""
        if stage == "fit" and not any(hasattr(one, "requests") for one in trainer.checkpoint_callbacks):
            raise UserError("TimeLimit needs RunCheckpoint to save and stop: add it to trainer.callbacks")

    def is_reached(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() - self.started >= self.seconds


def parse_limit(limit: str | int) -> float:
    """Return the seconds of a limit; a UserError where that is none."""
    seconds = float(limit) if isinstance(limit, int) else 0.0
    if isinstance(limit, str) and (match := _LIMIT.fullmatch(limit.strip())):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60.0 + rest
    if seconds <= 0:
        raise UserError(f'TimeLimit.limit is {limit!r}; give "HH:MM:SS" or "D-HH:MM:SS", e.g. "11:30:00"')
    return seconds


class Stop(IntEnum):
    """Why a run is to stop; where processes differ, the largest counts."""

    NO = 0
    TIME_LIMIT = 1
    INTERRUPT = 2
    TERMINATE = 3
    REQUEUE = 4


class StopRequests:
    """Collects what asks this process to stop."""

    def __init__(self) -> None:
        self.asked = Stop.NO
        self._reasons = {signal.SIGINT: Stop.INTERRUPT, signal.SIGTERM: Stop.TERMINATE}
        self._replaced: dict[int, Any] = {}

    def watch(self, trainer: Trainer) -> None:
        """Take over the signals, until `release`; only the main thread can."""
        self.asked = Stop.NO
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._reasons[environment.requeue_signal or signal.SIGUSR1] = Stop.REQUEUE
        self._replaced = {number: signal.signal(number, self._on_signal) for number in self._reasons}

    def release(self) -> None:
        """Give the signals back."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._replaced.items():
                signal.signal(number, handler)
            self._replaced = {}

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self.asked is Stop.INTERRUPT:
                raise KeyboardInterrupt
            print("\nstopping after this step, which is then saved (Ctrl-C again: at once)", flush=True)
        self.asked = max(self.asked, self._reasons[signal.Signals(number)])

    def decide(self, trainer: Trainer) -> Stop:
        """Return what all processes do now. Collective."""
        limits = [one for one in trainer.callbacks if isinstance(one, TimeLimit)]  # type: ignore[attr-defined]
        if any(limit.is_reached() for limit in limits):
            self.asked = max(self.asked, Stop.TIME_LIMIT)
        if trainer.world_size > 1:
            # signals do not reach all processes in the same step, and saving takes all of them
            asked = torch.tensor(int(self.asked), device=trainer.strategy.root_device)
            return Stop(int(trainer.strategy.reduce(asked, reduce_op="max")))
        return self.asked

    def leave(self, trainer: Trainer, decided: Stop, saved_step: int) -> None:
        """End the run, which is saved up to this step.

        Raises:
            KeyboardInterrupt: after Ctrl-C (exit status 1).
            SIGTERMException: after SIGTERM or a requeue (exit status 143).
            SystemExit: after the time limit (exit status 75).
        """
        why = {Stop.TIME_LIMIT: "the time limit is reached: ", Stop.REQUEUE: "preempted: "}.get(decided, "")
        where = f"--ckpt_path last continues from step {saved_step}" if saved_step > 0 else "nothing is saved"
        rank_zero_info(f"{why}stopped after step {trainer.global_step}; {where}")
        if decided is Stop.REQUEUE and trainer.is_global_zero:
            _requeue()
        if decided is Stop.TIME_LIMIT:
            raise SystemExit(TIME_LIMIT_STATUS)
        raise KeyboardInterrupt if decided is Stop.INTERRUPT else SIGTERMException


def _requeue() -> None:
    """Ask SLURM to run this job again (an element of an array by the array's id and its own)."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        failure = (done.stderr.strip() or f"status {done.returncode}") if done.returncode else None
    except OSError as error:
        failure = str(error)
    if failure:
        rank_zero_warn(f"scontrol requeue {job} failed ({failure}): submit the job again by hand")
