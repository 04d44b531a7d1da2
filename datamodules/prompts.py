"""Prompts: all the data that distillation needs, but for methods that want real pictures, too.

The order of training is a pure function of the seed (see `datamodules.order`); a run continues from one
stored number, the position in the stream, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common.errors import UserError, check_range
from datamodules.evaluation_sets import EvaluationSet, EvaluationSource
from datamodules.order import PromptDraws, derived_seed
from datamodules.picture_datasets import PictureDataset, holds_dataset
from datamodules.real_pictures import RealPictures, RealPictureSource, RealSource
from datamodules.sources import (
    CAPTIONS,
    EVAL_CAPTIONS,
    VAL_CAPTIONS,
    Cleaning,
    PromptPools,
    listed_prompts,
)
from datamodules.tables import read_texts
from datamodules.teacher_samples import TeacherSamples


def read_prompts(path: str | Path, column: str | None = None) -> list[str]:
    """All prompts of a file (see `read_texts`), but for empty ones; a file without any is a UserError."""
    prompts = [text for text in read_texts(path, column) if text]
    if not prompts:
        raise UserError(f"prompts file {path} is empty; write one prompt a line into it")
    return prompts


def _captions(given: str | Path | list[Any], name: str, column: str | None = None) -> list[str]:
    """Captions of a file or a list."""
    return listed_prompts(given, f"data.{name}") if isinstance(given, list) else read_prompts(given, column)


def _first(captions: list[str], size: int | None, name: str) -> list[str]:
    """As many of the first captions as are wanted.

    Raises:
        UserError: there are fewer.
    """
    if size is not None and size > len(captions):
        limit = name.removesuffix("_captions") + "_size"
        raise UserError(
            f"data.{limit} is {size} but data.{name} has {len(captions)} captions; "
            f"add captions, lower data.{limit}, or set it to null for all of them"
        )
    return captions[:size]


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
        self.draws, self.negatives, self.position = draws, negatives, position
        self.step = batch_size * batches
        share = batch_size // world_size
        indices = np.arange(rank * share, (rank + 1) * share)
        self.places = (indices + batch_size * np.arange(batches)[:, None]).ravel()  # of the first update
        self.indices = torch.from_numpy(indices).repeat(batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number, count = _worker()
        while True:
            places = self.position + number * self.step + self.places
            batch = {"prompts": self.draws.at(places), "indices": self.indices}
            if self.negatives is not None:
                batch["negative_prompts"] = self.negatives.at(places)
            yield batch
            number += count


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
        number, count = _worker()
        size = len(self.prompts)
        for step in range(number, len(self), count):
            start = step * self.batch_size * self.world_size
            # the last batches are made equally short on all processes
            share = min(self.batch_size, -(-(size - start) // self.world_size))
            places = start + self.rank * share + torch.arange(share)
            indices = places % size
            prompts = [self.prompts[i] for i in indices.tolist()]
            yield {"prompts": prompts, "indices": indices, "is_padding": places >= size}


def _worker() -> tuple[int, int]:
    """Number of this worker process and how many there are; loaders take from them in turn."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


class PromptDataModule(LightningDataModule):
    """Prompts for distillation and evaluation.

    A training batch is a process's share of a student update, `{"prompts": list[str], "indices": long [b]}`;
    `indices` are the places in the global batch. With `negative_prompts` it has `"negative_prompts":
    list[str]`, too. An evaluation batch has `"is_padding": bool [b]`; its `indices` are the places in the
    list of evaluation prompts.

    Small sources are read into memory at once. Large ones are written into a memory-mapped store the first
    time (see `datamodules.sources`), before the training starts.

    Args:
        prompts: Training prompts: a file (.txt, .csv, .tsv, .jsonl, .parquet, also .gz or .zst), a glob
            pattern, a Hugging Face dataset folder, a list of prompts, or a list of sources, each a mapping
            of path, column and weight (see `PromptSource`). None: the bundled captions.
        batch_size: Prompts per student update, over all processes and accumulation.
        micro_batch_size: Prompts per process and pass. None: a process's whole share at once.
        eval_captions: Prompts for reports, test and predict: a file or a list. None: the bundled ones.
        eval_column: Column of them in a table. None: the only one called prompt, caption or text.
        eval_size: How many of them predict uses, from the first on, and validation of its own; test uses
            all. None: all.
        val_captions: Prompts for validations, by which best.ckpt is chosen: others than those that reports
            are about. None: bundled ones beside the bundled `eval_captions`, else these.
        eval_set: A set of `datamodules.published_sets` or `datamodules.evaluation_sets` in place of
            `eval_captions`, with its crop and resize, groups and negatives; caption i is drawn from seed i.
            One that needs captions and has none (null) is as if it were not given.
        eval_set_size: As `eval_size`, of an `eval_set`; of grouped captions as many of each group.
        eval_reference: Folder of real pictures (or their statistics) with which an Evaluation that names none
            compares the pictures drawn.
        eval_batch_size: Prompts per process and pass in evaluations.
        seed: Seed of the order of the training prompts. None: the command line's ``seed_everything``, else 0.
        num_workers: Worker processes of the loaders; lines of text need none.
        column: Column of the training prompts in tables. None: the only one called prompt, caption or text.
        epoch_size: Draws in an epoch, where sources have weights. Otherwise an epoch shows each prompt once.
        negative_prompts: Negative prompts: a file, pattern or folder as above, or a list; drawn in an order
            of their own, each once before any comes again.
        min_length: Training prompts with fewer characters are dropped.
        max_length: Training prompts with more characters are dropped.
        deduplicate: Training prompts that have come before are dropped.
        real: Given pictures with captions (the training is not image-free then) or samples of the teacher,
            for methods that need some.

    Raises:
        UserError: a source cannot be used (see `read_texts`), there are fewer prompts than one batch or fewer
            captions than are wanted, or the sizes do not divide each other.
    """

    def __init__(
        self,
        prompts: str | list[str] | list[dict[str, Any]] | list[Any] | None = None,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        eval_captions: str | list[str] | list[Any] | None = None,
        eval_size: int | None = 256,
        eval_batch_size: int = 64,
        seed: int | None = None,
        num_workers: int = 0,
        column: str | None = None,
        epoch_size: int | None = None,
        negative_prompts: str | list[str] | list[Any] | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        deduplicate: bool = False,
        real: RealPictures | None = None,
        eval_column: str | None = None,
        eval_set: EvaluationSource | None = None,
        eval_set_size: int | None = None,
        eval_reference: str | None = None,
        val_captions: str | list[str] | list[Any] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "eval_size": eval_size,
                 "eval_set_size": eval_set_size, "eval_batch_size": eval_batch_size,
                 "epoch_size": epoch_size}  # fmt: skip
        for name, value in sizes.items():
            check_range(f"data.{name}", value, 1, 2**31)
        check_range("data.num_workers", num_workers, 0, 256)
        self.batch_size = batch_size
        self.seed, self.real = seed or 0, real
        self.batches_per_step = 1  # an objective may ask for more
        self.has_own_prompts = prompts is not None
        cleaning = Cleaning(min_length, max_length, deduplicate)
        given = str(CAPTIONS) if prompts is None else prompts
        self._prompts, self._negatives = PromptPools(given, column, cleaning, epoch_size), None
        if negative_prompts is not None:
            self._negatives = PromptPools(negative_prompts, key="data.negative_prompts")
        if self._prompts.is_small and (self._negatives is None or self._negatives.is_small):
            self._draws()  # mistakes show before the networks are loaded
        self.lacks_eval_set = eval_set is not None and eval_set.captions is None and bool(eval_set.needs)
        self.eval_set: EvaluationSet | None = None
        name, size = "eval_captions", eval_size
        if eval_set is not None and not self.lacks_eval_set:
            self.eval_set, name, size = eval_set.load(), "eval_set", eval_set_size
            captions = self.eval_set.captions
        else:
            captions = _captions(eval_captions or EVAL_CAPTIONS, name, eval_column)
        self.has_own_captions = eval_captions is not None or self.eval_set is not None
        self.eval_captions, self.eval_reference = captions, eval_reference
        self.eval_prompts = _first(captions, size, name)
        self.val_set: EvaluationSet | None = None  # what validations show, of grouped captions
        if self.eval_set is not None and self.eval_set.groups is not None:
            chosen = self.eval_set.first(size, "data.eval_set_size")
            self.eval_prompts, self.val_set = chosen.captions, chosen if val_captions is None else None
        self.eval_groups, self.eval_negatives, self.eval_frame = (
            getattr(self.eval_set, kind, None) for kind in ("groups", "negatives", "frame")
        )
        if val_captions is None and not self.has_own_captions and not self.lacks_eval_set:
            val_captions = str(VAL_CAPTIONS)
        self.val_captions, self.val_prompts = captions, self.eval_prompts
        if val_captions is not None:
            self.val_captions = _captions(val_captions, "val_captions")
            self.val_prompts = self.val_captions[:size]
        self._micro_batch_size = micro_batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        # prompts used by the updates begun so far; a multiple of nothing if batch_size changed
        self.position = 0

    @property
    def _process(self) -> tuple[int, int]:
        """Number of this process, and how many there are."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def local_batch_size(self) -> int:
        """Prompts of one student update on this process.

        Raises:
            UserError: the number of processes does not divide `batch_size`.
        """
        _, processes = self._process
        if self.batch_size % processes:
            raise UserError(
                f"data.batch_size {self.batch_size} (over all processes) cannot be shared equally by "
                f"{processes} processes; choose a multiple of {processes}"
            )
        return self.batch_size // processes

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
                f"process (data.batch_size {self.batch_size} over all processes)"
            )
        return micro

    def _draws(self) -> tuple[PromptDraws, PromptDraws | None]:
        """Prompts and negative prompts at the places of the stream; makes their stores if there are none."""
        draws = self._prompts.draws(self.seed)
        size = sum(map(len, draws.sources))
        if (fewest := min(size, draws.epoch_size)) < self.batch_size:
            what = f"has {size} prompts" if fewest == size else f"gives {fewest} an epoch"
            raise UserError(
                f"data.prompts {what}, fewer than one batch (data.batch_size {self.batch_size}); add prompts "
                "or lower data.batch_size"
            )
        if self._negatives is None:
            return draws, None
        return draws, self._negatives.draws(derived_seed(self.seed, "negative prompts"))

    def describe(self) -> dict[str, str]:
        """What a run trains on and is measured on, in words."""
        bundled = "" if self.has_own_captions else ", the bundled ones, which describe emoji"
        captions = f"{len(self.eval_captions):,}{bundled}"
        captions += f", {self.eval_set.name}" if self.eval_set is not None else ""
        others = "the first" if self.val_captions is self.eval_captions else "others,"
        if self.val_set is not None and self.val_set is not self.eval_set:
            others = "equally many of each group,"
        captions += f"; validations: {others} {len(self.val_prompts):,}"
        return {"Prompts": self._prompts.describe(), "Evaluation captions": captions}

    def prepare_data(self) -> None:
        """Make the stores on one process of each machine, while the others wait without a time limit."""
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._draws()

    def setup(self, stage: str) -> None:
        """Check the sizes against the number of processes and open the prompts."""
        if stage == "fit":
            _ = self.micro_batch_size
            self._draws()
            if self.real is not None:
                self.real.places(*self._process)

    def real_pictures(self, side: int, codec: Callable[[], str]) -> RealSource | None:
        """The source of pictures, squares of ``side`` pixels, or of latents; None where `real` isn't set.

        Args:
            codec: tells the hash of the autoencoder whose latents are wanted.
        """
        if self.real is None:
            return None
        if self.real.captions is not None:
            return RealPictureSource(self.real, side)
        if holds_dataset(self.real.folder):
            return PictureDataset(self.real, side)
        return TeacherSamples(self.real, codec())

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The endless training stream, from the position reached so far."""
        _ = self.local_batch_size
        draws, negatives = self._draws()
        stream = PromptStream(
            draws, self.batch_size, self.position, *self._process, negatives, self.batches_per_step
        )
        return DataLoader(stream, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Each of the first `eval_size` captions of validations once over all processes."""
        return self._evaluation(self.val_prompts)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Each of the first `eval_size` evaluation captions once over all processes."""
        return self._evaluation(self.eval_prompts)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Each of all evaluation captions once, so that `test` measures on as many as the end of `fit`."""
        return self._evaluation(self.eval_captions)

    def _evaluation(self, captions: list[str]) -> DataLoader[dict[str, Any]]:
        prompts = EvaluationPrompts(captions, self.eval_batch_size, *self._process)
        return DataLoader(prompts, batch_size=None, num_workers=self.num_workers)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Count a training batch when it is used (loaders fetch ahead, so fetching is not using)."""
        if self.trainer is not None and self.trainer.training and "is_padding" not in batch:
            self.position += self.batch_size * self.batches_per_step
        return batch

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Leave a training batch on the CPU: its indices are read there, which would wait for the GPU."""
        if "is_padding" not in batch:
            return batch
        moved: dict[str, Any] = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream; it is the same on all processes."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a stored position."""
        self.position = int(state_dict["position"])
