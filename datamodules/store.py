"""Prompts that don't fit into memory: written once into a memory-mapped Arrow file, then read from there.

Stores lie in the user's cache folder (``$ONE_STEP_CACHE``, default ``~/.cache/one-step-distillation``), as
``prompts/<key>/``; the key is a hash of the contents of the source files, their columns and the cleaning, so
that the same prompts are prepared once, whatever the files are called. A folder appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import user_cache_dir
from common.hashing import hash_folder
from datamodules.cleaning import Cleaner, Cleaning
from datamodules.order import Places
from datamodules.tables import read_texts

FORMAT = 2  # raised when stores of an older version of this file must not be used
CHUNK = 65536  # texts handled at a time
_ARROW, _REPORT = "prompts.arrow", "report.json"

Part = tuple[Path, str | None]
"""A source file (or dataset folder) and the column to read."""


def stores_folder() -> Path:
    """Where stores are kept."""
    return user_cache_dir() / "prompts"


class PromptStore:
    """The texts of a complete store folder, memory-mapped; as a list that takes no memory.

    Raises:
        UserError: the folder holds no readable store.
    """

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset  # takes seconds to import, so only where it is needed

        self.folder = folder
        try:
            self.report: dict[str, Any] = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
            self._data = Dataset.from_file(str(folder / _ARROW))
        except (OSError, ValueError) as error:  # an ArrowInvalid is a ValueError
            raise UserError(
                f"the prompt store {folder} can't be read ({first_line(error)}); delete the folder, and it "
                "will be made again"
            ) from error

    def __reduce__(self) -> tuple[type[PromptStore], tuple[Path]]:
        return PromptStore, (self.folder,)  # worker processes map the file themselves

    def __len__(self) -> int:
        return len(self._data)

    def take(self, rows: Places) -> list[str]:
        """Return the texts of these rows."""
        return self._data[rows.tolist()]["prompt"]


def open_store(parts: list[Part], cleaning: Cleaning, estimate: int) -> PromptStore:
    """Return the store of these sources, one after the other; make it if there is none yet.

    One process makes it while others wait. One that was killed leaves a folder ``<key>.partial``, which the
    next one removes.

    Args:
        parts: The source files and their columns.
        cleaning: What is dropped.
        estimate: About how many bytes the store will take.

    Raises:
        UserError: a source can't be read, changes meanwhile or holds no prompt; there is too little space.
    """
    key = _key(parts, cleaning)
    folder = stores_folder() / key[:16]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))  # goes with its holder, however that ends
        try:
            held = lock.acquire(timeout=0.1)
        except Timeout:
            print(f"waiting for another process that makes the prompt store {folder}", flush=True)
            held = lock.acquire()
        with held:
            if not (folder / _REPORT).is_file():
                _check_space(estimate, folder.parent)
                _make(parts, cleaning, folder, key)
    except OSError as error:
        raise UserError(
            f"the prompt store {folder} can't be written: {error.strerror or error}; make room, or set "
            "ONE_STEP_CACHE to a folder on another disk"
        ) from error
    return PromptStore(folder)


def file_hash(path: Path) -> str:
    """SHA-256 of a file or dataset folder; computed again only when size or times have changed.

    Raises:
        UserError: it does not exist or can't be read.
    """
    if not path.exists():
        raise UserError(f"prompts file {path} does not exist any more; bring it back or give another")
    try:
        # the time of the last change (ctime) can't be set back by hand
        states = [file.stat() for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        stamp = [[state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for state in states]
        name = hashlib.sha256(f"{path.resolve()} {stamp}".encode()).hexdigest()[:32]
        note = stores_folder() / "hashes" / name
        if note.is_file():
            return note.read_text(encoding="utf-8")
        digest = _digest(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{uuid4().hex}.partial")
        partial.write_text(digest, encoding="utf-8")
        partial.replace(note)
    except OSError as error:
        raise UserError(
            f"the contents of {path} can't be read or noted: {error.strerror or error} ({error.filename}); "
            "give another file, or set ONE_STEP_CACHE to a folder that can be written"
        ) from error
    return digest


def _digest(path: Path) -> str:
    if path.is_dir():
        return hash_folder(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _key(parts: list[Part], cleaning: Cleaning) -> str:
    sources = [[file_hash(path), "".join(path.suffixes[-2:]), column] for path, column in parts]
    return hashlib.sha256(json.dumps([FORMAT, sources, vars(cleaning)]).encode()).hexdigest()


def _check_space(estimate: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    needed, left = (f"{max(count / 2**30, 0.1):.1f} GiB" for count in (estimate, free))
    sizes = f"about {needed} of {left} free in {folder}"
    if estimate > free:
        raise UserError(f"the prompt store takes {sizes}; make room, or set ONE_STEP_CACHE to another folder")
    print(f"Making a prompt store: {sizes}", flush=True)


def _make(parts: list[Part], cleaning: Cleaning, folder: Path, key: str) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        report = _write(parts, cleaning, partial)
        if _key(parts, cleaning) != key:
            raise UserError(
                f"{names_of(parts)} changed while being read; start again when the files are complete"
            )
        (partial / _REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(parts: list[Part], cleaning: Cleaning, folder: Path) -> dict[str, Any]:
    """Write the Arrow file; return the report."""
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    cleaner, features = Cleaner(cleaning), Features({"prompt": Value("string")})
    with (
        ArrowWriter(features=features, path=str(folder / _ARROW), writer_batch_size=CHUNK) as writer,
        tqdm(desc="Prompt store", unit=" prompts", unit_scale=True) as bar,
    ):
        for texts in chunks(parts):
            if kept := cleaner.keep(texts):
                writer.write_batch({"prompt": kept})
            bar.update(len(texts))
        writer.finalize()
    cleaner.check_kept(names_of(parts))
    sources = [{"path": str(path), "column": column} for path, column in parts]
    size = (folder / _ARROW).stat().st_size
    return {**cleaner.report(), "bytes": size, "sources": sources, "cleaning": vars(cleaning)}


def names_of(parts: list[Part]) -> str:
    """The first paths, for messages."""
    return ", ".join(str(path) for path, _ in parts[:3]) + (" …" if len(parts) > 3 else "")


def chunks(parts: Iterable[Part]) -> Iterator[list[str]]:
    """Yield the texts of the sources, one after the other, in lists of up to `CHUNK`."""
    texts = (text for path, column in parts for text in read_texts(path, column))
    while chunk := list(islice(texts, CHUNK)):
        yield chunk
