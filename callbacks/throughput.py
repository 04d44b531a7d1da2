"""How fast a run is: pictures a second, memory, and how much of the machine's arithmetic it uses."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.flop_counter import FlopCounterMode

from common.environment import peak_memory_gib
from common.errors import UserError

_WARM_UP = 2
"""Updates of a session that are not timed: the first counts operations, the second fills caches."""


class Throughput(Callback):
    """Logs images a second, model FLOPs utilization, peak memory, and how many images the student has drawn.

    Names: `throughput/images_per_second`, `throughput/model_flops_utilization`, `memory/peak_gib` and
    `counts/images_seen` (in training, over all processes). Utilization is the floating-point operations of an
    update (matrix products, convolutions, attention; forward and backward of all networks, what is recomputed
    included) by its time and by the peak rate. They are counted once, in the first update of the run; a
    resumed run takes the count from its checkpoint, unless the batch has changed. The time is that of the
    updates themselves, without validations and checkpoints.

    Args:
        peak_tflops: peak rate of one device in TFLOP/s, from its data sheet. None: the rate of a large matrix
            product in the run's compute precision, measured when training starts. What was used is printed.
        window: updates over which speed is averaged.
    """

    def __init__(self, peak_tflops: float | None = None, window: int = 20) -> None:
        if window < 1 or (peak_tflops is not None and peak_tflops <= 0):
            raise UserError(
                f"Throughput.window is {window} and peak_tflops {peak_tflops}: window must be at least 1, "
                "peak_tflops above 0 (or null to measure it)"
            )
        self.peak_tflops, self.window = peak_tflops, window
        self.images_seen = 0
        self.flops: int | None = None  # of an update, on one process
        self._counted_for: list[int] = []
        self._peak = self._started = 0.0
        self._updates = 0
        self._seconds: deque[float] = deque(maxlen=window)
        self._counter: FlopCounterMode | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the peak rate."""
        self._updates = 0
        self._seconds.clear()
        if self.peak_tflops is not None:
            self._peak, how = self.peak_tflops * 1e12, "as configured"
        else:
            precision = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
            self._peak = matmul_rate(trainer.strategy.root_device, precision)
            how = f"measured, matrix product in {precision}"
        rank_zero_info(f"Peak rate of a device for the utilization: {self._peak / 1e12:.3g} TFLOP/s ({how})")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock, and the count of operations where it is not known."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        shape = [len(batch["prompts"]), int(getattr(data, "micro_batch_size", 0))]
        if self.flops is None or shape != self._counted_for:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
            self._counted_for = shape
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock and log."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops, self._counter = self._counter.get_total_flops(), None
            rank_zero_info(f"Operations of an update on one process: {self.flops / 1e12:.3g} TFLOP")
        images = len(batch["prompts"]) * trainer.world_size
        self.images_seen += images
        self._updates += 1
        if self._updates > _WARM_UP:
            self._seconds.append(time.perf_counter() - self._started)
        values = {"counts/images_seen": float(self.images_seen), "memory/peak_gib": peak_memory_gib()}
        if self._seconds:
            seconds = sum(self._seconds) / len(self._seconds)
            values["throughput/images_per_second"] = images / seconds
            values["throughput/model_flops_utilization"] = (self.flops or 0) / seconds / self._peak
        for name, value in values.items():
            pl_module.log(name, value, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no counter on."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted."""
        return {"images_seen": self.images_seen, "flops": self.flops, "counted_for": self._counted_for}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.images_seen, self.flops = state_dict["images_seen"], state_dict["flops"]
        self._counted_for = state_dict["counted_for"]


def matmul_rate(device: torch.device, precision: torch.dtype, repeats: int = 5) -> float:
    """Operations a second of a square matrix product of this device, the best of a few.

    The number of rows is 8192 on a GPU and 1024 elsewhere; random states are left as they are.
    """
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, device=device, dtype=precision)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
