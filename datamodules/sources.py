"""Where prompts come from: a list, a file, a glob pattern, a dataset folder, or several with weights.

What doesn't fit into memory is written once into a memory-mapped Arrow file (a store) and read from there.
Stores lie in the user's cache folder (``$ONE_STEP_CACHE``, default ``~/.cache/one-step-distillation``), as
``prompts/<key>.arrow``; the key is a hash of the source files' paths, sizes and times, their columns and the
cleaning, so that the same prompts are prepared once. A file appears when it is complete.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import ROOT, user_cache_dir, written_whole
from datamodules.order import PromptDraws, Texts, epoch_shares
from datamodules.tables import describe, is_packed, read_texts

CAPTIONS = ROOT / "assets" / "captions.txt"
EVAL_CAPTIONS = ROOT / "assets" / "eval_captions.txt"
VAL_CAPTIONS = ROOT / "assets" / "choosing_captions.txt"
"""The bundled ones: of training, reports, and validations."""
IN_MEMORY_BYTES = 32 * 2**20
"""Sources of up to about this size (some 500,000 prompts) are read into memory; larger ones get a store."""
_MOST_IN_MEMORY = 8 * IN_MEMORY_BYTES  # characters; packed sources may unpack to more than they promise
_SPARE_BYTES = 2**30  # of the disk that a store must leave free
_PACKED = 4  # text is packed to about a quarter in .gz, .zst and Parquet
_FORMAT = 3  # raised when stores of an older version of this file must not be used
_CHUNK = 65536  # texts handled at a time

Part = tuple[Path, str | None]
"""A source file (or dataset folder) and the column to read."""
Given = str | list[str] | list[dict[str, Any]] | list[Any]
"""A path or pattern, a list of prompts, or a list of sources, each a mapping of the fields of `PromptSource`.

Mappings, not `PromptSource` itself: the command line would read the file that a path names for a list of
objects."""


@dataclass(frozen=True)
class Cleaning:
    """What is dropped from a source, besides empty texts.

    Attributes:
        min_length: Texts with fewer characters are dropped. None: none.
        max_length: Texts with more characters are dropped. None: none.
        deduplicate: Texts that have come before are dropped.
    """

    min_length: int | None = None
    max_length: int | None = None
    deduplicate: bool = False

    def __post_init__(self) -> None:
        shortest, longest = self.min_length or 1, self.max_length
        if shortest < 1 or (longest is not None and longest < shortest):
            raise UserError(
                f"data.min_length {self.min_length} and data.max_length {longest} leave no length; they are "
                "numbers of characters, at least 1, the second not below the first"
            )

    def kept(self, chunks: Iterable[list[str]], counts: Counter[str]) -> Iterator[list[str]]:
        """Yield the texts to keep of each chunk, in their order.

        Args:
            counts: gets the numbers of texts ``read``, ``kept``, and dropped as ``empty``, ``short``,
                ``long`` or ``repeated``.
        """
        shortest, longest = self.min_length or 1, self.max_length or float("inf")
        seen = SeenTexts()
        for texts in chunks:
            counts["read"] += len(texts)
            kept = [text for text in texts if shortest <= len(text) <= longest]
            if len(kept) < len(texts):
                counts["empty"] += texts.count("")
                counts["short"] += sum(0 < len(text) < shortest for text in texts)
                counts["long"] += sum(len(text) > longest for text in texts)
            if self.deduplicate and kept:
                is_first = seen.first_times(kept).tolist()
                counts["repeated"] += is_first.count(False)
                kept = [text for text, first in zip(kept, is_first, strict=True) if first]
            counts["kept"] += len(kept)
            yield kept

    def describe(self, counts: Mapping[str, int]) -> str:
        """One sentence of these counts, like "3 of 5 prompts kept (dropped: 1 empty, 1 repeated)"."""
        words = {
            "empty": "empty",
            "long": f"above {self.max_length} characters",
            "repeated": "repeated",
            "short": f"below {self.min_length} characters",
        }
        parts = ", ".join(f"{counts[key]:,} {word}" for key, word in words.items() if counts.get(key))
        return f"{counts['kept']:,} of {counts['read']:,} prompts kept (dropped: {parts or 'none'})"

    def check(self, counts: Mapping[str, int], name: str) -> None:
        """Refuse the source of this name if nothing of it is kept."""
        if not counts["kept"]:
            after = f" after cleaning: {self.describe(counts)}" if counts["read"] else ""
            raise UserError(f"prompts file {name} is empty{after}; add prompts, one a line, or drop less")


class SeenTexts:
    """Recognises texts by 64-bit hashes, 8 bytes each, in sorted arrays of growing length.

    Among 100 million different texts one is taken for a repeat, and dropped, with a probability of 0.03 %.
    """

    def __init__(self) -> None:
        self.runs: list[NDArray[np.uint64]] = []

    def first_times(self, texts: list[str]) -> NDArray[np.bool_]:
        """Return for each text whether it has not come before: bool [n]."""
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
        hashes, places = np.unique(np.frombuffer(digests, "<u8"), return_index=True)
        is_new = np.ones(len(hashes), bool)
        for run in self.runs:
            nearest = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            is_new &= run[nearest] != hashes
        result = np.zeros(len(texts), bool)
        result[places[is_new]] = True
        new = hashes[is_new]
        # runs shrink by half at least from one to the next, so there are few, and each hash moves seldom
        while self.runs and len(self.runs[-1]) < 2 * len(new):
            new = np.concatenate([self.runs.pop(), new])
            new.sort(kind="stable")  # two sorted halves: merged, in half the memory of a copy
        if len(new):
            self.runs.append(new)
        return result


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
        if isinstance(given, list) and not any(isinstance(item, dict | PromptSource) for item in given):
            found = self._cleaned([listed_prompts(given, key)], key)
            assert found is not None
            (texts, counts) = found
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

    def describe(self) -> str:
        """How many prompts of which files and columns; opens them."""
        parts = sum(self.pools, [])
        columns = ",".join(dict.fromkeys(column for _, column in parts if column))
        where = (names_of(parts) or "a list") + (f", column {columns}" if columns else "")
        return f"{sum(map(len, self.open())):,} from {where}"

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
        found = self._cleaned(chunks(parts), names_of(parts), _MOST_IN_MEMORY) if _is_small(parts) else None
        if found is not None:
            (texts, counts), place = found, ""
        else:  # large, or unpacked to more than its size promised
            texts, counts, file = open_store(parts, self.cleaning)
            place = f", in {file}"
        first = texts.take(np.zeros(1, np.int64))[0]
        kept = self.cleaning.describe(counts)
        read = describe(*parts[0])
        _print(f"{names_of(parts)}{read}: {kept}{place}. The first: {first[:80]!r}")
        return texts

    def _cleaned(
        self, texts: Iterable[list[str]], name: str, most: float = float("inf")
    ) -> tuple[Texts, Counter[str]] | None:
        """Texts and counts; None if there are more characters than `most`."""
        counts, kept = Counter[str](), list[str]()
        for chunk in self.cleaning.kept(texts, counts):
            kept += chunk
            most -= sum(map(len, chunk))
            if most < 0:
                return None
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


def listed_prompts(given: list[Any], key: str) -> list[str]:
    """Return the prompts of a list without blanks at their ends.

    Raises:
        UserError: the list is empty, holds an empty prompt, or holds the name of a file.
    """
    for place, prompt in enumerate(given, 1):
        if not isinstance(prompt, str):
            raise UserError(
                f"{key}: entry {place} is {prompt!r}, no text: YAML reads yes, no, 1980 and the like as "
                "other things unless they stand in quotation marks"
            )
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


def open_store(parts: list[Part], cleaning: Cleaning) -> tuple[Texts, Counter[str], Path]:
    """Return the texts of these sources, one after the other, from their store; make it if there is none yet.

    One process makes it while others wait. What one that was killed has left is removed.

    Returns:
        The texts, the counts of `Cleaning.kept`, and the store's file.

    Raises:
        UserError: a source can't be read, changes meanwhile or holds no prompt; the store can't be written
            or read.
    """
    key = _key(parts, cleaning)
    file = user_cache_dir() / "prompts" / f"{key}.arrow"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):  # goes with its holder, however that ends
            if not file.is_file():
                _make(parts, cleaning, file, key)
    except OSError as error:
        raise UserError(
            f"the prompt store {file} can't be written: {error.strerror or error}; make room, or set "
            "ONE_STEP_CACHE to a folder on another disk"
        ) from error
    from datasets import Dataset  # takes seconds to import, so only where it is needed

    try:
        counts = Counter(json.loads(file.with_suffix(".json").read_text(encoding="utf-8")))
        return Texts(Dataset.from_file(str(file))), counts, file
    except (OSError, ValueError) as error:  # an ArrowInvalid is a ValueError
        raise UserError(
            f"the prompt store {file} can't be read ({first_line(error)}); delete it, and it is made again"
        ) from error


def _key(parts: list[Part], cleaning: Cleaning) -> str:
    sources = []
    for path, column in parts:
        if not path.exists():
            raise UserError(f"prompts file {path} does not exist any more; bring it back or give another")
        states = [file.stat() for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        # the time of the last change (ctime) can't be set back by hand
        stamps = [[state.st_size, state.st_mtime_ns, state.st_ctime_ns] for state in states]
        sources.append([str(path.resolve()), stamps, column])
    return hashlib.sha256(json.dumps([_FORMAT, sources, vars(cleaning)]).encode()).hexdigest()[:16]


def _make(parts: list[Part], cleaning: Cleaning, file: Path, key: str) -> None:
    import pyarrow

    for leftover in file.parent.glob(f".{file.name}.*"):  # of a process that was killed
        leftover.unlink()
    schema, counts = pyarrow.schema([("prompt", pyarrow.string())]), Counter[str]()
    with written_whole(file) as partial:
        with (
            pyarrow.ipc.new_stream(str(partial), schema) as writer,
            tqdm(desc=f"Prompt store {file}", unit=" prompts", unit_scale=True) as bar,
        ):
            for texts in cleaning.kept(chunks(parts), counts):
                if shutil.disk_usage(file.parent).free < _SPARE_BYTES + sum(map(len, texts)):
                    raise OSError(errno.ENOSPC, "less than 1 GiB of the disk would be left")
                writer.write_batch(pyarrow.record_batch([texts], schema=schema))
                bar.update(counts["read"] - bar.n)
        cleaning.check(counts, names_of(parts))
        if _key(parts, cleaning) != key:
            raise UserError(
                f"{names_of(parts)} changed while being read; start again when the files are complete"
            )
        file.with_suffix(".json").write_text(json.dumps(counts), encoding="utf-8")


def names_of(parts: list[Part]) -> str:
    """The first paths, for messages."""
    return ", ".join(str(path) for path, _ in parts[:3]) + (" …" if len(parts) > 3 else "")


def chunks(parts: Iterable[Part]) -> Iterator[list[str]]:
    """Yield the texts of the sources, one after the other, in lists of up to `_CHUNK`."""
    texts = (text for path, column in parts for text in read_texts(path, column))
    while chunk := list(islice(texts, _CHUNK)):
        yield chunk


@rank_zero_only
def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
