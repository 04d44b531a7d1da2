"""What asks a run to stop: Ctrl-C, SIGTERM, a requeue signal of SLURM, a time limit. It obeys between steps.

Lightning's own SIGTERM handler broadcasts from inside the handler, where the other processes expect another
collective, and its SLURM handler saves in the middle of a step; both are replaced while training.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

TIME_LIMIT_STATUS = 75
"""Exit status of a run that its time limit has ended; sysexits.h calls it EX_TEMPFAIL, "try again later"."""


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
        self._replaced: dict[int, Any] = {}

    def watch(self, trainer: Trainer) -> None:
        """Take over the signals, until `release`; only the main thread can."""
        self.asked = Stop.NO
        if threading.current_thread() is not threading.main_thread():
            return
        wanted = {signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._on_terminate}
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            wanted[environment.requeue_signal or signal.SIGUSR1] = self._on_requeue
        self._replaced = {number: signal.signal(number, handler) for number, handler in wanted.items()}

    def release(self) -> None:
        """Give the signals back."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._replaced.items():
                signal.signal(number, handler)
            self._replaced = {}

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.asked is Stop.INTERRUPT:
            raise KeyboardInterrupt
        self.asked = max(self.asked, Stop.INTERRUPT)
        print("\nstopping after this step, which is then saved (Ctrl-C again: at once)", flush=True)

    def _on_terminate(self, signum: int, frame: FrameType | None) -> None:
        self.asked = max(self.asked, Stop.TERMINATE)

    def _on_requeue(self, signum: int, frame: FrameType | None) -> None:
        self.asked = Stop.REQUEUE

    def decide(self, trainer: Trainer) -> Stop:
        """Return what all processes do now. Collective."""
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
            requeue()
        if decided is Stop.TIME_LIMIT:
            raise SystemExit(TIME_LIMIT_STATUS)
        raise KeyboardInterrupt if decided is Stop.INTERRUPT else SIGTERMException


def requeue() -> None:
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
