"""A small module and data module with the interface that the evaluating callbacks watch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.diffusion.steps import Steps
from lightning_modules.generator import make_generator
from lightning_modules.networks.loading import load_parts

CAPTIONS = [
    f"a {color} {thing}" for color in ("red", "blue") for thing in ("cat", "dog", "cup", "sun", "key", "bee")
]


class StandIn(LightningModule):
    """Yields the validation outputs of a distillation module; its training step moves one number."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.automatic_optimization = True
        self.parts = load_parts(str(path))
        self.steps = Steps((999,))
        self.generator = make_generator(self.parts, self.steps)
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.student_steps = 0
        self.swapped = 0
        self.is_swapped = False

    @contextmanager
    def evaluation_weights(self) -> Iterator[str]:
        assert not self.is_swapped  # an average can't be swapped in twice
        self.swapped += 1
        self.is_swapped = True
        yield "ema"
        self.is_swapped = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.student_steps += 1
        loss = self.weight.square()
        self.log("train/loss", loss, on_step=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        seeds = [int(i) for i in batch["indices"]]
        with self.evaluation_weights():
            return batch | {"images": self.generator.images(batch["prompts"], seeds)}

    test_step = validation_step

    def score_views(self, prompts: list[str], seeds: list[int]) -> dict[str, Tensor]:
        with self.evaluation_weights():
            images = self.generator.images(prompts, seeds)
        return {"student": images, "teacher x0": 1 - images, "fake score x0": images * 0.5}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.01)


class StandInData(LightningDataModule):
    """``size`` of the captions in batches of 3; the last batch holds one padding sample more."""

    def __init__(self, captions: list[str] | None = None, size: int = 7) -> None:
        super().__init__()
        self.eval_captions = self.val_captions = CAPTIONS if captions is None else captions
        self.size = size

    def train_dataloader(self) -> DataLoader[Any]:
        batches = [{"prompts": self.eval_captions[:4], "indices": torch.arange(4)} for _ in range(8)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self.val_captions)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self.eval_captions)

    def _evaluation(self, captions: list[str]) -> DataLoader[Any]:
        places = [*range(self.size), 0]
        batches = []
        for start in range(0, len(places), 3):
            chosen = places[start : start + 3]
            padding = torch.tensor([start + i == self.size for i in range(len(chosen))])
            prompts = [captions[i] for i in chosen]
            batches.append({"prompts": prompts, "indices": torch.tensor(chosen), "is_padding": padding})
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
