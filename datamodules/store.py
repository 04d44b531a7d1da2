"""Prompts that don't fit into memory: written once into a memory-mapped Arrow file, then read from there.

The files lie in the user's cache folder (``$ONE_STEP_CACHE``, default ``~/.cache/one-step-distillation``), as
``prompts/<key>.arrow``; the key is a hash of the source files' paths, sizes and times, their columns and the
cleaning, so that the same prompts are prepared once. A file appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import user_cache_dir, written_whole
from datamodules.cleaning import Cleaning
from datamodules.order import Texts
from datamodules.tables import read_texts

FORMAT = 3  # raised when stores of an older version of this file must not be used
CHUNK = 65536  # texts handled at a time

Part = tuple[Path, str | None]
"""A source file (or dataset folder) and the column to read."""


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
    return hashlib.sha256(json.dumps([FORMAT, sources, vars(cleaning)]).encode()).hexdigest()[:16]


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
    """Yield the texts of the sources, one after the other, in lists of up to `CHUNK`."""
    texts = (text for path, column in parts for text in read_texts(path, column))
    while chunk := list(islice(texts, CHUNK)):
        yield chunk
