"""Where prompts come from: a list, a file, a glob pattern, a dataset folder, or several with weights."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from common.errors import UserError
from datamodules.cleaning import Cleaner, Cleaning
from datamodules.order import ListedTexts, PromptDraws, Texts, epoch_shares
from datamodules.store import Part, chunks, names_of, open_store
from datamodules.tables import is_compressed, is_dataset_folder

IN_MEMORY_BYTES = 32 * 2**20
"""Sources of up to about this size (some 500,000 prompts) are read into memory; larger ones get a store."""
_PACKED = 4  # text is packed to about a quarter in .gz, .zst and Parquet


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


def as_sources(
    given: str | list[str] | list[dict[str, Any]] | list[PromptSource],
) -> str | list[str] | list[PromptSource]:
    """The setting `data.prompts` with its mappings (as in YAML) made into sources.

    Mappings, not `PromptSource` itself, are the setting's type: the command line would read the file that
    a path names for a list of objects.

    Raises:
        UserError: a mapping has an unknown key or no path.
    """
    if isinstance(given, str) or not any(isinstance(item, dict) for item in given):
        return given  # type: ignore[return-value]
    known = {field.name for field in fields(PromptSource)}
    for number, item in enumerate(given, 1):
        if not isinstance(item, dict) or "path" not in item or set(item) - known:
            raise UserError(
                f"data.prompts: source {number} is {item!r}; give each a path and, if wanted, a column and a "
                "weight"
            )
    return [PromptSource(**item) for item in given]  # type: ignore[arg-type]


class PromptPool:
    """Files that are read as one source: into memory if they are small, else into a store.

    Args:
        sources: Their paths, read one after the other.
        column: Column of sources that name none.
        cleaning: What is dropped from them.

    Raises:
        UserError: a path does not exist; reading raises what `read_texts` and `open_store` raise.
    """

    def __init__(self, sources: Sequence[PromptSource], column: str | None, cleaning: Cleaning) -> None:
        self.parts: list[Part] = [
            (path, source.column or column) for source in sources for path in matching_paths(source.path)
        ]
        self.cleaning = cleaning
        self.estimate = sum(_text_bytes(path) for path, _ in self.parts)

    @property
    def is_small(self) -> bool:
        """Whether the texts are kept in memory."""
        return self.estimate <= IN_MEMORY_BYTES

    def open(self) -> Texts:
        """Read the files, or open their store, which takes a while the first time; say what was read."""
        texts: Texts
        if self.is_small:
            cleaner = Cleaner(self.cleaning)
            texts = ListedTexts([text for chunk in chunks(self.parts) for text in cleaner.keep(chunk)])
            cleaner.check_kept(names_of(self.parts))
            report, place = cleaner.report(), ""
        else:
            texts = store = open_store(self.parts, self.cleaning, self.estimate)
            report, place = store.report, f", in {store.folder}"
        first = texts.take(np.zeros(1, np.int64))[0]
        kept = self.cleaning.describe(report)
        _print(f"{names_of(self.parts)}: {kept}{place}. The first: {first[:80]!r}")
        return texts


class PromptPools:
    """Everything that a stream of prompts is drawn from.

    Args:
        given: A path or pattern; a list of prompts; or a list of sources.
        column: Column of sources that name none.
        cleaning: What is dropped. With weights, repeats are looked for within each source.
        epoch_size: Draws in an epoch; to be given if the sources have weights, and only then.
        key: Name of the setting, for messages.

    Raises:
        UserError: a source does not exist, a list is empty, or the settings don't fit together.
    """

    def __init__(
        self,
        given: str | list[str] | list[PromptSource],
        column: str | None = None,
        cleaning: Cleaning | None = None,
        epoch_size: int | None = None,
        key: str = "data.prompts",
    ) -> None:
        cleaning = cleaning or Cleaning()
        self.shares: list[int] | None = None
        self._texts: list[Texts] | None = None
        if not isinstance(given, list):
            given = [PromptSource(given)]
        sources = [source for source in given if isinstance(source, PromptSource)]
        weights = [source.weight for source in sources if source.weight is not None]
        if weights and len(weights) < len(sources):
            raise UserError(f"{key}: some sources have a weight and some have none; give all one, or none")
        if bool(weights) != (epoch_size is not None):
            raise UserError(
                f"data.epoch_size is {epoch_size}; it is the number of draws in an epoch, to be given if the "
                f"sources in {key} have weights, and only then"
            )
        if epoch_size is not None:
            self.shares = epoch_shares(weights, epoch_size)
        pools = [[source] for source in sources] if weights else [sources] if sources else []
        self.pools = [PromptPool(pool, column, cleaning) for pool in pools]
        if not sources:
            texts = listed_prompts([str(text) for text in given], key)
            cleaner = Cleaner(cleaning)
            self._texts = [ListedTexts(cleaner.keep(texts))]
            if cleaner.num_kept < len(texts):
                _print(f"{key}: {cleaning.describe(cleaner.report())}")

    @property
    def is_small(self) -> bool:
        """Whether opening takes no store."""
        return all(pool.is_small for pool in self.pools)

    def open(self) -> list[Texts]:
        """Return the texts of each source; read at the first call."""
        if self._texts is None:
            self._texts = [pool.open() for pool in self.pools]
        return self._texts

    def draws(self, seed: int) -> PromptDraws:
        """Return what stands at each place of the stream of this seed."""
        return PromptDraws(self.open(), seed, self.shares)


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
    found = [path for path in paths if path.is_file() or is_dataset_folder(path)]
    if not found:
        raise UserError(f"no prompts file matches {pattern}; correct the pattern")
    return found


def _text_bytes(path: Path) -> int:
    """About how many bytes of text a source holds, 0 if there is none (reading it says so)."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.arrow"))
    if not path.is_file():
        return 0
    packed = is_compressed(path) or path.suffix.lower() == ".parquet"
    return path.stat().st_size * (_PACKED if packed else 1)


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)
