"""How one role (student or fake score) is optimized, and what happens when it can't be."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from diffusers.optimization import get_scheduler
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.errors import UserError, check_range, first_line
from lightning_modules.diffusion.transfer import to_device
from lightning_modules.networks.lora import LoraSettings
from lightning_modules.parallel import average_gradients, clip_gradients

SCHEDULES = ("constant", "linear", "cosine")
# Adagrad has such a kernel, too, but makes its step counts at once, and not where the kernel wants them.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


@dataclass
class RoleOptimization:
    """Optimizer, learning-rate schedule and gradient clipping of one role.

    Attributes:
        optimizer: class and settings of the optimizer.
        schedule: ``constant``, ``linear`` or ``cosine``; the last two fall to zero at ``trainer.max_steps``.
        warmup_steps: student updates over which the learning rate rises linearly from zero.
        clip_norm: largest gradient norm of the role; null for no clipping.
    """

    optimizer: OptimizerCallable
    schedule: str = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule is {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.warmup_steps < 0 or (self.clip_norm is not None and not self.clip_norm > 0):
            raise UserError(
                f"warmup_steps={self.warmup_steps}, clip_norm={self.clip_norm}: the first must not be "
                "negative, the second must be positive or null"
            )

    def build(self, groups: list[dict[str, Any]], max_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Optimizer of these parameter groups and the schedule that is stepped once per student update."""
        if self.schedule != "constant" and max_steps <= 0:
            raise UserError(f"the {self.schedule} schedule needs trainer.max_steps: it falls to zero there")
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        try:
            optimizer = self.optimizer(groups)
            for group in optimizer.param_groups:
                check_range("the learning rate", float(group["lr"]), 0, 1e6)
        except (TypeError, ValueError) as error:
            raise UserError(f"an optimizer refuses its settings: {first_line(error)}") from error
        _use_fused_kernel(optimizer)
        settings = {"num_warmup_steps": self.warmup_steps, "num_training_steps": max_steps}
        return optimizer, get_scheduler(name, optimizer, **settings)

    def state_per_weight(self, device: torch.device | str = "cpu") -> tuple[float, float]:
        """Values and bytes that the optimizer keeps for each weight, seen by a step on a matrix.

        Adam: 2 and 8; in eight bits 2 and 2, and a little for their scales.
        """
        weight = torch.nn.Parameter(torch.zeros(256, 256, device=device))  # small ones stay in 32 bits
        weight.grad = torch.zeros_like(weight)
        optimizer = self.optimizer([{"params": [weight]}])
        optimizer.step()
        kept: list[Tensor] = []
        for value in optimizer.state[weight].values():
            if hasattr(value, "__tensor_flatten__"):  # of a quantizing class (torchao's): its parts
                kept += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
            elif isinstance(value, Tensor) and value.numel() > 1:
                kept.append(value)
        count = weight.numel()
        return sum(part.numel() for part in kept) / count, sum(part.nbytes for part in kept) / count

    def clip(self, parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
        """Clip the gradients in place; returns their norm before, a scalar tensor."""
        return clip_gradients(parameters, self.clip_norm or float("inf"))


@dataclass
class FakeScoreSettings(RoleOptimization):
    """What the fake score is, and how it is optimized.

    Attributes:
        lora: its adapter on the teacher's weights; null makes it a full copy.
    """

    lora: LoraSettings | None = field(default_factory=LoraSettings)


def _use_fused_kernel(optimizer: Optimizer) -> None:
    """Have one kernel do the whole update, where the optimizer has one and the configuration chose nothing.

    PyTorch's own choice is a loop over the weights on the CPU, several kernels a weight on GPUs. Weights in
    shards are left to it: not every fused kernel takes them.
    """
    for group in optimizer.param_groups if type(optimizer) in _FUSED else ():
        devices = {"shards" if isinstance(p, DTensor) else p.device.type for p in group["params"]}
        chosen = group.get("differentiable") or group.get("capturable") or group.get("foreach") is not None
        if group.get("fused", False) is None and not chosen and devices <= {"cpu", "cuda"}:
            group["fused"] = True


class UpdateGuard:
    """Steps the optimizers, but never by a gradient that is not finite.

    Args:
        most_in_a_row: skipped updates of one role in a row that stop the run.

    Attributes:
        skipped: updates of any role that were skipped so far.
    """

    def __init__(self, most_in_a_row: int) -> None:
        if most_in_a_row < 1:
            raise UserError(f"max_skipped_updates is {most_in_a_row}: it must be at least 1")
        self.most_in_a_row = most_in_a_row
        self.skipped = 0
        self._in_a_row: Counter[str] = Counter()

    def step(
        self, optimizer: Any, optimization: RoleOptimization, role: str, student_steps: int,
        suspects: Callable[[], str] = lambda: "",
    ) -> tuple[bool, torch.Tensor]:  # fmt: skip
        """Average over the processes, clip, step or skip, drop the gradients; whether finite, and their norm.

        The gradients being the same on all processes then, all of them decide alike.

        Args:
            suspects: what the message about too many skipped updates says of terms and prompts; collective.

        Raises:
            UserError: too many updates of this role in a row were skipped.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(parameters)
        norm = optimization.clip(parameters)
        if finite := bool(torch.isfinite(norm)):
            optimizer.step()
        self.skipped += not finite
        self._in_a_row[role] = 0 if finite else self._in_a_row[role] + 1
        optimizer.zero_grad(set_to_none=True)
        if (count := self._in_a_row[role]) >= self.most_in_a_row:
            raise UserError(
                f"{count} updates of the {role} in a row, the last after step {student_steps}, had a loss or "
                f"gradient that is not finite{suspects()}: lower its learning rate or the guidance scale"
            )
        return finite, norm


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
