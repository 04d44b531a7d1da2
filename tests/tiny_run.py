"""Modules and data small enough to run the whole command line in a second."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset


class TinyModule(LightningModule):
    """A linear layer with dropout (so that random states matter) and a warm-up.

    Args:
        width: Inputs of the layer.
        learning_rate: Of Adam.
        warmup_steps: Steps of linear warm-up.
        at_step: (step, what): calls `what` in the training step of that number; set in Python only.
    """

    at_step: tuple[int, Callable[[], None]] | None = None

    def __init__(self, width: int = 3, learning_rate: float = 0.1, warmup_steps: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)
        self.dropout = nn.Dropout(0.5)
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.used_rates: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        """Squared distance to the sum of the inputs."""
        return (self.layer(self.dropout(batch)) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.interrupt()
        self.used_rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def interrupt(self) -> None:
        """Do what a test asks for in this step."""
        if type(self).at_step is not None and self.trainer.global_step + 1 == type(self).at_step[0]:
            type(self).at_step[1]()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/frechet_distance", self.loss(batch), prog_bar=True, batch_size=len(batch))

    test_step = validation_step

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TinyTwoRoles(TinyModule):
    """Two optimizers in turn by manual optimization; only the first one counts as a step."""

    def __init__(self, width: int = 3, learning_rate: float = 0.1) -> None:
        super().__init__(width, learning_rate)
        self.automatic_optimization = False
        self.critic = nn.Linear(width, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.interrupt()
        optimizers: Any = self.optimizers()
        optimizers[1]._on_before_step = optimizers[1]._on_after_step = lambda: None
        for optimizer, loss in zip(optimizers, (self.loss(batch), self.critic(batch).square().mean())):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log("train/loss", loss, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        layers = (self.layer, self.critic)
        return [torch.optim.Adam(layer.parameters(), lr=self.learning_rate) for layer in layers]


class _Numbers(IterableDataset[Tensor]):
    def __init__(self, first: int, width: int) -> None:
        self.first, self.width = first, width

    def __iter__(self) -> Iterator[Tensor]:
        number = self.first
        while True:
            yield torch.randn(4, self.width, generator=torch.Generator().manual_seed(number))
            number += 1


class TinyData(LightningDataModule):
    """An endless resumable stream of normal numbers, batch n a function of n."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.width, self.position = width, 0

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(_Numbers(self.position, self.width), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        numbers = torch.randn(2, 4, self.width, generator=torch.Generator().manual_seed(99))
        return DataLoader(list(numbers), batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        if self.trainer is not None and self.trainer.training:
            self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


class TinySGD(TinyModule):
    """The same with an optimizer of another kind."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)
