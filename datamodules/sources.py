"""Where prompts come from: a list, a file, a glob pattern, a dataset folder, or several with weights."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from common.errors import UserError
from datamodules.cleaning import Cleaning
from datamodules.order import PromptDraws, Texts, epoch_shares
from datamodules.store import Part, chunks, names_of, open_store
from datamodules.tables import is_packed

IN_MEMORY_BYTES = 32 * 2**20
"""Sources of up to about this size (some 500,000 prompts) are read into memory; larger ones get a store."""
_PACKED = 4  # text is packed to about a quarter in .gz, .zst and Parquet

Given = str | list[str] | list[dict[str, Any]]
"""A path or pattern, a list of prompts, or a list of sources, each a mapping of the fields of `PromptSource`.

Mappings, not `PromptSource` itself: the command line would read the file that a path names for a list of
objects."""


@dataclass
class PromptSource:
    """One of several sources of prompts.

    Attributes:
        path: A file, a glob pattern (``**`` reaches into folders) or a dataset folder; see `read_texts`.
        column: Name of the column of a table. None: ``data.column``.
        weight: Share of the draws, relative to those of the other sources. All sources have one, or none.
    """

    path: str
    column: str | None = None
    weight: float | None = None


class PromptPools:
    """Everything that a stream of prompts is drawn from.

    Sources without weights are one pool, read one after the other; with weights each is a pool of its own.
    A pool's texts are read into memory if they are few, else written into a store.

    Args:
        given: What they come from.
        column: Column of sources that name none.
        cleaning: What is dropped. With weights, repeats are looked for within each source.
        epoch_size: Draws in an epoch; to be given if the sources have weights, and only then.
        key: Name of the setting, for messages.

    Raises:
        UserError: a source does not exist, a list is empty, or the settings don't fit together. Opening
            raises what `read_texts` and `open_store` raise.
    """

    def __init__(
        self,
        given: Given,
        column: str | None = None,
        cleaning: Cleaning | None = None,
        epoch_size: int | None = None,
        key: str = "data.prompts",
    ) -> None:
        self.cleaning = cleaning or Cleaning()
        self.pools: list[list[Part]] = []
        self._texts: list[Texts] | None = None
        weights: list[float] = []
        if isinstance(given, list) and all(isinstance(item, str) for item in given):
            texts, counts = self._cleaned([listed_prompts(given, key)], key)  # type: ignore[arg-type]
            self._texts = [texts]
            if counts["kept"] < counts["read"]:
                _print(f"{key}: {self.cleaning.describe(counts)}")
        else:
            sources = [PromptSource(given)] if isinstance(given, str) else _sources(given, key)
            weights = [source.weight for source in sources if source.weight is not None]
            if weights and len(weights) < len(sources):
                raise UserError(
                    f"{key}: some sources have a weight and some have none; give all one, or none"
                )
            parts = [
                [(path, source.column or column) for path in matching_paths(source.path)]
                for source in sources
            ]
            self.pools = parts if weights else [sum(parts, [])]
        if bool(weights) != (epoch_size is not None):
            raise UserError(
                f"data.epoch_size is {epoch_size}; it is the number of draws in an epoch, to be given if the "
                f"sources in {key} have weights, and only then"
            )
        self.shares = None if epoch_size is None else epoch_shares(weights, epoch_size)

    @property
    def is_small(self) -> bool:
        """Whether opening takes no store."""
        return all(_is_small(parts) for parts in self.pools)

    def open(self) -> list[Texts]:
        """Return the texts of each pool; read at the first call, which says what was read."""
        if self._texts is None:
            self._texts = [self._open(parts) for parts in self.pools]
        return self._texts

    def draws(self, seed: int) -> PromptDraws:
        """Return what stands at each place of the stream of this seed."""
        return PromptDraws(self.open(), seed, self.shares)

    def _open(self, parts: list[Part]) -> Texts:
        if _is_small(parts):
            texts, counts = self._cleaned(chunks(parts), names_of(parts))
            place = ""
        else:
            texts, counts, file = open_store(parts, self.cleaning)
            place = f", in {file}"
        first = texts.take(np.zeros(1, np.int64))[0]
        kept = self.cleaning.describe(counts)
        _print(f"{names_of(parts)}: {kept}{place}. The first: {first[:80]!r}")
        return texts

    def _cleaned(self, texts: Iterable[list[str]], name: str) -> tuple[Texts, Counter[str]]:
        counts = Counter[str]()
        kept = [text for chunk in self.cleaning.kept(texts, counts) for text in chunk]
        self.cleaning.check(counts, name)
        return Texts(kept), counts


def _sources(given: list[Any], key: str) -> list[PromptSource]:
    sources = []
    for number, item in enumerate(given, 1):
        try:
            sources.append(item if isinstance(item, PromptSource) else PromptSource(**item))
        except TypeError as error:
            raise UserError(
                f"{key}: source {number} is {item!r}; give each a path and, if wanted, a column and a weight"
            ) from error
    return sources


def listed_prompts(given: list[str], key: str) -> list[str]:
    """Return the prompts of a list without blanks at their ends.

    Raises:
        UserError: the list is empty, holds an empty prompt, or holds the name of a file.
    """
    prompts = [prompt.strip() for prompt in given]
    if not prompts or not all(prompts):
        raise UserError(
            f"{key} is an empty list or holds an empty prompt; give at least one prompt, or a file"
        )
    for prompt in prompts:
        if len(prompt) < 256 and Path(prompt).suffix and Path(prompt).is_file():
            raise UserError(f"{key} is a list of prompts, but {prompt!r} is a file; write {{path: {prompt}}}")
    return prompts


def matching_paths(pattern: str) -> list[Path]:
    """Return the path if there is such a file or folder, else the files that match the pattern, sorted.

    Raises:
        UserError: there is none.
    """
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [Path(pattern)]
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    found = [path for path in paths if path.is_file() or (path / "state.json").is_file()]
    if not found:
        raise UserError(f"no prompts file matches {pattern}; correct the pattern")
    return found


def _is_small(parts: list[Part]) -> bool:
    """Whether the sources hold less text than `IN_MEMORY_BYTES`; reading a missing one says that it is."""
    size = 0
    for path, _ in parts:
        packed = is_packed(path) or path.suffix.lower() == ".parquet"
        files = path.glob("*.arrow") if path.is_dir() else [path] if path.is_file() else []
        size += sum(file.stat().st_size for file in files) * (_PACKED if packed else 1)
    return size <= IN_MEMORY_BYTES


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)
