"""Reads the checkpoints of this version of the project."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from common.errors import UserError, first_line

FORMAT = 1
"""Raised when what a checkpoint holds changes so that other versions can't read it; none in it means 1."""
KEY = "checkpoint_format"
_INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_OF_AN_INDEX = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((module, kind) for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")),
    *((_METADATA, kind) for kind in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata",
      "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}  # fmt: skip
"""All that PyTorch names in the index of a checkpoint in shards."""


def read(path: Path, whole: bool = True) -> Any:
    """Content of a checkpoint, on the CPU; runs no code from a file, whose tensors stay on disk until used.

    Args:
        path: the file, or the folder of a checkpoint in shards.
        whole: all of it, against its check sums; false leaves out what is in shards.

    Raises:
        UserError: it is missing, cut short, or holds more than plain data and tensors.
    """
    try:
        if is_sharded(path):
            check_index(path / _INDEX)
            if whole:
                return consolidated(path)
        file = path / "meta.pt" if path.is_dir() else path
        if whole:
            _check_sums(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (Exception, CheckpointException) as error:  # of a different type for each kind of damage
        raise UserError(
            f"{path} can't be read as a checkpoint: {reason(error)}; give one that `fit` wrote"
        ) from error


def reason(error: BaseException) -> str:
    """Why a checkpoint can't be read, in one line."""
    if isinstance(error, CheckpointException):  # of shards: that of any process, raised on all of them
        error = next(iter(error.failures.values()))[0]
    if "Weights only load failed" in str(error):  # and PyTorch's advice to read it with code and all
        return "it holds more than plain data and tensors, or is cut short, and no code in it is run"
    if isinstance(error, zipfile.BadZipFile):
        return "it is cut short, or no checkpoint"
    return first_line(error)


def check_format(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another version of the project with a UserError."""
    found = checkpoint.get(KEY, 1)
    if found != FORMAT:
        age = "a later" if isinstance(found, int) and found > FORMAT else "another"
        raise UserError(
            f"{path} was written by {age} version of this project (checkpoint format {found}, this one reads "
            f"{FORMAT}); continue it with that version, or export its student there and start from the folder"
        )


def is_sharded(path: Path) -> bool:
    """Whether the path is the folder of a checkpoint in shards."""
    return path.is_dir() and (path / "meta.pt").is_file()


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _OF_AN_INDEX:
            raise pickle.UnpicklingError(
                f"its index {_INDEX} names {module}.{name}, which is in no such index and might be run"
            )
        return super().find_class(module, name)


def check_index(file: Path) -> Any:
    """Read an index, which is a pickle; an UnpicklingError if it names more than what an index holds."""
    with file.open("rb") as stream:
        return _IndexReader(stream).load()


def _check_sums(file: Any) -> None:
    """Raise a ValueError where bytes are not those that `torch.save` wrote: it leaves CRC-32 sums."""
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"its part {damaged} is damaged (it does not match its check sum)")


def check_shards(path: Path, rank: int = 0, processes: int = 1) -> None:
    """Check the sums of one process's share of a checkpoint in shards, where each tensor is an archive.

    Raises:
        Exception: of a type for each kind of damage.
    """
    places = sorted({(str(one.relative_path), one.offset, one.length)
                     for one in check_index(path / _INDEX).storage_data.values()})  # fmt: skip
    for name, offset, length in places[rank::processes]:
        if Path(name).name != name:
            raise ValueError(f"its index names {name}, which is not beside it")
        with (path / name).open("rb") as stream:
            stream.seek(offset)
            _check_sums(io.BytesIO(stream.read(length)))


@contextmanager
def plain_shards() -> Iterator[None]:
    """While it is open, PyTorch's reader of checkpoints in shards runs no code from them.

    By itself it takes the index, and each value that is no tensor, as pickles, which may run anything.
    """
    read_index, load_value = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes

    def checked_index(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_index(Path(self.path) / _INDEX)
        return read_index(self, *args, **kwargs)

    def checked_value(self: Any, item: Any, value: Any) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        load_value(self, item, value)

    FileSystemReader.read_metadata = checked_index  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = checked_value  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FileSystemReader.read_metadata = read_index  # type: ignore[method-assign]
        DefaultLoadPlanner.load_bytes = load_value  # type: ignore[method-assign]


def consolidated(path: Path) -> dict[str, Any]:
    """Return what a single process would have saved, on the CPU; takes the memory of the whole checkpoint."""
    check_shards(path)
    with plain_shards():
        content: dict[str, Any] = _load_distributed_checkpoint(path)
    numbers = sorted(int(name[len("optimizer_") :]) for name in content if name.startswith("optimizer_"))
    content["optimizer_states"] = [_by_number(content.pop(f"optimizer_{number}")) for number in numbers]
    return content


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """Optimizer states by the parameter's place in its groups, as `Optimizer.load_state_dict` wants them."""
    numbers: dict[str, int] = {}
    groups = []
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    states = {numbers[name]: values for name, values in state["state"].items()}
    return {"state": states, "param_groups": groups}
