"""Numbers, tables and nested values as text, for the terminal and for Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def format_value(value: float) -> str:
    """Four significant digits, no exponent for everyday sizes."""
    if value == 0:
        return "0"
    if not math.isfinite(value) or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3e}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def said(value: Any) -> str:
    """Any value of a report in words: four digits of a number, the members of a list, "none"."""
    if isinstance(value, float):
        return format_value(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value)) or "none"
    return "none" if value is None else str(value)


def plain_markdown(text: str) -> str:
    """A text with the signs of HTML and tables made harmless: hubs render what stands in Markdown."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, all but the first column to the right."""
    rows = [[plain_markdown(cell) for cell in row] for row in [header, *cells]]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|---" + "|---:" * (len(header) - 1) + "|", *body]


def text_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in plain text for a terminal, all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    rows = [header, ["-" * width for width in widths], *cells]
    sides = ["<"] + [">"] * (len(header) - 1)
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) for row in rows
    )


def bullets(values: Mapping[str, Any], depth: int = 0) -> list[str]:
    """Lines of a nested Markdown list."""
    lines = []
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        lines.append(f"{'  ' * depth}- {name}:" + ("" if inner else f" {plain_markdown(said(value))}"))
        lines += bullets(value, depth + 1) if inner else []
    return lines


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest tail of each dotted key that no other key has."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        names[key] = next((t for t in tails if not any(o.endswith(f".{t}") for o in others)), key)
    return names
