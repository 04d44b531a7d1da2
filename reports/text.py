"""report.md and the table on the terminal."""

import os
from pathlib import Path
from typing import Any

from reports.run_report import (
    Report,
    findings,
    format_value,
    headline,
    measured_table,
    notes,
    published_table,
    result_table,
)


def render_markdown(report: Report, folder: Path) -> str:
    """The report as Markdown; pictures are linked relative to ``folder``."""
    content = report.content
    lines = [f"# {headline(report)}", ""]
    lines += [f"- {text}" for text in findings(report)] + [""]
    lines += markdown_table(*result_table(report)) + [""]
    lines += [f"- {text}" for text in notes(report)] + [""]
    lines += [
        f"Weights: {content['weights']}. Model: `{content['model']}`. Settings: `{content['config_path']}`.",
        "",
    ]
    for title, table in [
        ("How each number was measured", measured_table(report)),
        ("Published values, measured the same way", published_table(report)),
    ]:
        if table is not None:
            lines += [f"## {title}", "", *markdown_table(*table), ""]
    for title, path in report.pictures.items():
        lines += [f"## {title}", "", f"![{title}]({Path(os.path.relpath(path, folder)).as_posix()})", ""]
    for title, values in [("Timing", content["timing"]), ("Environment", content["environment"])]:
        lines += [f"## {title}", "", *(f"- {name}: {_text(value)}" for name, value in values.items()), ""]
    lines += ["## Manifest", "", "See manifest.json:", "", *_bullets(report.manifest), ""]
    return "\n".join(lines)


def markdown_table(header: list[str], cells: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in [header, *cells]]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|---" + "|---:" * (len(header) - 1) + "|", *body]


def render_text_table(report: Report) -> str:
    """The table of results in plain text, for a terminal."""
    header, cells = result_table(report)
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *numbers])

    return "\n".join([line(header), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, cells)])


def _bullets(value: dict[str, Any], depth: int = 0) -> list[str]:
    lines = []
    for name, item in value.items():
        if isinstance(item, dict):
            lines += [f"{'  ' * depth}- {name}:", *_bullets(item, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}- {name}: {_text(item)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, float):
        return format_value(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
