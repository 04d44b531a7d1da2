"""Streams of prompts: all the data that distillation needs.

Order of training: prompt number p of the stream (p = 0, 1, 2, … over the whole run) is entry p mod N of a
permutation of the N prompts drawn from (seed, p // N). So the order is a pure function of the seed; a run
continues from one stored number, the position p, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_modules.errors import UserError

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
CAPTIONS = _ASSETS / "captions.txt"
EVAL_CAPTIONS = _ASSETS / "eval_captions.txt"


def read_prompts(path: str | Path) -> list[str]:
    """Read a text file with one prompt a line; empty lines and blanks at the ends are dropped.

    Raises:
        UserError: the file is missing, is a folder, cannot be read, holds no prompt, or is not UTF-8 (the
            line is named).
    """
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(
                f"prompts file {path} {what}; give the path of a UTF-8 text file with one prompt a line"
            )
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"prompts file {path} cannot be read: {error.strerror or error}; change its permissions or give "
            "another file"
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"prompts file {path} is not UTF-8: line {line} holds the byte "
            f"0x{content[error.start]:02x}; save the file as UTF-8"
        ) from error
    prompts = [stripped for line in text.split("\n") if (stripped := line.strip())]
    if not prompts:
        raise UserError(f"prompts file {path} is empty; write one prompt a line into it")
    return prompts


def as_prompts(given: str | list[str] | None, default: Path, key: str) -> list[str]:
    """Return the prompts of a file, of a list (as in YAML), or of the default file.

    Raises:
        UserError: as `read_prompts`; also if the list is empty or holds an empty prompt.
    """
    if not isinstance(given, list):
        return read_prompts(given or default)
    prompts = [prompt.strip() for prompt in given]
    if not prompts or not all(prompts):
        raise UserError(
            f"{key} is an empty list or holds an empty prompt; give at least one prompt, or a file"
        )
    return prompts


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Return the order of the prompts in one pass: long [size], a function of the arguments only."""
    generator = torch.Generator().manual_seed(
        (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9) % 2**63
    )
    return torch.randperm(size, generator=generator)


class PromptStream(IterableDataset[dict[str, Any]]):
    """The endless stream of training batches: each item is one process's share of one student update.

    Args:
        prompts: All training prompts.
        batch_size: Prompts per student update over all processes.
        seed: Seed of the order.
        position: Prompts already used by the run.
        rank: Number of this process.
        world_size: Number of processes; divides `batch_size`.
    """

    def __init__(self, prompts: list[str], batch_size: int, seed: int, position: int = 0, rank: int = 0,
                 world_size: int = 1) -> None:  # fmt: skip
        self.prompts, self.batch_size, self.seed, self.position = prompts, batch_size, seed, position
        share = batch_size // world_size
        self.first, self.last = rank * share, (rank + 1) * share

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        size, epoch, order = len(self.prompts), -1, torch.empty(0)
        start = self.position + number * self.batch_size  # loaders take from their workers in turn
        while True:
            chosen = []
            for place in range(start + self.first, start + self.last):
                if place // size != epoch:
                    epoch = place // size
                    order = permutation(self.seed, epoch, size)
                chosen.append(self.prompts[int(order[place % size])])
            yield {"prompts": chosen, "indices": torch.arange(self.first, self.last)}
            start += count * self.batch_size


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


class PromptDataModule(LightningDataModule):
    """Prompts for distillation and evaluation.

    A training batch is a process's share of a student update, `{"prompts": list[str], "indices": long [b]}`;
    `indices` are the places in the global batch. An evaluation batch has `"is_padding": bool [b]`, too; its
    `indices` are the places in the list of evaluation prompts.

    Args:
        prompts: Training prompts: a text file (one a line) or a list. None: the bundled captions.
        batch_size: Prompts per student update, over all processes and accumulation.
        micro_batch_size: Prompts per process and pass. None: a process's whole share at once.
        eval_captions: Prompts for validation, test and predict: a file or a list. None: the bundled ones.
        eval_size: How many of them validation and predict use, from the first on; test uses all. None: all.
        eval_batch_size: Prompts per process and pass in evaluations.
        seed: Seed of the order of the training prompts.
        num_workers: Worker processes of the loaders; lines of text need none.

    Raises:
        UserError: a file cannot be used (see `read_prompts`), there are fewer prompts than one batch, or the
            sizes do not divide each other.
    """

    def __init__(
        self,
        prompts: str | list[str] | None = None,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        eval_captions: str | list[str] | None = None,
        eval_size: int | None = 256,
        eval_batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "eval_size": eval_size,
                 "eval_batch_size": eval_batch_size}  # fmt: skip
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}; it must be at least 1")
        self.prompts = as_prompts(prompts, CAPTIONS, "data.prompts")
        if len(self.prompts) < batch_size:
            raise UserError(
                f"data.prompts has {len(self.prompts)} prompts, fewer than one batch (data.batch_size "
                f"{batch_size}); add prompts or lower data.batch_size"
            )
        captions = as_prompts(eval_captions, EVAL_CAPTIONS, "data.eval_captions")
        if eval_size is not None and eval_size > len(captions):
            raise UserError(
                f"data.eval_size is {eval_size} but data.eval_captions has {len(captions)} captions; "
                "add captions, lower data.eval_size, or set it to null for all of them"
            )
        self.eval_captions = captions
        self.eval_prompts = captions[:eval_size]
        self.batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.position = (
            0  # prompts used by the updates begun so far; a multiple of nothing if batch_size changed
        )

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def local_batch_size(self) -> int:
        """Prompts of one student update on this process.

        Raises:
            UserError: the number of processes does not divide `batch_size`.
        """
        if self.batch_size % self.world_size:
            raise UserError(
                f"data.batch_size {self.batch_size} (over all processes) cannot be shared equally by "
                f"{self.world_size} processes; choose a multiple of {self.world_size}"
            )
        return self.batch_size // self.world_size

    @property
    def micro_batch_size(self) -> int:
        """Prompts per process and pass.

        Raises:
            UserError: it does not divide the share of the process.
        """
        micro = self._micro_batch_size or self.local_batch_size
        if self.local_batch_size % micro:
            raise UserError(
                f"data.micro_batch_size {micro} does not divide the {self.local_batch_size} prompts of a "
                f"process (data.batch_size {self.batch_size} / {self.world_size} processes)"
            )
        return micro

    def setup(self, stage: str) -> None:
        """Check the sizes against the number of processes before anything is computed."""
        if stage == "fit":
            _ = self.micro_batch_size

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The endless training stream, from the position reached so far."""
        _ = self.local_batch_size
        stream = PromptStream(
            self.prompts, self.batch_size, self.seed, self.position, self.rank, self.world_size
        )
        return DataLoader(stream, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Each of the first `eval_size` evaluation captions once over all processes."""
        return self._evaluation(self.eval_prompts)

    def _evaluation(self, captions: list[str]) -> DataLoader[dict[str, Any]]:
        prompts = EvaluationPrompts(captions, self.eval_batch_size, self.rank, self.world_size)
        return DataLoader(prompts, batch_size=None, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Each of all evaluation captions once, so that `test` measures on as many as the end of `fit`."""
        return self._evaluation(self.eval_captions)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """As `val_dataloader`."""
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Count a training batch when it is used (loaders fetch ahead, so fetching is not using)."""
        if self.trainer is not None and self.trainer.training and "is_padding" not in batch:
            self.position += self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream; it is the same on all processes."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a stored position."""
        self.position = int(state_dict["position"])
