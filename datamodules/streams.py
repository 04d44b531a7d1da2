"""The batches that processes and loader workers take from the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.order import PromptDraws


class PromptStream(IterableDataset[dict[str, Any]]):
    """The endless stream of training batches: each item is one process's share of one student update.

    Args:
        draws: What stands at each place of the stream.
        batch_size: Prompts per student update over all processes.
        position: Prompts already used by the run.
        rank: Number of this process.
        world_size: Number of processes; divides `batch_size`.
        negatives: Negative prompts, drawn at the same places.
        batches: Batches of a student update, one after the other in each item.
    """

    def __init__(self, draws: PromptDraws, batch_size: int, position: int = 0, rank: int = 0,
                 world_size: int = 1, negatives: PromptDraws | None = None,
                 batches: int = 1) -> None:  # fmt: skip
        self.draws, self.negatives, self.batch_size, self.position = draws, negatives, batch_size, position
        self.batches = batches
        share = batch_size // world_size
        self.first, self.last = rank * share, (rank + 1) * share

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        step = self.batch_size * self.batches
        start = self.position + number * step  # loaders take from their workers in turn
        indices = torch.arange(self.first, self.last).repeat(self.batches)
        while True:
            places = np.concatenate([
                np.arange(self.first, self.last) + start + k * self.batch_size for k in range(self.batches)
            ])  # fmt: skip
            batch = {"prompts": self.draws.at(places), "indices": indices}
            if self.negatives is not None:
                batch["negative_prompts"] = self.negatives.at(places)
            yield batch
            start += count * step


class EvaluationPrompts(IterableDataset[dict[str, Any]]):
    """A process's batches of the evaluation prompts; over all processes each prompt is counted exactly once.

    All processes get the same number of batches of the same size. Where that leaves a place over, it holds a
    prompt again, marked as padding: generated, as every process must take part in a forward pass, and not
    counted.

    Args:
        prompts: The evaluation prompts.
        batch_size: Prompts per process and batch.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, prompts: list[str], batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.prompts, self.batch_size, self.rank, self.world_size = prompts, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.prompts) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(number, len(self), count):
            yield self._batch(step)

    def _batch(self, step: int) -> dict[str, Any]:
        size = len(self.prompts)
        start = step * self.batch_size * self.world_size
        # the last batches are made equally short on all processes
        share = min(self.batch_size, -(-(size - start) // self.world_size))
        places = torch.arange(start + self.rank * share, start + (self.rank + 1) * share)
        is_padding = places >= size
        indices = torch.where(is_padding, places % size, places)
        return {
            "prompts": [self.prompts[i] for i in indices.tolist()],
            "indices": indices,
            "is_padding": is_padding,
        }
