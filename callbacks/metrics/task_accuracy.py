"""Share of pictures that show what their prompts ask for, by task: for GenEval and its twin."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.extractors import ExtractorSpec
from common.errors import UserError
from common.hashing import hash_json
from datamodules.task_prompts import Entry, read_entries


class TaskAccuracy(ImageMetric):
    """The mean over the tasks of their shares of right pictures. Higher is better.

    A subclass sets ``tasks`` and ``configuration`` (what to evaluate with) and implements ``judge``.

    Args:
        spec: the network that sees the pictures.
        prompts: the benchmark's file; None is refused when it is needed.
    """

    tasks: tuple[str, ...] = ()
    configuration: str = ""

    right: Tensor
    seen: Tensor

    def __init__(self, spec: ExtractorSpec | None, prompts: str | None) -> None:
        super().__init__(spec)
        self.prompts = prompts
        self._read: list[Entry] = []
        self._wanted: list[Entry] = []
        self._results: dict[str, dict[str, Any]] = {}

    @property
    def entries(self) -> list[Entry]:
        """The benchmark's lines, read when first needed.

        Raises:
            UserError: no file is named, or it is none of the benchmark's.
        """
        if self.prompts is None:
            raise UserError(
                f"{self.name} needs the benchmark's file, which says what each picture must show: set its "
                f"`prompts`, or evaluate with --config {self.configuration} --captions FILE"
            )
        if not self._read:
            self._read = read_entries(self.prompts, self.tasks)
        return self._read

    @abstractmethod
    def judge(self, features: Tensor, wanted: list[Entry]) -> list[bool]:
        """Which pictures are right, by their features [B, …] and the lines of their prompts."""

    def prepare(
        self,
        captions: Sequence[str],
        groups: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
    ) -> None:
        """Learn what each picture must show, by its prompt and, where there are groups, its task.

        Raises:
            UserError: a prompt is none of the benchmark's, or has several lines that differ.
        """
        known: dict[tuple[str, str], Entry] = {}
        for entry in self.entries:
            for tag in ("", entry["tag"]):
                if known.setdefault((entry["prompt"], tag), entry) != entry:
                    known[entry["prompt"], tag] = {}
        self._wanted = []
        for caption, tag in zip(captions, groups or [""] * len(captions)):
            wanted = known.get((caption, tag))
            if not wanted:
                what = "no prompt" if wanted is None else "in several lines that differ"
                raise UserError(
                    f"{self.name}: {caption!r} is {what} of {self.prompts}"
                    + (f" in the task {tag!r}" if tag else "")
                    + ", so nothing says what its pictures must show: draw the benchmark's prompts "
                    f"(--config {self.configuration})"
                )
            self._wanted.append(wanted)

    def setup_states(self, width: int) -> None:
        """Right pictures and pictures seen, for each task."""
        for name in ("right", "seen"):
            self.add_sum(name, len(self.tasks), dtype=torch.long)

    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        if positions is None or not self._wanted:
            raise ValueError(f"{self.name} needs prepare() and the positions of the pictures")
        wanted = [self._wanted[place] for place in positions]
        for entry, is_right in zip(wanted, self.judge(features, wanted), strict=True):
            task = self.tasks.index(entry["tag"])
            self.right[task] += is_right
            self.seen[task] += 1

    def _value(self) -> Tensor:
        right, seen = self.right.double().cpu(), self.seen.cpu()
        shares = right / seen
        self._results = {
            task: {"value": float(shares[i]), "num_images": int(seen[i]), "right": int(right[i])}
            for i, task in enumerate(self.tasks)
            if seen[i]
        }
        return shares[seen > 0].mean()

    def settings(self) -> dict[str, Any]:
        """What is looked for."""
        return {"prompts": hash_json({"prompts": self.entries})}

    def details(self) -> dict[str, Any]:
        """The share of each task, too."""
        return super().details() | {"tasks": self._results, "value_is": "the mean over the tasks"}

    def results(self) -> dict[str, dict[str, Any]]:
        """The mean, and ``NAME/TASK`` of each task. Collective."""
        overall = self.result()
        return self.with_parts(overall, self._results, "tasks", "value_is")
