"""What an evaluation draws: captions, seeds, and what a published protocol asks for beside them.

Here: captions from any file, pairs with negative prompts. The sets of publications are in
`datamodules.published_sets`. Each class is named in YAML by its `class_path`.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from datamodules.picture_files import Frame
from datamodules.prompts import EVAL_CAPTIONS
from datamodules.tables import is_table, read_column


@dataclass(frozen=True)
class EvaluationSet:
    """The pictures of an evaluation, before they are drawn.

    Attributes:
        name: of the protocol, or of the file.
        captions: what to draw; ``seeds``: one for each.
        negatives: what not to draw, one for each, or None. ``groups``: e.g. the style of each, or None.
        frame: crop and resize of drawn and real pictures, or None for none.
        facts: where the captions come from, for the manifest.
        published_count: pictures of the published protocol; None where there is none.
        published_references: real pictures of the published protocol; None where it has none.
        notes: known deviations of this set from the publication.
        files: existing picture of each caption, or None.
    """

    name: str
    captions: list[str]
    seeds: list[int]
    negatives: list[str] | None = None
    groups: list[str] | None = None
    frame: Frame | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    published_count: int | None = None
    published_references: int | None = None
    notes: tuple[str, ...] = ()
    files: list[str] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, count: int | None) -> EvaluationSet:
        """The first ``count`` captions with their seeds (all for None): a few-sample variant.

        Of grouped captions, as many of each group: ``count`` must be a multiple of the number of groups.

        Raises:
            UserError: there are not that many, or they can't be shared out equally.
        """
        if count is None or count == len(self):
            return self
        if not 1 <= count <= len(self):
            raise UserError(
                f"count is {count}, but {self.name} has {len(self)} captions; choose 1 to {len(self)}"
            )
        chosen = list(range(count))
        if self.groups is not None and len(names := list(dict.fromkeys(self.groups))) > 1:
            if count % len(names):
                raise UserError(
                    f"count is {count}, which the {len(names)} groups of {self.name} "
                    f"({', '.join(names)}) can't "
                    f"share equally; choose a multiple of {len(names)}"
                )
            places = {name: [i for i, group in enumerate(self.groups) if group == name] for name in names}
            smallest = min(names, key=lambda name: len(places[name]))
            if count // len(names) > len(places[smallest]):
                raise UserError(
                    f"count is {count}, so {count // len(names)} captions of each of the {len(names)} "
                    f"groups, but {smallest!r} of {self.name} has {len(places[smallest])}; choose at most "
                    f"{len(names) * len(places[smallest])}"
                )
            chosen = [i for name in names for i in places[name][: count // len(names)]]
        pick = lambda values: None if values is None else [values[i] for i in chosen]  # noqa: E731
        return replace(
            self,
            captions=[self.captions[i] for i in chosen],
            seeds=[self.seeds[i] for i in chosen],
            negatives=pick(self.negatives),
            groups=pick(self.groups),
            files=pick(self.files),
            facts=self.facts | {"first_of": len(self)},
        )


class EvaluationSource(ABC):
    """Builds an evaluation set; constructors only take settings, files are read by ``load``."""

    @abstractmethod
    def load(self) -> EvaluationSet:
        """Read the files.

        Raises:
            UserError: a file is missing, another one than the protocol's, or lacks a column.
        """

    def file_names(self) -> list[str] | None:
        """File of each caption's existing picture; None: the pictures in the order of their names."""
        return None


class CaptionFile(EvaluationSource):
    """Captions from a text, CSV, TSV, JSON, JSON Lines or Parquet file; seed i belongs to caption i.

    Args:
        captions: the file; None: the bundled evaluation captions.
        column: of the captions; None: the only one, or the only one of caption, prompt and text.
        negative_column: of negative prompts; None: there are none.
        group_column: e.g. a category; None: there is none.
        file_column: of the names of existing pictures, read only where a folder of pictures is evaluated.
        sample: draw this many of the captions at random; None: all, in order.
        sample_seed: of that draw.
        seed: of the first picture; caption i has ``seed + i``.
        frame: crop and resize before the metrics; None: none.
    """

    def __init__(
        self,
        captions: str | None = None,
        column: str | None = None,
        negative_column: str | None = None,
        group_column: str | None = None,
        file_column: str = "file",
        sample: int | None = None,
        sample_seed: int = 0,
        seed: int = 0,
        frame: Frame | None = None,
    ) -> None:
        self.captions = str(EVAL_CAPTIONS) if captions is None else captions
        self.column, self.negative_column, self.group_column = column, negative_column, group_column
        self.file_column = file_column
        self.sample, self.sample_seed, self.seed, self.frame = sample, sample_seed, seed, frame

    def load(self) -> EvaluationSet:
        """Read the file."""
        path = self.captions
        captions = read_column(path, self.column)
        negatives = second_column(path, self.negative_column) if self.negative_column else None
        groups = second_column(path, self.group_column) if self.group_column else None
        facts: dict[str, Any] = {"file": Path(path).name, "md5": md5(path)}
        if self.sample is not None:
            chosen = sample(len(captions), self.sample, self.sample_seed, path)
            captions = [captions[i] for i in chosen]
            negatives = negatives and [negatives[i] for i in chosen]
            groups = groups and [groups[i] for i in chosen]
            facts |= {"sampled": self.sample, "sample_seed": self.sample_seed}
        seeds = [self.seed + i for i in range(len(captions))]
        name = Path(path).stem if self.sample is None else f"{Path(path).stem}, {self.sample} at random"
        return EvaluationSet(name, captions, seeds, negatives, groups, self.frame, facts)

    def file_names(self) -> list[str] | None:
        """Those of the table's ``file_column``; a text file has none."""
        if not is_table(self.captions):
            return None
        names = read_column(self.captions, self.file_column)
        if self.sample is None:
            return names
        return [names[i] for i in sample(len(names), self.sample, self.sample_seed, self.captions)]


class PromptPairs(CaptionFile):
    """Prompts with a negative prompt each, as in NegOpt: a CSV, TSV, JSON Lines or Parquet file.

    Args:
        captions: the file.
        column, negative_column: of prompt and negative prompt.
        sample, sample_seed, seed: as for `CaptionFile`.
    """

    def __init__(
        self,
        captions: str | None = None,
        column: str = "prompt",
        negative_column: str = "negative_prompt",
        sample: int | None = None,
        sample_seed: int = 0,
        seed: int = 0,
    ) -> None:
        if captions is None:
            raise UserError("PromptPairs needs a file of prompt pairs; give --captions pairs.csv")
        super().__init__(captions, column, negative_column, sample=sample, sample_seed=sample_seed, seed=seed)


def second_column(path: str, name: str) -> list[str]:
    """A column beside the captions.

    Raises:
        UserError: it is no table, or has no such column.
    """
    if not is_table(path):
        raise UserError(
            f"{path} is a text file, so it has no column {name!r}; give a CSV, TSV, JSON Lines or "
            "Parquet file"
        )
    return read_column(path, name)


def sample(size: int, count: int, seed: int, what: str) -> list[int]:
    """``count`` different places of 0 to size - 1 in random order, a function of the arguments only.

    Raises:
        UserError: there are fewer than ``count``.
    """
    if not 1 <= count <= size:
        raise UserError(f"sample is {count}, but {what} has {size} captions; choose 1 to {size}")
    return random.Random(f"evaluation sample {seed}").sample(range(size), count)


def md5(path: str | Path) -> str:
    """MD5 of a file, the checksum that published lists are known by."""
    return hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest()
