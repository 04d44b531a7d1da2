"""Prompts that don't fit into memory: written once into a memory-mapped Arrow file, then read from there.

Stores lie in the user's cache folder (``$ONE_STEP_CACHE``, default ``~/.cache/one-step-distillation``), as
``prompts/<key>/``; the key is a hash of the contents of the source files, their columns and the cleaning, so
that the same prompts are prepared once, whatever the files are called. A folder appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import user_cache_dir
from datamodules.cleaning import Cleaner, Cleaning, describe
from datamodules.order import Places
from datamodules.readers import optional_package, read_texts

FORMAT = 1  # raised when stores of an older version of this file must not be used
CHUNK = 65536  # texts handled at a time
_ARROW, _REPORT = "prompts.arrow", "report.json"
_PURPOSE = "keeping many prompts on disk"

Part = tuple[Path, str | None]
"""A source file (or dataset folder) and the column to read."""


def stores_folder() -> Path:
    """Where stores are kept."""
    return user_cache_dir() / "prompts"


class PromptStore:
    """The texts of a complete store folder, memory-mapped; as a list that takes no memory.

    Raises:
        UserError: the folder holds no readable store, or the package `datasets` isn't installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        datasets = optional_package("datasets", _PURPOSE)
        arrow = optional_package("pyarrow", _PURPOSE)
        try:
            self.report: dict[str, Any] = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
            self._data = datasets.Dataset.from_file(str(folder / _ARROW))
        except (OSError, ValueError, arrow.ArrowInvalid) as error:
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
    optional_package("datasets", _PURPOSE)
    key = _key(parts, cleaning)
    folder = stores_folder() / key[:16]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not (folder / _REPORT).is_file():
                _make(parts, cleaning, estimate, folder, key)
    except OSError as error:
        raise UserError(
            f"the prompt store {folder} can't be written: {error.strerror or error}; make room, or set "
            "ONE_STEP_CACHE to a folder on another disk"
        ) from error
    store = PromptStore(folder)
    _print(f"Prompt store {folder}: {describe(store.report, cleaning)}")
    return store


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder; computed again only when size or times have changed.

    Raises:
        UserError: it does not exist or can't be read.
    """
    if not path.exists():
        raise UserError(f"prompts file {path} does not exist any more; bring it back or give another")
    try:
        stamp = _stamp(path)
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        note = stores_folder() / "hashes" / f"{name}.json"
        known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if known.get("stamp") == stamp:
            return known["hash"]
        digest = _digest(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"path": str(path), "stamp": stamp, "hash": digest}), encoding="utf-8")
        partial.replace(note)
    except OSError as error:
        raise UserError(
            f"the contents of {path} can't be read or noted: {error.strerror or error} ({error.filename}); "
            "give another file, or set ONE_STEP_CACHE to a folder that can be written"
        ) from error
    return digest


def _key(parts: list[Part], cleaning: Cleaning) -> str:
    sources = [[file_hash(path), "".join(path.suffixes[-2:]), column] for path, column in parts]
    return hashlib.sha256(json.dumps([FORMAT, sources, vars(cleaning)]).encode()).hexdigest()


def _stamp(path: Path) -> list[list[int]]:
    """Size and times of a file or of all files of a folder; the time of change can't be set back by hand."""
    states = [file.stat() for file in _files(path)]
    return [[state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for state in states]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _digest(path: Path) -> str:
    digest, files = hashlib.sha256(), _files(path)
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Hashing {path.name}", delay=2) as bar:
        for file in files:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block))
    return digest.hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make a store; the lock goes with its holder, however that ends."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        print(f"waiting for another process that makes the prompt store {folder}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(parts: list[Part], cleaning: Cleaning, estimate: int, folder: Path, key: str) -> None:
    free = shutil.disk_usage(folder.parent).free
    sizes = f"about {_size(estimate)} of {_size(free)} free in {folder.parent}"
    if estimate > free:
        raise UserError(f"the prompt store takes {sizes}; make room, or set ONE_STEP_CACHE to another folder")
    print(f"Making a prompt store: {sizes}", flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():  # left by a process that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        report = _write(parts, cleaning, partial)
        if _key(parts, cleaning) != key:
            raise UserError(
                f"{_names(parts)} changed while being read; start again when the files are complete"
            )
        (partial / _REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(parts: list[Part], cleaning: Cleaning, folder: Path) -> dict[str, Any]:
    """Write the Arrow file; return the report."""
    datasets = optional_package("datasets", _PURPOSE)
    writing = optional_package("datasets.arrow_writer", _PURPOSE)
    features = datasets.Features({"prompt": datasets.Value("string")})
    cleaner = Cleaner(cleaning)
    total = sum(size for path, _ in parts for size, *_ in _stamp(path))
    with (
        writing.ArrowWriter(features=features, path=str(folder / _ARROW), writer_batch_size=CHUNK) as writer,
        tqdm(total=total, unit="B", unit_scale=True, desc="Prompt store") as bar,
    ):
        for texts in chunks(text for path, column in parts for text in read_texts(path, column, bar.update)):
            if kept := cleaner.keep(texts):
                writer.write_batch({"prompt": kept})
            bar.set_postfix_str(f"{cleaner.num_kept:,} prompts", refresh=False)
        writer.finalize()
    if not cleaner.num_kept:
        raise UserError(no_prompt_left(parts, cleaner))
    sources = [{"path": str(path), "column": column} for path, column in parts]
    size = (folder / _ARROW).stat().st_size
    return {**cleaner.report(), "bytes": size, "sources": sources, "cleaning": vars(cleaning)}


def no_prompt_left(parts: list[Part], cleaner: Cleaner) -> str:
    """The message when the sources are empty or nothing of them is kept."""
    if not cleaner.num_read:
        return f"prompts file {_names(parts)} is empty; write one prompt a line into it"
    kept = describe(cleaner.report(), cleaner.cleaning)
    return f"prompts file {_names(parts)} is empty after cleaning: {kept}; add prompts or drop less"


def _names(parts: list[Part]) -> str:
    return ", ".join(str(path) for path, _ in parts[:3]) + (" …" if len(parts) > 3 else "")


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of up to `CHUNK` texts."""
    iterator = iter(texts)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)
