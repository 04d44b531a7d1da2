"""What an evaluation has measured so far, on disk, so that an interrupted one goes on where it stopped."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from callbacks.metrics.base import ImageMetric
from common.errors import UserError, first_line
from common.files import write_text_atomically, written_whole
from common.processes import from_every_rank, from_rank_zero, rank_and_world_size

KEY = "key.json"


class Unfinished:
    """The states of all metrics after a beginning of the list of captions, one file for each process.

    A state is written beside the last one, which is removed when all processes have written: killed at any
    moment, one complete state is left. What is done is a beginning of the list, and metrics add up, so the
    number of processes may change.

    Args:
        folder: where; made when first needed.
        key: all that the numbers, and the files beside them, depend on; a state of anything else is refused.
        every: pictures between two states; 0 writes none.

    Raises:
        UserError: the folder holds an evaluation of something else (what differs is named).
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], every: int) -> None:
        self.folder, self.every = folder, every
        self.key: dict[str, Any] = json.loads(json.dumps(key))
        self._last = 0
        differing = from_rank_zero(self._differing() if rank_and_world_size()[0] == 0 else None)
        if differing:
            raise UserError(
                f"{folder.parent} holds an interrupted evaluation with another {differing}: the two "
                f"can't be mixed. Give the same again, or another --output, or delete {folder} to start again"
            )

    def _differing(self) -> str:
        """Names of the settings in which an evaluation in the folder differs, or an empty text."""
        file = self.folder / KEY
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else self.key
        return ", ".join(name for name in {**self.key, **stored} if self.key.get(name) != stored.get(name))

    def exists(self) -> bool:
        """Whether there is something to continue from."""
        return _newest(self.folder)[0] > 0

    def is_due(self, done: int) -> bool:
        """Whether it is time to write, ``done`` captions being measured."""
        return self.every > 0 and done - self._last >= self.every

    def load(self, metrics: Sequence[ImageMetric]) -> int:
        """Restore the metrics, which have just been reset; returns how many captions are done. Collective."""
        rank, world = rank_and_world_size()
        self._last, files = from_rank_zero(_newest(self.folder) if rank == 0 else None)
        for path in files[rank::world]:
            try:
                states = torch.load(path, weights_only=True)
            except Exception as error:  # each kind of damage raises another type
                raise UserError(
                    f"the interrupted evaluation {path} can't be read ({first_line(error)}); delete "
                    f"{self.folder} to start again"
                ) from error
            for metric in metrics:
                metric.restore(states[metric.name])
        return self._last

    def save(self, metrics: Sequence[ImageMetric], done: int) -> None:
        """Write the states after ``done`` captions. Collective.

        Raises:
            UserError: the folder can't be written.
        """
        rank, world = rank_and_world_size()
        file = self.folder / f"done_{done}_rank_{rank}_of_{world}.pt"
        states = {metric.name: metric.snapshot() for metric in metrics}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if rank == 0 and not (self.folder / KEY).is_file():
                write_text_atomically(self.folder / KEY, json.dumps(self.key, indent=1, ensure_ascii=False))
            with written_whole(file) as partial:
                torch.save(states, partial)
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by the latter
            raise UserError(
                f"{self.folder} can't be written: {first_line(error)}; {how_to_go_on(self.folder)}; or "
                "switch the saving of unfinished evaluations off with --save-every 0"
            ) from error
        from_every_rank(None)  # all have written
        if rank == 0:
            for path in self.folder.glob("done_*.pt"):
                if not path.name.startswith(f"done_{done}_"):
                    path.unlink()
        self._last = done

    def discard(self) -> None:
        """Remove the folder, the evaluation being complete; call it on rank zero."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


def _newest(folder: Path) -> tuple[int, list[Path]]:
    """The longest complete state in a folder: captions done, and its files."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(folder.glob("done_*.pt")):
        done, _, world = (int(part) for part in path.stem.split("_")[1::2])
        found.setdefault((done, world), []).append(path)
    complete = [(done, files) for (done, world), files in found.items() if len(files) == world]
    return max(complete, default=(0, []))


def how_to_go_on(folder: Path) -> str:
    """What to do where the disk is full or can't be written."""
    if done := _newest(folder)[0]:
        return (
            f"make room or give permission, and the same command goes on after the {done} pictures whose "
            "measuring is saved"
        )
    return "make room or give permission, and start again: nothing that was measured had been saved yet"
