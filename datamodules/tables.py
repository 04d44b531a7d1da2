"""Texts out of files, one at a time and in constant memory.

Lines of text, CSV, TSV, JSON Lines and Parquet, each also as .gz or .zst; Hugging Face dataset folders; and
lists in JSON documents, which are read whole (as packed Parquet files are).
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
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
FILE_COLUMNS = ("file", "file_name", "image")
"""Taken for the names of pictures where no column is named and the table has exactly one of them."""
LONGEST_LINE = "ONE_STEP_LONGEST_LINE"
"""Environment variable with the bytes of the longest line that is read; 1 MiB without it."""
_NAME = re.compile(r"\w[\w.-]{0,29}")
_SEPARATORS = ",;\t|"
_LARGEST_DOCUMENT = 2**30  # bytes of JSON documents and packed Parquet files
_ROWS = 4096  # of Parquet files and dataset folders, held in memory at a time: a few bytes may stand for many


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
    # pyarrow's errors are OSErrors and ValueErrors, too
    except (OSError, ValueError, csv.Error, RecursionError) as error:
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

    The suffix says it. Text, and a file of another suffix or none, has one prompt a line, unless its first
    line is a JSON object, the start of a Parquet file, or names of columns, prompt, caption or text among
    them. A .json with an object in its first line and more lines is JSON Lines.

    Raises:
        UserError: there is no such file, or a .txt begins with names of columns.
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
    kind = _KINDS.get(suffix)
    if kind not in (None, "lines", "json"):
        return kind
    with _opened(path) as stream:
        line, more = stream.readline(1 << 16).decode("utf-8-sig", errors="replace"), bool(stream.read(1))
    try:
        is_object = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        is_object = False
    if kind == "json":
        return "jsonl" if is_object and more else "json"
    if line.startswith("PAR1"):
        return "parquet"
    if is_object:
        return "jsonl"
    cells = _cells(line, mark := _separator(line, "lines"))
    is_header = len(cells) > 1 and set(cells) & set(USUAL_COLUMNS) and all(map(_NAME.fullmatch, cells))
    if is_header and kind == "lines":
        raise UserError(
            f"{path}: the first line {line.strip()[:80]!r} looks like names of columns, separated by "
            f"{mark!r}: call the file .csv, or, if it is a prompt, put another line first"
        )
    return ("tsv" if mark == "\t" else "csv") if is_header else "lines"


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


def read_files(path: str | Path, column: str | None = None) -> list[str] | None:
    """The picture of each caption of a file, as it says; None if it says nothing.

    Args:
        path: a table; or COCO's annotations, whose captions name the id of a picture.
        column: of the names; None: the only one of `FILE_COLUMNS` that the table has, if any.

    Raises:
        UserError: as `read_column`; or COCO's annotations are without their pictures.
    """
    kind = kind_of(path)
    if kind == "json" and isinstance(content := read_json(Path(path)), dict) and "annotations" in content:
        try:
            names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            return [names[entry["image_id"]] for entry in content["annotations"]]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path} does not say which picture a caption belongs to ({first_line(error)}): give COCO's "
                "annotations whole, with `images` (id, file_name), or a table with columns file and caption"
            ) from error
    if column is None:
        if kind == "lines":
            return None
        found = [name for name in columns(path) if name.lower() in FILE_COLUMNS]
        if len(found) != 1:
            return None
        column = found[0]
    return read_column(path, column)


def columns(path: str | Path) -> list[str]:
    """The columns of a table (of the first object, in JSON Lines); none of lines or a list of texts."""
    path, kind = Path(path), kind_of(path)
    if kind in ("csv", "tsv"):
        return _delimited(path, kind)[0]
    if kind in ("parquet", "folder"):
        names: list[str] = _arrow_table(path, kind)[0]
        return names
    first = next(_items(path, kind), None) if kind != "lines" else None
    return list(first) if isinstance(first, dict) else []


def describe(path: str | Path, column: str | None = None) -> str:
    """Which column of a table is read, and how it is separated, in words; "" of lines and lists of texts."""
    path, kind = Path(path), kind_of(path)
    if not (present := columns(path)):
        return ""
    mark = f", separated by {_delimited(path, kind)[2]!r}" if kind in ("csv", "tsv") else ""
    return f" (column {choose_column(path, column, present)!r}{mark})"


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: it is missing, no JSON or not UTF-8.
    """
    try:
        return json.loads(_unpacked(path).decode("utf-8-sig"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} can't be read as JSON: {first_line(error)}; fetch or save it again"
        ) from error


def _values(path: Path, column: str | None) -> Iterator[Any]:
    kind = kind_of(path)
    if kind == "lines":
        return _lines(path)
    if kind in ("csv", "tsv"):
        return _rows(path, column, kind)
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
    longest, number = longest_line(), 0
    with _opened(path) as stream:
        while line := stream.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise UserError(
                    f"{path}: line {number} is longer than {longest:,} bytes, the limit; if it is meant to "
                    f"be, set {LONGEST_LINE} to another number of bytes"
                )
            yield line.decode("utf-8" if number > 1 else "utf-8-sig")


def longest_line() -> int:
    """Bytes of the longest line, or field of a CSV, that is read: a packed file may hold more than fits."""
    given = os.environ.get(LONGEST_LINE, str(2**20))
    if not given.isdigit() or not 0 < int(given) < 2**31:
        raise UserError(f"{LONGEST_LINE} is {given!r}: it is a number of bytes, 1 to {2**31 - 1}")
    return int(given)


def _unpacked(path: Path) -> bytes:
    """All of a document, which is read whole."""
    with _opened(path) as stream:
        content = stream.read(_LARGEST_DOCUMENT + 1)
    if len(content) > _LARGEST_DOCUMENT:
        raise UserError(
            f"{path} unpacks to more than {_LARGEST_DOCUMENT // 2**20:,} MiB and would be read whole; make "
            "JSON Lines or several files of it"
        )
    return content


def _delimited(path: Path, kind: str) -> tuple[list[str], Iterator[list[str]], str]:
    """Header, rows and separator of a CSV or TSV."""
    lines = _lines(path)
    first = next(lines, "")
    mark = _separator(first, kind)
    # quotation marks mean nothing in a file that is called .tsv and is one
    quoting: Any = csv.QUOTE_NONE if (kind, mark) == ("tsv", "\t") else csv.QUOTE_MINIMAL
    csv.field_size_limit(longest_line())
    rows = csv.reader(chain([first], lines), delimiter=mark, quoting=quoting, strict=True)
    return [name.strip() for name in next(rows, [])], filter(None, rows), mark


def _cells(line: str, mark: str) -> list[str]:
    return [cell.strip().lower() for cell in next(csv.reader([line.strip()], delimiter=mark), [])]


def _separator(line: str, kind: str) -> str:
    """What separates the names of columns in the first line, whatever the suffix promises."""
    if kind == "tsv" and "\t" in line:
        return "\t"
    split = {mark: _cells(line, mark) for mark in _SEPARATORS}  # a comma where there is none
    return max(split, key=lambda mark: (bool(set(split[mark]) & set(USUAL_COLUMNS)), len(split[mark])))


def _rows(path: Path, column: str | None, kind: str) -> Iterator[str]:
    header, rows, mark = _delimited(path, kind)
    if not header:
        return
    what = path if mark == "," else f"{path} (separated by {mark!r})"
    place = header.index(choose_column(what, column, header))
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"it has {len(row)} fields, the header {len(header)}, separated by {mark!r}")
        yield row[place]


def _items(path: Path, kind: str) -> Iterator[Any]:
    """Texts or objects: one a line, or in a list, or in COCO's list of annotations."""
    items = map(json.loads, filter(str.strip, _lines(path))) if kind == "jsonl" else read_json(path)
    if isinstance(items, dict) and "annotations" in items:
        items = items["annotations"]
    if not isinstance(items, list | map):
        found = "the keys " + ", ".join(map(repr, items)) if isinstance(items, dict) else type(items).__name__
        raise UserError(
            f"{path} holds {found}; a list of texts or objects is needed, or COCO's list 'annotations'"
        )
    return iter(items)


def _json(path: Path, column: str | None, kind: str) -> Iterator[Any]:
    for row, item in enumerate(_items(path, kind), start=1):
        if isinstance(item, dict):
            column = choose_column(f"{path}: row {row}", column, list(item))
            item = item[column]
        str(item).encode()  # fails for half a surrogate pair, which JSON can hold and UTF-8 can't
        yield item


def _arrow_table(path: Path, kind: str) -> tuple[list[str], Any]:
    """Columns, and the table, of a Parquet file or a dataset folder."""
    if kind == "parquet":
        from pyarrow.parquet import ParquetFile

        # the table of contents is at the end of the file
        file = ParquetFile(io.BytesIO(_unpacked(path)) if is_packed(path) else path)
        return file.schema_arrow.names, file
    from datasets import load_from_disk

    data = load_from_disk(str(path))
    if isinstance(data, dict):
        folders = ", ".join(str(path / split) for split in data)
        raise UserError(f"{path} holds several splits; give the folder of one: {folders}")
    return data.column_names, data


def _arrow(path: Path, column: str | None, kind: str) -> Iterator[Any]:
    present, table = _arrow_table(path, kind)
    name = choose_column(path, column, present)
    if kind == "parquet":
        batches = table.iter_batches(batch_size=_ROWS, columns=[name])
    else:
        batches = table.select_columns([name]).with_format("arrow").iter(_ROWS)
    for batch in batches:
        yield from (value.as_py() for value in batch.column(0))
