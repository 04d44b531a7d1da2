"""Checkpoints on disk: written to a temporary name, then given their names, each in one step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

REPLACED = ".old.tmp"
"""Ending of a folder that is being replaced, in place of ``.ckpt``."""


class PlainFile(TorchCheckpointIO):
    """Writes a checkpoint straight to its file, and keeps what went wrong for the caller.

    Lightning's own copies the whole checkpoint in memory, then writes it to the system's folder for temporary
    files, where a killed run leaves it. An error raised here would leave the other processes waiting at a
    barrier; `RunCheckpoint` takes `error` and raises it on all of them.
    """

    error: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write; an error of the file system is noted in `error`."""
        self.error = None
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch wraps what the file raises
            self.error = error


def root_cause(error: BaseException) -> BaseException:
    """Return the file system's error behind another one, or that itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing; a folder that was being replaced gets its name back."""
    for aside in folder.glob(f"*{REPLACED}"):
        target = folder / f"{aside.name.removesuffix(REPLACED)}.ckpt"
        if not target.exists():
            os.replace(aside, target)
    for leftover in folder.glob("*.tmp"):
        remove(leftover)


def publish(temporary: Path, targets: list[Path]) -> None:
    """Give a complete checkpoint its names, each atomically; a reader sees the old file or the new one."""
    _flush_to_disk(temporary)
    for target in targets[1:]:
        give_name(temporary, target)
    _replace(temporary, targets[0])
    _flush_to_disk(targets[0].parent)


def give_name(source: Path, target: Path) -> None:
    """Give a complete checkpoint another name, too."""
    staged = target.with_suffix(".link.tmp")
    remove(staged)
    if source.is_dir():
        shutil.copytree(source, staged)
        _flush_to_disk(staged)
    else:
        try:
            os.link(source, staged)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, staged)
            _flush_to_disk(staged)
    _replace(staged, target)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():  # a folder (sharded checkpoint) cannot be replaced in one call
        aside = target.with_suffix(REPLACED)
        remove(aside)
        os.replace(target, aside)
        os.replace(source, target)
        remove(aside)
    else:
        os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder and the files in it, so that a rename never precedes the content."""
    for item in [*path.iterdir(), path] if path.is_dir() and path.suffix == ".tmp" else [path]:
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
