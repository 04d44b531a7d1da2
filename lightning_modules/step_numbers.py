"""The numbers of one training step, gathered from its micro-batches and logged over all processes."""

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor

from lightning_modules.diffusion.transfer import to_device


class StepNumbers:
    """Named scalars of the step in progress; stays on the device, so that nothing waits for the GPU."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget the last step's."""
        self._values.clear()

    def note(self, name: str, value: float | Tensor, share: float = 1.0) -> None:
        """Keep a number; those of one name are added up, each times its micro-batch's share of the batch."""
        device = value.device if isinstance(value, Tensor) else None
        number = torch.as_tensor(value, dtype=torch.float32, device=device).detach() * share
        self._values[name] = self._values[name] + number if name in self._values else number

    def note_all(
        self, group: str, numbers: Mapping[str, float | Tensor], share: float, world_size: int
    ) -> None:
        """Keep several as ``group/NAME``; counts (nonfinite…, truncated…) are totals over all processes."""
        for name, number in numbers.items():
            is_count = name.startswith(("nonfinite", "truncated"))
            self.note(f"{group}/{name}", number, world_size if is_count else share)

    def nonfinite(self) -> list[str]:
        """Names of those that are not finite, in the order in which they were noted; waits for the GPU."""
        return [name for name, value in self._values.items() if not bool(torch.isfinite(value))]

    def log(self, module: L.LightningModule) -> None:
        """Log them by the module, averaged over the processes, which all must have noted the same names."""
        on_cpu = [value for value in self._values.values() if value.device.type == "cpu"]
        sent = iter(to_device(torch.stack(on_cpu), module.device) if on_cpu else ())  # all in one copy
        values = torch.stack([next(sent) if v.device.type == "cpu" else v for v in self._values.values()])
        if module.trainer.world_size > 1:
            values = module.trainer.strategy.reduce(values, reduce_op="mean")
        for name, value in zip(self._values, values, strict=True):
            module.log(name, value, prog_bar=name.startswith("train/"), batch_size=1)
