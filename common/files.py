"""Where files of the project lie, and results written at once: no file is ever half-written.

A result is made beside its place and renamed.
"""

import difflib
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from common.errors import UserError

LOCK = ".lock"
"""Name of the file by which a process holds a folder."""
ROOT = Path(__file__).resolve().parents[1]
"""Where configs/ and assets/ lie: the checkout, or the folder into which pip has installed the packages."""


def asset_path(path: str | Path) -> Path:
    """Resolve a path: as it stands, else among what the project brings (`assets/...`, `configs/...`).

    The path is returned unchanged if neither exists, so that messages name what the user wrote.
    """
    given = Path(path).expanduser()
    if given.exists() or given.is_absolute():
        return given
    bundled = ROOT / given
    return bundled if bundled.exists() else given


def at_home(value: Any) -> Any:
    """The value, and what is in it, with ~ at the beginning of a path as the home folder, as in shells."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if isinstance(value, dict):
        return {name: at_home(item) for name, item in value.items()}
    return [at_home(item) for item in value] if isinstance(value, list) else value


def missing_advice(path: str | Path) -> str:
    """What to do about a model that is not there; an installation has the texts of `assets/` only."""
    is_installed = not (ROOT / "pyproject.toml").is_file()
    if is_installed and Path(path).parts[:1] == ("assets",):
        return "It is not part of the installed package: clone the repository or name a model."
    return nearest_path(path) or "Check the path."


def nearest_path(path: str | Path) -> str:
    """ "Did you mean X?" about a path that is not there, by the first part of it that is missing; or ""."""
    given = Path(path).expanduser()
    for root in (Path(), *(() if given.is_absolute() else (ROOT,))):
        for part in (given, *given.parents):
            parent = root / part.parent
            if not (root / part).exists() and parent.is_dir():
                names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
                for name in difflib.get_close_matches(part.name, names, n=1):
                    whole = part.with_name(name) / given.relative_to(part)
                    return f"Did you mean {whole if (root / whole).exists() else part.with_name(name)}?"
    return ""


def check_output_folder(output: Path, own_names: Callable[[Path], set[str]]) -> Path:
    """Resolve `output` and make sure that a result may be written there; call it before any long work.

    A folder that is not empty is replaced only if all it holds is a former result of the same kind: what
    `own_names` gives for it (empty set: it is none).

    Raises:
        UserError: it is a file, can't be written, or holds something else.
    """
    target = check_writable_folder(output)
    if target.is_dir():
        foreign = sorted({entry.name for entry in target.iterdir()} - own_names(target))
        if foreign:
            raise UserError(
                f"The output folder {output} holds other files ({', '.join(foreign[:3])}"
                f"{' …' if len(foreign) > 3 else ''}), which would be lost. "
                "Give an empty or new folder with --output."
            )
    return target


def check_writable_folder(output: Path, option: str = "--output") -> Path:
    """Resolve `output` and make sure that it is a folder that can be written, or that it can be made.

    Raises:
        UserError: it is a file, lies in one, or permission is missing; names the `option` to change.
    """
    target = output.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"The output {output} is a file. Give a folder with {option}.")
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"The output {output} can't be made: {existing} is a file. Give another {option}.")
    for folder in {existing, target.parent} if target.exists() else {existing}:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"The output {output} can't be written: no permission in {folder}. Give another {option}."
            )
    return target


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder; the lock goes with its holder, however that ends.

    Raises:
        UserError: another process is.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} can't be made: {error.strerror}; give another folder"
        ) from error
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another process is writing into {folder}: wait for it to end, or choose another folder"
        ) from error
    except (OSError, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Yield a new name beside `file` to write to; on success it takes the place of `file`, else it goes.

    A reader sees the old or the new content, never a part of it, also after a loss of power. What a killed
    process leaves is found by `unfinished`.
    """
    partial = file.with_name(f".{file.name}.{uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def unfinished(folder: Path) -> list[Path]:
    """The files that a killed process left behind in `written_whole`."""
    return sorted(folder.glob(".*.partial"))


def write_text_atomically(file: Path, text: str) -> None:
    """Write a text file at once, see `written_whole`; its folder must exist."""
    with written_whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _held_new(fresh: Path, target: Path) -> Iterator[None]:
    """Make a folder and hold it, after removing those for the same target that killed processes have left.

    A process holds its folder by a lock that goes with it; one that nobody holds is a leftover.
    """
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.new-????????"):
        with suppress(OSError):  # held by another process, or the file system has no locks
            descriptor = _locked(leftover)
            shutil.rmtree(leftover)
            os.close(descriptor)
    fresh.mkdir(parents=True)
    held = []
    with suppress(OSError):
        held.append(_locked(fresh))
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _locked(folder: Path) -> int:
    """Lock a folder, until the returned descriptor is closed; a BlockingIOError if another process has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def filled_at_once(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`; on success its files are moved into `target`, one rename for each.

    Other files in `target` stay. Whenever the process is killed, every file in it is complete, and up to the
    moment of moving it is an old one.

    Raises:
        UserError: files can't be written or moved (permissions, disk full).
    """
    fresh = target.with_name(f".{target.name}.new-{uuid4().hex[:8]}")
    try:
        with _held_new(fresh, target):
            yield fresh
        for file in sorted(path for path in fresh.rglob("*") if path.is_file()):
            place = target / file.relative_to(fresh)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    except OSError as error:
        raise UserError(f"The output {target} can't be written: {error}.") from error
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


@contextmanager
def written_at_once(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`; on success it takes the place of `target`, otherwise it is removed.

    Raises:
        UserError: the folder can't be made or renamed (permissions, disk full).
    """
    token = uuid4().hex[:8]
    fresh, old = (target.with_name(f".{target.name}.{word}-{token}") for word in ("new", "old"))
    try:
        with _held_new(fresh, target):
            yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except OSError as error:
        raise UserError(f"The output {target} can't be written: {error}. Give another --output.") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for leftover in (fresh, old):
            if leftover.exists():
                shutil.rmtree(leftover)


def user_cache_dir() -> Path:
    """``$ONE_STEP_CACHE``, or ``~/.cache/one-step-distillation``."""
    return Path(os.environ.get("ONE_STEP_CACHE") or Path.home() / ".cache" / "one-step-distillation")
