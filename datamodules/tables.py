"""Texts out of files, one at a time and in constant memory.

Lines of text, CSV, TSV, JSON Lines and Parquet, each also as .gz or .zst; Hugging Face dataset folders; and
lists in JSON documents, which are read whole.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from common.errors import UserError, first_line

USUAL_COLUMNS = ("prompt", "caption", "text")
"""Taken (in any letter case) where no column is named and the file has exactly one of them."""
_KINDS = {
    ".txt": "lines", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".parquet": "parquet",
}  # fmt: skip
_PACKINGS = {".gz": "gzip", ".zst": "zstd"}
_ROWS = 65536  # of Parquet files and dataset folders, held in memory at a time

Values = Iterator[tuple[str, str, Any]]
"""Where a value stands and its column, for messages, and the value."""


def read_texts(path: str | Path, column: str | None = None) -> Iterator[str]:
    """Yield one text per line or row, without blanks at its ends; "" where a line or value is empty.

    For what a file is see `kind_of`. A CSV may be separated by other signs than commas, as its first line
    says. Quotation marks mean nothing in TSV. Blank lines are no rows of CSV, TSV and JSON Lines.

    Args:
        path: The file, or a folder written by ``Dataset.save_to_disk``.
        column: Name of the column of a table. None: its only one, or its only one of `USUAL_COLUMNS`.

    Raises:
        UserError: while iterating. The file is missing, damaged, cut off in the middle of a line or not UTF-8
            (the line is named), or has no such column (those it has are named).
    """
    path = Path(path)
    try:
        if kind_of(path) == "lines":
            yield from (line.strip() for line in _lines(path))
        else:
            yield from (_text(path, *value) for value in _values(path, column))
    except OSError as error:  # first_line: some are raised without strerror
        raise UserError(
            f"prompts file {path} cannot be read: {error.strerror or first_line(error)}; change its "
            "permissions or give another file"
        ) from error


def read_column(path: str | Path, name: str | None = None) -> list[str]:
    """All texts of a column, without blanks at their ends; a text file's lines, empty ones left out.

    Args:
        path: the file; see `read_texts`.
        name: the column of a table; None: its only one, or the only one of prompt, caption and text.

    Raises:
        UserError: as `read_texts`; also if the file is empty, or a row has no text in the column.
    """
    texts = list(read_texts(path, name))
    if not is_table(path):
        texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{path} is empty; give a file with at least one caption")
    if "" in texts:
        where = f"column {name!r}" if name else "its column of captions"
        raise UserError(
            f"{path}: row {texts.index('') + 1} has no text in {where}; fill it or remove the row"
        )
    return texts


def kind_of(path: str | Path) -> str:
    """What a file is: lines, csv, tsv, jsonl, json, parquet or folder.

    The suffix says it. A file of another suffix, or none, is text with one prompt a line, unless its first
    line is a JSON object, the start of a Parquet file, or names of columns between tabs.

    Raises:
        UserError: there is no such file.
        OSError: it can't be read.
    """
    path = Path(path)
    if path.is_dir():
        return "folder"
    if not path.is_file():
        raise UserError(
            f"prompts file {path} does not exist; give the path of a UTF-8 text file with one prompt a "
            "line, or of a .csv, .tsv, .jsonl or .parquet file"
        )
    suffix = (path.with_suffix("") if is_compressed(path) else path).suffix.lower()
    return _KINDS.get(suffix) or _kind_of_content(path)


def _kind_of_content(path: Path) -> str:
    with _opened(path) as stream:
        line = stream.readline(1 << 16).decode("utf-8-sig", errors="replace")
    cells = {cell.strip(' "\r\n').lower() for cell in line.split("\t")}
    if line.startswith("PAR1"):
        return "parquet"
    if len(cells) > 1 and cells & set(USUAL_COLUMNS):
        return "tsv"
    try:
        return "jsonl" if isinstance(json.loads(line), dict) else "lines"
    except json.JSONDecodeError:
        return "lines"


def is_table(path: str | Path) -> bool:
    """Whether the file has columns; other files are text with one caption a line."""
    return kind_of(path) != "lines"


def is_compressed(path: Path) -> bool:
    """Whether the file is a .gz or .zst."""
    return path.suffix.lower() in _PACKINGS


def is_dataset_folder(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def choose_column(what: str | Path, column: str | None, present: Sequence[str]) -> str:
    """Return the name of the column to read: the wanted one, or without one that which is meant.

    Raises:
        UserError: it is not among those present, or it isn't clear which is meant; names what has them.
    """
    if column is not None and column in present:
        return column
    listed = ", ".join(repr(name) for name in present)
    if column is not None:
        raise UserError(f"{what} has no column {column!r}; it has {listed}; name one of these")
    usual = [name for name in present if name.lower() in USUAL_COLUMNS]
    choices = list(present) if len(present) == 1 else usual
    if len(choices) != 1:
        raise UserError(f"{what} has the columns {listed}; name the one with the prompts (column)")
    return choices[0]


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: it is missing, no JSON or not UTF-8.
    """
    try:
        with _opened(path) as stream:
            return json.loads(stream.read().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read as JSON: {first_line(error)}; fetch or save it again"
        ) from error


def keys_of(content: Any) -> str:
    """What a JSON value holds, for messages: the keys of an object, the kind of anything else."""
    if isinstance(content, dict):
        return "the keys " + (", ".join(map(repr, content)) or "(none)")
    return f"a {type(content).__name__}"


def _values(path: Path, column: str | None) -> Values:
    kind = kind_of(path)
    if kind in ("csv", "tsv"):
        return _delimited(path, column, kind)
    if kind in ("jsonl", "json"):
        return _json_lines(path, column) if kind == "jsonl" else _json_document(path, column)
    return _parquet(path, column) if kind == "parquet" else _dataset_folder(path, column)


def _text(path: Path, where: str, column: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"{path}: {where}: column {column!r} holds a {kind}, not text; name another column")
    return (value or "").strip()


def _opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked as they are read; damage to a packed one is an OSError without errno."""
    if not is_compressed(path):
        return path.open("rb")
    import pyarrow  # takes long to import, so only where it is needed

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=_PACKINGS[path.suffix.lower()]))


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts file {path} is not UTF-8: line {number} holds the byte "
            f"0x{error.object[error.start]:02x}; save the file as UTF-8"
        ) from error
    except OSError as error:
        raise _damage(path, error, f" after line {number}") from error


def _damage(path: Path, error: Exception, where: str = "") -> Exception:
    """What to raise for damaged contents; the error itself where the system refuses to read."""
    if isinstance(error, OSError) and error.errno:
        return error
    return UserError(f"{path} is damaged or cut off{where} ({first_line(error)}); fetch or pack it again")


def _delimited(path: Path, column: str | None, kind: str) -> Values:
    lines = _lines(path)
    first = next(lines, "")
    rows = csv.reader(
        chain([first], lines),
        delimiter="\t" if kind == "tsv" else max(",;\t|", key=first.count),  # a comma where there is none
        quoting=csv.QUOTE_NONE if kind == "tsv" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    try:
        header = [name.strip() for name in next(rows, [])]
        if not header:
            return
        name = choose_column(path, column, header)
        place = header.index(name)
        for row in filter(None, rows):
            if len(row) != len(header):
                raise UserError(
                    f"{path}: line {rows.line_num} has {len(row)} fields and the header {len(header)}; the "
                    "file was cut off there, or a field that holds the separator lacks quotation marks"
                )
            yield f"line {rows.line_num}", name, row[place]
    except csv.Error as error:
        raise UserError(
            f"{path}: line {rows.line_num} can't be read ({error}); the file was cut off, or a quotation "
            "mark isn't closed"
        ) from error


def _json_lines(path: Path, column: str | None) -> Values:
    name = None
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: {where} is no JSON ({error.msg}); the file was cut off there, or isn't one object "
                "a line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: {where} is no JSON object; write one object a line")
        name = name or choose_column(path, column, list(row))
        value = row[choose_column(f"{path}: {where}", name, list(row))]
        if "\\u" in line and any("\ud800" <= sign <= "\udfff" for sign in str(value)):
            raise UserError(f"{path}: {where} holds half a surrogate pair (\\ud…); correct the line")
        yield where, name, value


def _json_document(path: Path, column: str | None) -> Values:
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path} holds {keys_of(content)}; a list of texts or of objects is needed")
    for number, item in enumerate(content, start=1):
        where, name = f"entry {number}", ""
        if isinstance(item, dict):
            name = choose_column(f"{path}: {where}", column, list(item))
            item = item[name]
        if not isinstance(item, str):
            raise UserError(f"{path}: {where} holds {keys_of(item)} where a text is needed")
        yield where, name, item


def _parquet(path: Path, column: str | None) -> Values:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with tempfile.TemporaryFile() as unpacked, _opened(path) as stream:
            if is_compressed(path):  # the table of contents is at the end of the file
                shutil.copyfileobj(stream, unpacked)
            file = ParquetFile(unpacked if is_compressed(path) else stream)
            name = choose_column(path, column, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_ROWS, columns=[name])
            yield from _arrow_values(path, name, (batch.column(0) for batch in batches))
    except (ArrowInvalid, OSError) as error:
        raise _damage(path, error) from error


def _dataset_folder(path: Path, column: str | None) -> Values:
    if not is_dataset_folder(path):
        raise UserError(
            f"{path} is a folder, but no Hugging Face dataset (Dataset.save_to_disk); give a file or a glob "
            "pattern for the files in it"
        )
    if (splits := path / "dataset_dict.json").is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        folders = ", ".join(str(path / name) for name in names)
        raise UserError(f"{path} holds several splits; give the folder of one: {folders}")
    from datasets import load_from_disk
    from pyarrow import ArrowInvalid

    try:
        data = load_from_disk(str(path))
        name = choose_column(path, column, data.column_names)
        batches = data.select_columns([name]).with_format("arrow").iter(_ROWS)
        yield from _arrow_values(path, name, (batch.column(0) for batch in batches))
    except (ArrowInvalid, OSError) as error:
        raise _damage(path, error) from error


def _arrow_values(path: Path, column: str, columns: Iterable[Any]) -> Values:
    for row, value in enumerate(chain.from_iterable(columns), start=1):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: row {row} of column {column!r} is not UTF-8; write the file again"
            ) from error
        yield f"row {row}", column, text
