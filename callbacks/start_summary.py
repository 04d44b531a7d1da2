"""What a run is about to take: memory by part, the effective batch and, once measured, the time."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from common.errors import UserError
from lightning_modules.memory import NOT_WEIGHTS, Part

_MIB = 2**20


class StartSummary(Callback):
    """Prints a table of memory by part and the effective batch when ``fit`` starts, and, after the first few
    updates, how long the run will take.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules that have no ``memory_parts``."""
        if not callable(getattr(pl_module, "memory_parts", None)):
            raise UserError(
                f"StartSummary needs a module with memory_parts(), which {type(pl_module).__name__} has not: "
                "leave the callback out"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and the effective batch."""
        self._seconds, self._started = [], None
        parts: dict[str, Part] = pl_module.memory_parts()  # type: ignore[operator]
        _print(
            "\n".join([memory_table(parts), *effective_batch(trainer), f"Precision: {trainer.precision}"])
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter() if len(self._seconds) <= self.timed_updates else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; when enough is measured, print the estimate."""
        if self._started is None:
            return
        self._seconds.append(time.perf_counter() - self._started)  # an update waits for its gradients' norm
        if len(self._seconds) == self.timed_updates + 1 and trainer.max_steps > 0:
            mean = sum(self._seconds[1:]) / self.timed_updates
            pl_module.print(estimated_time(mean, trainer.max_steps, trainer.global_step))


def memory_table(parts: dict[str, Part]) -> str:
    """One line for each part: its values in M, MiB, and whether it is trained or frozen; then the sum."""
    width = max(map(len, parts))
    lines = [f"{'Memory by part':<{width}}  {'M':>9}  {'MiB':>9}"]
    for name, (values, size, trained) in parts.items():
        state = "" if name in NOT_WEIGHTS else "trained" if trained else "frozen"
        lines.append(f"{name:<{width}}  {values / 1e6:>9.3f}  {size / _MIB:>9.1f}  {state}".rstrip())
    total = sum(size for _, size, _ in parts.values()) / _MIB
    lines.append(f"{'sum, without activations':<{width}}  {'':>9}  {total:>9.1f}")
    return "\n".join(lines)


def effective_batch(trainer: Trainer) -> list[str]:
    """A line that says how a student update's prompts are shared out; none for other data modules."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not all(hasattr(data, name) for name in ("batch_size", "micro_batch_size", "local_batch_size")):
        return []
    processes, micro = trainer.world_size, data.micro_batch_size
    shared = f"{processes} process{'es' if processes > 1 else ''} x micro-batch {micro}"
    passes = data.local_batch_size // micro
    return [f"Prompts per student update: {shared} x accumulation {passes} = {data.batch_size}"]


def estimated_time(seconds: float, max_steps: int, done: int) -> str:
    """The time that all updates take at this speed, and what is left of it."""
    left = f", {duration(seconds * (max_steps - done))} to go" if done < max_steps else ""
    return (
        f"{seconds:.3g} s per student update: {max_steps} take about {duration(seconds * max_steps)}{left}; "
        "validations and the final evaluation are extra"
    )


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)
