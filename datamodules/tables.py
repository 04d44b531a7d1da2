"""Whole columns of text out of the files that evaluation sets come in, read by `datamodules.readers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import UserError, first_line
from datamodules.readers import choose_column, read_texts

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json")


def is_table(path: str | Path) -> bool:
    """Whether the file has columns by its suffix; other files are text with one caption a line."""
    name = Path(path).name.lower().removesuffix(".gz").removesuffix(".zst")
    return name.endswith(TABLES)


def read_column(path: str | Path, name: str | None = None) -> list[str]:
    """All texts of a column, without blanks at their ends; a text file's lines, empty ones left out.

    A `.json` file holds a list of texts or of objects; other kinds are those of `read_texts`.

    Args:
        path: the file.
        name: the column of a table; None: its only one, or the only one of prompt, caption and text.

    Raises:
        UserError: the file can't be read or is empty, has no such column (those it has are named), or a row
            has no text in it.
    """
    path = Path(path)
    texts = _json(path, name) if path.suffix.lower() == ".json" else list(read_texts(path, name))
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


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: it is missing, no JSON or not UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read as JSON: {first_line(error)}; fetch or save it again"
        ) from error


def keys_of(content: Any) -> str:
    """What a JSON value holds, for messages: the keys of an object, the kind of anything else."""
    if isinstance(content, dict):
        return "the keys " + (", ".join(map(repr, content)) or "(none)")
    return f"a {type(content).__name__}"


def _json(path: Path, name: str | None) -> list[str]:
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path} holds {keys_of(content)}; a list of texts or of objects is needed")
    texts = []
    for number, item in enumerate(content, start=1):
        if isinstance(item, dict):
            item = item.get(choose_column(Path(f"{path}: entry {number}"), name, list(item)))
        if not isinstance(item, str):
            raise UserError(f"{path}: entry {number} holds {keys_of(item)} where a text is needed")
        texts.append(item.strip())
    return texts
