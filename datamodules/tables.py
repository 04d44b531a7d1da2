"""Texts out of files, one at a time and in constant memory.

Lines of text, CSV, TSV, JSON Lines and Parquet, each also as .gz or .zst; Hugging Face dataset folders; and
lists in JSON documents, which are read whole (as packed Parquet files are).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from common.errors import UserError, first_line
from common.files import nearest_path

USUAL_COLUMNS = ("prompt", "caption", "text")
"""Taken (in any letter case) where no column is named and the file has exactly one of them."""
_KINDS = {
    ".txt": "lines", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".parquet": "parquet",
}  # fmt: skip
_ROWS = 65536  # of Parquet files and dataset folders, held in memory at a time


def read_texts(path: str | Path, column: str | None = None) -> Iterator[str]:
    """Yield one text per line or row, without blanks at its ends; "" where a line or value is empty.

    For what a file is see `kind_of`. A CSV may be separated by other signs than commas, as its first line
    says. Quotation marks mean nothing in TSV. Blank lines are no rows of CSV, TSV and JSON Lines.

    Args:
        path: The file, or a folder written by ``Dataset.save_to_disk``.
        column: Name of the column of a table. None: its only one, or its only one of `USUAL_COLUMNS`.

    Raises:
        UserError: while iterating. The file is missing, damaged, cut off or not UTF-8 (the row is named), or
            has no such column (those it has are named).
    """
    path, row = Path(path), 0
    try:
        for row, value in enumerate(_values(path, column), start=1):
            if value is not None and not isinstance(value, str):
                kind = type(value).__name__
                raise UserError(
                    f"{path}: row {row} holds a {kind} where a text is needed; name another column"
                )
            yield (value or "").strip()
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are OSErrors and ValueErrors, too
        raise UserError(
            f"prompts file {path}: row {row + 1} can't be read ({first_line(error)}); if the file is cut "
            "off, damaged or not UTF-8, fetch or save it again"
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
        if name is not None:
            raise UserError(
                f"{path} is a text file, so it has no column {name!r}; give a CSV, TSV, JSON or Parquet file"
            )
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
            f"line, or of a .csv, .tsv, .jsonl or .parquet file. {nearest_path(path)}".rstrip()
        )
    suffix = (path.with_suffix("") if is_packed(path) else path).suffix.lower()
    if suffix in _KINDS:
        return _KINDS[suffix]
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


def is_packed(path: Path) -> bool:
    """Whether the file is a .gz or .zst."""
    return path.suffix.lower() in (".gz", ".zst")


def choose_column(what: str | Path, column: str | None, present: Sequence[str]) -> str:
    """Return the name of the column to read: the wanted one, or without one that which is meant.

    Raises:
        UserError: it is not among those present, or it isn't clear which is meant; names what has them.
    """
    listed = ", ".join(repr(name) for name in present)
    if column is not None:
        if column not in present:
            raise UserError(f"{what} has no column {column!r}; it has {listed}; name one of these")
        return column
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


def _values(path: Path, column: str | None) -> Iterator[Any]:
    kind = kind_of(path)
    if kind == "lines":
        return _lines(path)
    if kind in ("csv", "tsv"):
        return _delimited(path, column, kind)
    if kind in ("jsonl", "json"):
        return _json(path, column, kind)
    return _arrow(path, column, kind)


def _opened(path: Path) -> io.BufferedReader:
    """The bytes of a file, unpacked as they are read."""
    if not is_packed(path):
        return path.open("rb")
    import pyarrow  # takes long to import, so only where it is needed

    return io.BufferedReader(pyarrow.input_stream(str(path)))


def _lines(path: Path) -> Iterator[str]:
    with _opened(path) as stream:
        for number, line in enumerate(stream):
            yield line.decode("utf-8" if number else "utf-8-sig")


def _delimited(path: Path, column: str | None, kind: str) -> Iterator[str]:
    lines = _lines(path)
    first = next(lines, "")
    rows = csv.reader(
        chain([first], lines),
        delimiter="\t" if kind == "tsv" else max(",;\t|", key=first.count),  # a comma where there is none
        quoting=csv.QUOTE_NONE if kind == "tsv" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    header = [name.strip() for name in next(rows, [])]
    if not header:
        return
    place = header.index(choose_column(path, column, header))
    for row in filter(None, rows):
        if len(row) != len(header):
            raise ValueError(f"it has {len(row)} fields, the header {len(header)}")
        yield row[place]


def _json(path: Path, column: str | None, kind: str) -> Iterator[Any]:
    """Texts, or a value of each object: one a line, or in a list, or in COCO's list of annotations."""
    items = map(json.loads, filter(str.strip, _lines(path))) if kind == "jsonl" else read_json(path)
    if isinstance(items, dict) and "annotations" in items:
        items = items["annotations"]
    if not isinstance(items, list | map):
        found = "the keys " + ", ".join(map(repr, items)) if isinstance(items, dict) else type(items).__name__
        raise UserError(
            f"{path} holds {found}; a list of texts or objects is needed, or COCO's list 'annotations'"
        )
    for row, item in enumerate(items, start=1):
        if isinstance(item, dict):
            column = choose_column(f"{path}: row {row}", column, list(item))
            item = item[column]
        str(item).encode()  # fails for half a surrogate pair, which JSON can hold and UTF-8 can't
        yield item


def _arrow(path: Path, column: str | None, kind: str) -> Iterator[Any]:
    if kind == "parquet":
        from pyarrow.parquet import ParquetFile

        # the table of contents is at the end of the file
        file = ParquetFile(io.BytesIO(_opened(path).read()) if is_packed(path) else path)
        name = choose_column(path, column, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=_ROWS, columns=[name])
    else:
        from datasets import load_from_disk

        data = load_from_disk(str(path))
        if isinstance(data, dict):
            folders = ", ".join(str(path / split) for split in data)
            raise UserError(f"{path} holds several splits; give the folder of one: {folders}")
        name = choose_column(path, column, data.column_names)
        batches = data.select_columns([name]).with_format("arrow").iter(_ROWS)
    for batch in batches:
        yield from (value.as_py() for value in batch.column(0))
