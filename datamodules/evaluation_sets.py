"""What an evaluation draws: captions, seeds, and what a published protocol asks for beside them.

Here: captions from any file, pairs with negative prompts. The sets of publications are in
`datamodules.published_sets`. Each class is named in YAML by its `class_path`.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from common.errors import UserError
from datamodules.picture_files import Frame
from datamodules.sources import EVAL_CAPTIONS
from datamodules.tables import FILE_COLUMNS, choose_column, columns, read_column, read_files

Item = TypeVar("Item")
_LISTS = ("captions", "seeds", "negatives", "groups", "files", "told")


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
        told: what a benchmark says about each caption, for its own judge, or None.
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
    told: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def images_per_prompt(self) -> int:
        """Pictures of each prompt, which follow each other; 1 where the numbers differ."""
        runs = set(runs_of(self.captions))
        return runs.pop() if len(runs) == 1 else 1

    def take(self, places: Iterable[int]) -> EvaluationSet:
        """The captions at these places, with all that belongs to them."""
        lists = {name: getattr(self, name) for name in _LISTS}
        chosen = list(places)
        taken: dict[str, Any] = {
            name: values and [values[i] for i in chosen] for name, values in lists.items()
        }
        return replace(self, **taken)

    def first(self, count: int | None, setting: str = "count") -> EvaluationSet:
        """The first ``count`` captions with their seeds (all for None): a few-sample variant.

        Of grouped captions, as many of each group: ``count`` must be a multiple of the number of groups.

        Args:
            count: how many. ``setting``: where it was set, for the message.

        Raises:
            UserError: there are not that many, or they can't be shared out equally.
        """
        if count is None or count == len(self):
            return self
        places: dict[str, list[int]] = {}
        for place, group in enumerate(self.groups or [""] * len(self)):
            places.setdefault(group, []).append(place)
        share, rest = divmod(count, len(places))
        smallest = min(map(len, places.values()))
        if rest or not 1 <= share <= smallest:
            groups = f", a multiple of {len(places)} (its groups: {', '.join(places)})"
            raise UserError(
                f"{setting} is {count}, but {self.name} has {len(self)} captions; choose {len(places)} to "
                f"{len(places) * smallest}{groups if self.groups else ''}"
            )
        chosen = [place for group in places.values() for place in group[:share]]
        return replace(self.take(chosen), facts=self.facts | {"first_of": len(self)})


@dataclass
class EvaluationSource(ABC):
    """Builds an evaluation set; constructors only take settings, files are read by ``load``."""

    needs: ClassVar[str] = ""
    """What to give; empty where the bundled captions serve, too."""
    captions: str | None = None

    @abstractmethod
    def load(self) -> EvaluationSet:
        """Read the files.

        Raises:
            UserError: a file is missing, another one than the protocol's, or lacks a column.
        """

    def file_names(self) -> list[str] | None:
        """File of each caption's existing picture; None: the pictures in the order of their names."""
        return None

    def path(self) -> str:
        """Path of the captions.

        Raises:
            UserError: none is given, where one is needed.
        """
        if self.captions is None and self.needs:
            raise UserError(f"{type(self).__name__} needs {self.needs}")
        return self.captions or str(EVAL_CAPTIONS)


@dataclass
class CaptionFile(EvaluationSource):
    """Captions from a text, CSV, TSV, JSON, JSON Lines or Parquet file; seed i belongs to caption i.

    Args:
        captions: the file; None: the bundled evaluation captions.
        column: of the captions; None: the only one, or the only one of caption, prompt and text.
        negative_column: of negative prompts; None: there are none.
        group_column: e.g. a category; None: there is none.
        file_column: of the names of existing pictures, read only where a folder of pictures is evaluated;
            None: the only one called file, file_name or image; of COCO's annotations what they say.
        images_per_prompt: pictures of each caption, one after the other, each with a seed of its own.
        sample: draw this many of the captions at random; None: all, in order.
        sample_seed: of that draw.
        seed: of the first picture; caption i has ``seed + i``.
        frame: crop and resize before the metrics; None: none.
    """

    column: str | None = None
    negative_column: str | None = None
    group_column: str | None = None
    file_column: str | None = None
    sample: int | None = None
    sample_seed: int = 0
    seed: int = 0
    frame: Frame | None = None
    images_per_prompt: int = 1

    def load(self) -> EvaluationSet:
        """Read the file."""
        path = self.path()
        captions = self._captions(path)
        chosen = repeated(self._chosen(len(captions)), self.images_per_prompt)
        negatives, groups = (
            [values[i] for i in chosen] if (values := name and read_column(path, name)) else None
            for name in (self.negative_column, self.group_column)
        )
        name, facts = Path(path).stem, facts_of(path)
        if self.sample is not None:
            name = f"{name}, {self.sample} at random"
            facts |= {"sampled": self.sample, "sample_seed": self.sample_seed}
        if self.images_per_prompt > 1:
            facts |= {"images_per_prompt": self.images_per_prompt}
        seeds = [self.seed + i for i in range(len(chosen))]
        return EvaluationSet(name, [captions[i] for i in chosen], seeds, negatives, groups, self.frame, facts)

    def file_names(self) -> list[str] | None:
        """Those of the table's ``file_column`` or of COCO's annotations; lines of text have none."""
        names = read_files(self.path(), self.file_column)
        if names is None and (present := columns(self.path())):  # its order is not that of the pictures
            choose_column(self.path(), FILE_COLUMNS[0], present)
        if names and self.images_per_prompt > 1:
            raise UserError(
                f"{self.path()} names one picture for each row, so images_per_prompt is 1: give every "
                "picture a row, those of one caption one after the other"
            )
        return names and [names[i] for i in self._chosen(len(names))]

    def _captions(self, path: str) -> list[str]:
        return read_column(path, self.column)

    def _places(self, size: int) -> list[int]:
        """Places of the captions that a sample is drawn from."""
        return list(range(size))

    def _chosen(self, size: int) -> list[int]:
        """Places of the captions to take, of ``size``: a function of the settings only."""
        places = self._places(size)
        if self.sample is None:
            return places
        if not 1 <= self.sample <= len(places):
            raise UserError(
                f"sample is {self.sample}, but {self.path()} has {len(places)} captions; choose 1 to "
                f"{len(places)}"
            )
        return random.Random(f"evaluation sample {self.sample_seed}").sample(places, self.sample)


@dataclass
class PromptPairs(CaptionFile):
    """Prompts with a negative prompt each, as in NegOpt: a CSV, TSV, JSON Lines or Parquet file.

    Args:
        captions: the file.
        column: of the prompts.
        negative_column: of the negative prompts.
        group_column, file_column, sample, sample_seed, seed, frame: as for `CaptionFile`.
    """

    needs: ClassVar[str] = "a file of prompt pairs; give --captions pairs.csv"
    column: str | None = "prompt"
    negative_column: str | None = "negative_prompt"


def repeated(items: Sequence[Item], count: int) -> list[Item]:
    """Each of the items ``count`` times, one after the other.

    Raises:
        UserError: count is below 1.
    """
    if count < 1:
        raise UserError(f"images_per_prompt is {count}: it must be at least 1")
    return [item for item in items for _ in range(count)]


def runs_of(captions: Sequence[str]) -> list[int]:
    """Lengths of the runs of equal captions: pictures of one prompt follow each other."""
    return [len(list(run)) for _, run in groupby(captions)]


def facts_of(path: str) -> dict[str, Any]:
    """Name of a file and its MD5, the checksum that published lists are known by."""
    digest = hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest()
    return {"file": Path(path).name, "md5": digest}
