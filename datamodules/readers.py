"""Texts out of files, one at a time and in constant memory.

Lines of text, CSV, TSV, JSON Lines and Parquet, each also as .gz or .zst, and Hugging Face dataset folders.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from common.errors import UserError, first_line

USUAL_COLUMNS = ("prompt", "caption", "text")
"""Taken (in any letter case) where no column is named and the file has exactly one of them."""
COMPRESSIONS = (".gz", ".zst")
_KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_ROWS = 65536  # of Parquet files and dataset folders, held in memory at a time

OnBytes = Callable[[int], object]


def read_texts(path: str | Path, column: str | None = None, on_bytes: OnBytes | None = None) -> Iterator[str]:
    """Yield one text per line or row, without blanks at its ends; "" where a line or value is empty.

    The suffix says what the file is; a file of an unknown suffix is text with one prompt a line. Quotation
    marks mean nothing in TSV. Blank lines are no rows of CSV, TSV and JSON Lines.

    Args:
        path: The file, or a folder written by ``Dataset.save_to_disk``.
        column: Name of the column of a table. None: its only one, or its only one of `USUAL_COLUMNS`.
        on_bytes: Called with the number of bytes read from the disk, as they are read; for progress bars.

    Raises:
        UserError: while iterating. The file is missing, damaged, cut off in the middle of a line or not UTF-8
            (the line is named), has no such column (those it has are named), or its reader isn't installed.
    """
    path = Path(path)
    try:
        if path.is_dir():
            yield from _dataset_folder(path, column)
        elif not path.is_file():
            raise UserError(
                f"prompts file {path} does not exist; give the path of a UTF-8 text file with one prompt a "
                "line, or of a .csv, .tsv, .jsonl or .parquet file"
            )
        else:
            with _opened(path, on_bytes) as stream:
                yield from _texts(path, stream, column)
    except OSError as error:  # first_line: gzip and zstd raise these without strerror
        raise UserError(
            f"prompts file {path} cannot be read: {error.strerror or first_line(error)}; change its "
            "permissions or give another file"
        ) from error


def is_compressed(path: Path) -> bool:
    """Whether the file is a .gz or .zst."""
    return path.suffix.lower() in COMPRESSIONS


def is_dataset_folder(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def optional_package(name: str, purpose: str) -> Any:
    """Import a package of the extra ``datasets``.

    Raises:
        UserError: it isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f'{purpose} needs the package {package}: run pip install -e ".[datasets]"') from error


class _CountedFile(io.FileIO):
    """A file that reports how many bytes were read from it."""

    def __init__(self, path: Path, on_bytes: OnBytes | None) -> None:
        super().__init__(path, "rb")
        self._on_bytes = on_bytes

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        if self._on_bytes is not None:
            self._on_bytes(count or 0)
        return count


def _opened(path: Path, on_bytes: OnBytes | None) -> IO[bytes]:
    stream = io.BufferedReader(_CountedFile(path, on_bytes), 1 << 20)
    if path.suffix.lower() == ".gz":
        return gzip.open(stream)  # type: ignore[return-value]
    return _zstd().open(stream) if path.suffix.lower() == ".zst" else stream


def _zstd() -> Any:
    try:
        return importlib.import_module("compression.zstd")  # Python 3.14
    except ImportError:
        return optional_package("backports.zstd", "reading .zst files")


def _texts(path: Path, stream: IO[bytes], column: str | None) -> Iterator[str]:
    suffix = (path.with_suffix("") if is_compressed(path) else path).suffix.lower()
    kind = _KINDS.get(suffix)
    if suffix == ".json":
        raise UserError(f"{path} is one JSON document; save it as JSON Lines (.jsonl), one object a line")
    if kind == "parquet":
        return _parquet(path, stream, column)
    lines = _lines(path, stream)
    if kind == "jsonl":
        return _json_lines(path, lines, column)
    return _delimited(path, lines, column, kind) if kind else (line.strip() for line in lines)


def _lines(path: Path, stream: IO[bytes]) -> Iterator[str]:
    number = 0
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if path.suffix.lower() == ".zst":
        damage = (*damage, _zstd().ZstdError)
    try:
        for number, line in enumerate(stream, start=1):
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts file {path} is not UTF-8: line {number} holds the byte "
            f"0x{error.object[error.start]:02x}; save the file as UTF-8"
        ) from error
    except damage as error:
        raise UserError(
            f"{path} is damaged or cut off after line {number} ({first_line(error)}); fetch or pack it again"
        ) from error


def choose_column(path: Path, column: str | None, present: Sequence[str]) -> str:
    """Return the name of the column to read.

    Raises:
        UserError: there is no such column, or none was named and it isn't clear which is meant.
    """
    usual = [name for name in present if name.lower() in USUAL_COLUMNS]
    choices = list(present) if len(present) == 1 else usual
    listed = ", ".join(repr(name) for name in present)
    if column is not None:
        if column not in present:
            raise UserError(f"{path} has no column {column!r}; it has {listed}; name one of these")
        return column
    if len(choices) != 1:
        raise UserError(f"{path} has the columns {listed}; name the one with the prompts (column)")
    return choices[0]


def _delimited(path: Path, lines: Iterator[str], column: str | None, kind: str) -> Iterator[str]:
    rows = (
        csv.reader(lines, strict=True)
        if kind == "csv"
        else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    )
    try:
        header = [name.strip() for name in next(rows, [])]
        if not header:
            return
        place = header.index(choose_column(path, column, header))
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}: line {rows.line_num} has {len(row)} fields and the header {len(header)}; the "
                    "file was cut off there, or a field that holds the separator lacks quotation marks"
                )
            yield row[place].strip()
    except csv.Error as error:
        raise UserError(
            f"{path}: line {rows.line_num} can't be read ({error}); the file was cut off, or a quotation "
            "mark isn't closed"
        ) from error


def _json_lines(path: Path, lines: Iterator[str], column: str | None) -> Iterator[str]:
    name: str | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: line {number} is no JSON ({error.msg}); the file was cut off there, or isn't one "
                "object a line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no JSON object; write one object a line")
        name = name or choose_column(path, column, list(row))
        if name not in row:
            choose_column(Path(f"{path}: line {number}"), name, list(row))
        text = _text(row[name], path, f"line {number}", name)
        if "\\u" in line and not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{path}: line {number} holds half a surrogate pair (\\ud…); correct the line")
        yield text


def _text(value: Any, path: Path, where: str, column: str) -> str:
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"{path}: {where}: column {column!r} holds a {kind}, not text; name another column")
    return (value or "").strip()


def _parquet(path: Path, stream: IO[bytes], column: str | None) -> Iterator[str]:
    arrow = optional_package("pyarrow", "reading Parquet files")
    parquet = optional_package("pyarrow.parquet", "reading Parquet files")
    try:
        with tempfile.TemporaryFile() as unpacked:
            if is_compressed(path):  # the table of contents is at the end of the file
                shutil.copyfileobj(stream, unpacked)
                stream = unpacked
            file = parquet.ParquetFile(stream)
            name = choose_column(path, column, file.schema_arrow.names)
            first = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[name]):
                yield from _arrow_texts(batch.column(0), path, first, name)
                first += len(batch)
    except (arrow.ArrowInvalid, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is damaged or cut off ({first_line(error)}); fetch or write it again"
        ) from error


def _arrow_texts(values: Any, path: Path, first: int, column: str) -> Iterator[str]:
    for row, value in enumerate(values, start=first + 1):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: row {row} of column {column!r} is not UTF-8; write the file again"
            ) from error
        yield _text(text, path, f"row {row}", column)


def _dataset_folder(path: Path, column: str | None) -> Iterator[str]:
    if not is_dataset_folder(path):
        raise UserError(
            f"{path} is a folder, but no Hugging Face dataset (Dataset.save_to_disk); give a file or a glob "
            "pattern for the files in it"
        )
    if (splits := path / "dataset_dict.json").is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        folders = ", ".join(str(path / name) for name in names)
        raise UserError(f"{path} holds several splits; give the folder of one: {folders}")
    datasets = optional_package("datasets", "reading Hugging Face dataset folders")
    arrow = optional_package("pyarrow", "reading Hugging Face dataset folders")
    try:
        data = datasets.load_from_disk(str(path))
        name = choose_column(path, column, data.column_names)
        rows = data.select_columns([name]).with_format("arrow")
        for first in range(0, len(data), _ROWS):
            yield from _arrow_texts(rows[first : first + _ROWS].column(0), path, first, name)
    except arrow.ArrowInvalid as error:
        raise UserError(f"{path} is damaged or cut off ({first_line(error)}); fetch it again") from error
