"""What a run is about to take: memory by part, the effective batch and, once measured, the time."""

from __future__ import annotations

import os
import resource
import statistics
import time
from datetime import datetime, timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.evaluated import as_student, evaluating
from callbacks.health import Health
from callbacks.run_folder import run_dir
from callbacks.samples import Pictures
from callbacks.throughput import Throughput, matmul_rate
from common.errors import UserError
from common.processes import say
from lightning_modules.memory import NOT_WEIGHTS, Part
from lightning_modules.trainer_settings import is_slow_in_bf16
from reports.text import text_table

_WARM_UP = 1
"""Updates that are not timed: the first counts operations."""
_SLOW = 5.0
"""So many times as long as its operations at the speed of a matrix product: more than networks cost."""
_LONG = 600.0
"""Seconds: the end of a run that is nearer than that needs no explanation."""
_PAGES_OF_SWAPPING = 100
"""Pages an update waits for from the disk; one that fits into memory waits for none."""


class StartSummary(Callback):
    """Prints memory by part, run folder, teacher, objective, prompts, device and precision when ``fit``
    starts, and, after the first few updates, how long the run will take, evaluations included, and its end.

    On a processor, where an update takes more than five times as long as its operations would at the speed of
    a matrix product in float32, one line says so with the likely cause. (How much of an accelerator's speed
    is reached depends on the networks' size, so nothing is said there.)

    Args:
        timed_updates: student updates that are timed for the estimate, after one to warm up.

    Raises:
        UserError: ``timed_updates`` is below 1, or the module doesn't know its parts.
    """

    def __init__(self, timed_updates: int = 4) -> None:
        if timed_updates < 1:
            raise UserError(f"StartSummary.timed_updates is {timed_updates}: it must be at least 1")
        self.timed_updates = timed_updates
        self._seconds: list[float] = []
        self._started: float | None = None
        self._pages = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, the effective batch and the precision."""
        if not callable(memory_parts := getattr(pl_module, "memory_parts", None)):
            raise UserError(
                f"StartSummary needs a module with memory_parts(), which {type(pl_module).__name__} has not: "
                "leave the callback out"
            )
        self._seconds, self._started = [], None
        run = run_dir(trainer)
        facts = {"Run": str(run), "Watch": f"{run / 'report.html'}, renewed at each validation"}
        parts: list[Any] = [pl_module, trainer.datamodule]  # type: ignore[attr-defined]
        for part in parts:
            facts |= part.describe() if hasattr(part, "describe") else {}
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        facts |= {"Device": f"{name} x {trainer.world_size}", "Precision": str(trainer.precision)}
        lines = [f"{title}: {text}" for title, text in facts.items()]
        say("\n".join([memory_table(memory_parts()), *lines, *effective_batch(trainer)]))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        is_measuring = len(self._seconds) < _WARM_UP + self.timed_updates
        self._started = time.perf_counter() if is_measuring else None
        if len(self._seconds) == _WARM_UP:
            self._pages = _pages_from_disk()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; when enough is measured, print the estimate and what is wrong with it."""
        if self._started is None:
            return
        self._seconds.append(time.perf_counter() - self._started)  # an update waits for its gradients' norm
        if len(self._seconds) < _WARM_UP + self.timed_updates or trainer.max_steps <= 0:
            return
        swapped = (_pages_from_disk() - self._pages) / self.timed_updates > _PAGES_OF_SWAPPING
        seconds, device = statistics.median(self._seconds[_WARM_UP:]), trainer.strategy.root_device
        total, left = (seconds * (trainer.max_steps - step) for step in (0, trainer.global_step))
        if pictures := self._pictures(trainer, after=0):
            each = self._seconds_per_picture(trainer, pl_module, batch["prompts"])
            total, left = total + each * pictures, left + each * self._pictures(trainer, trainer.global_step)
        pl_module.print(
            f"{seconds:.3g} s per student update: {trainer.max_steps} take about {duration(total)}, "
            f"{duration(left)} to go; validations and the final evaluation are included (but for a teacher "
            f"not measured before); end about {end_time(left)}"
        )
        counts = [one.flops for one in trainer.callbacks if isinstance(one, Throughput)]  # type: ignore[attr-defined]
        if device.type != "cpu" or not counts or not counts[0]:
            return
        expected = counts[0] / matmul_rate(device, torch.float32)
        if seconds > _SLOW * expected and left > _LONG:
            pl_module.print(
                f"SLOW: an update takes {seconds:.3g} s, {seconds / expected:.0f} times its operations at "
                f"this processor's speed ({expected:.3g} s); the run would end about "
                f"{end_time(left)}. "
                f"Likely cause: {likely_cause(str(trainer.precision), trainer.num_devices, swapped)}"
            )

    def _pictures(self, trainer: Trainer, after: int) -> int:
        """Pictures that this process draws after a step, to evaluate and to look at, the teacher's apart."""
        end, every, validations = trainer.max_steps, trainer.val_check_batch, 0
        if isinstance(every, int) and every > 0 and trainer.enable_validation:
            validations = end // every - after // every
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        some, every_caption = (len(getattr(data, name, ())) for name in ("val_prompts", "eval_captions"))
        most = sum(trainer.num_val_batches) * getattr(data, "eval_batch_size", 0)
        pictures = validations * int(min(some // trainer.world_size, most))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Pictures | Health):
                rhythm = callback.every_n_steps
                pictures += callback.num_images * ((end - after) // rhythm if rhythm else validations)
            pictures += min(getattr(callback, "final_size", 0), every_caption) // trainer.world_size
        return pictures

    def _seconds_per_picture(self, trainer: Trainer, module: LightningModule, prompts: list[str]) -> float:
        """Draw a few twice; the first time warms up. All processes, since shards need them."""
        few = prompts[:8]
        with evaluating(trainer, module):
            for _ in range(2):
                start = time.perf_counter()
                as_student(module).generator.images(few, list(range(len(few)))).cpu()
        return (time.perf_counter() - start) / len(few)


def memory_table(parts: dict[str, Part]) -> str:
    """One line for each part: its values in M, MiB, and whether it is trained or frozen; then the sum."""
    cells = []
    for name, (values, size, trained) in parts.items():
        state = "" if name in NOT_WEIGHTS else "trained" if trained else "frozen"
        cells.append([name, f"{values / 1e6:.3f}", f"{size / 2**20:.1f}", state])
    total = sum(size for _, size, _ in parts.values()) / 2**20
    cells.append(["sum, without activations", "", f"{total:.1f}", ""])
    return text_table(["Memory by part", "M", "MiB", ""], cells)


def effective_batch(trainer: Trainer) -> list[str]:
    """A line that says how a student update's prompts are shared out; none for other data modules."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not all(hasattr(data, name) for name in ("batch_size", "micro_batch_size", "local_batch_size")):
        return []
    processes, micro = trainer.world_size, data.micro_batch_size
    shared = f"{processes} process{'es' if processes > 1 else ''} x micro-batch {micro}"
    passes = data.local_batch_size // micro
    return [f"Prompts per student update: {shared} x accumulation {passes} = {data.batch_size}"]


def likely_cause(precision: str, processes: int, swapped: bool) -> str:
    """Why updates are slow on this processor, as far as it can be seen from outside, and what to do.

    ``processes``: of this run on this machine; ``swapped``: whether updates waited for pages from the disk.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, load = torch.get_num_threads() * processes, os.getloadavg()[0]
    if "bf16" in precision and is_slow_in_bf16("cpu"):
        return "bf16 on a processor without bf16 units; set --trainer.precision=32-true"
    if threads > cores:
        return f"{threads} threads on {cores} cores; set OMP_NUM_THREADS={max(1, cores // processes)}"
    if swapped:
        return "memory is short and the system swaps; set a smaller data.init_args.micro_batch_size"
    if load > max(cores, threads) + 0.5:
        return f"other processes on the cores (load average {load:.1f}, cores {cores}); end them or wait"
    return "none seen (precision, threads, swapping and load average are as they should be)"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss; days where there are some."""
    return str(timedelta(seconds=round(seconds)))


def end_time(seconds: float) -> str:
    """When so many seconds will have passed."""
    return f"{datetime.now() + timedelta(seconds=seconds):%Y-%m-%d %H:%M}"


def _pages_from_disk() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
