"""A report on disk: report.json, report.md, report.html and the manifest that stands beside them."""

import json
import os
import re
from pathlib import Path

import plotly.graph_objects as go

from common.files import write_text_atomically
from reports.html import Row, Table, data_address, image_source, render, shared_script
from reports.plots import grouped, line_figure, read_series
from reports.run_report import (
    Report,
    findings,
    headline,
    measured_table,
    notes,
    published_table,
    result_rows,
    result_table,
    steps_in_words,
    subtitle,
    told,
)
from reports.strip import read_strip
from reports.text import bullets, markdown_table, said

_RANGE = re.compile(r"/(low|high)$")
_LARGEST_TABLE = 2**21
"""Bytes of a metrics.csv that is put into the page; a longer one lies beside it."""


def write_report(report: Report, folder: Path) -> Path:
    """Write manifest.json, report.json, report.md and report.html, each whole; returns the last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("manifest.json", report.manifest), ("report.json", report.content)):
        write_text_atomically(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text_atomically(folder / "report.md", render_markdown(report, folder))
    write_text_atomically(folder / "report.html", render_html(report, folder))
    return folder / "report.html"


def render_markdown(report: Report, folder: Path) -> str:
    """The report as Markdown; pictures are linked relative to ``folder``."""
    content = report.content
    lines = [f"# {headline(report)}", ""]
    alarms = (content.get("run") or {}).get("alarms", [])
    lines += [f"- ALARM, {text}" for text in alarms]
    lines += [f"- {text}" for text in findings(report)] + [""]
    lines += markdown_table(*result_table(report)) + [""]
    lines += [f"- {text}" for text in notes(report)] + [""]
    lines += [f"{subtitle(report)}. Settings: `{content['config_path']}`.", ""]
    lines += [f"- {name}: {text}" for name, text in told(report).items()] + [""]
    for title, table in _more_tables(report).items():
        lines += [f"## {title}", "", *markdown_table(*table), ""]
    for title, path in report.pictures.items():
        lines += [f"## {title}", "", f"![{title}]({Path(os.path.relpath(path, folder)).as_posix()})", ""]
    for title, values in [("Timing", content["timing"]), ("Environment", content["environment"])]:
        lines += [f"## {title}", "", *(f"- {name}: {said(value)}" for name, value in values.items()), ""]
    lines += ["## Manifest", "", "See manifest.json:", "", *bullets(report.manifest), ""]
    return "\n".join(lines)


def render_html(report: Report, folder: Path | None = None) -> str:
    """The report as one page with its pictures in it.

    Args:
        report: what to show.
        folder: where the page will lie; plotly's script is put there or above it, once for all runs, if there
            are curves. None: the script is put into the page.
    """
    header, cells = result_table(report)
    figures, folded = _curves(report)
    content = report.content
    return render(
        "run.html",
        headline(report),
        script=shared_script(folder) if folder is not None and (figures or folded) else None,
        report=report,
        subtitle=subtitle(report),
        alarms=(content.get("run") or {}).get("alarms", []),
        findings_=findings(report),
        results=Table(header, [*map(Row, cells[:-1]), Row(cells[-1], "marked")]),
        notes_=notes(report),
        tables={
            title: Table(names, [*map(Row, rows)], "text")
            for title, (names, rows) in _more_tables(report).items()
        },
        strip=(strip := read_strip(report.sheets)),
        pictures={
            title: image_source(path.read_bytes())
            for title, path in report.pictures.items()
            if strip is None or path not in report.sheets.values()
        },
        files=_files(report),
        figures=figures,
        folded=folded,
        is_finished=content.get("finished", True),
        facts=told(report),
        config=_config(Path(content["config_path"])),
        details={
            title: {
                name: {"value": one["value"], "num_images": one["num_images"], **one["details"]}
                for name, one in results.items()
            }
            for title, results in result_rows(report)
        },
        environment=content["environment"] | {"settings": content["config_path"]},
    )


def _files(report: Report) -> dict[str, str]:
    """What the page holds to be saved: names to addresses."""
    texts = {
        "report.json": json.dumps(report.content, indent=2, ensure_ascii=False).encode(),
        "manifest.json": json.dumps(report.manifest, indent=2, ensure_ascii=False).encode(),
    }
    if report.curves is not None and report.curves.stat().st_size <= _LARGEST_TABLE:
        texts["metrics.csv"] = report.curves.read_bytes()
    kinds = {".json": "application/json", ".csv": "text/csv"}
    return {name: data_address(text, kinds[Path(name).suffix]) for name, text in texts.items()}


def _config(path: Path) -> str | None:
    """The configuration's text, secrets of loggers left out."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    return re.sub(r"(?m)^(\s*(?:- )?\w*(?:api_key|password|secret|token):) \S.*$", r"\1 (not shown)", text)


def _more_tables(report: Report) -> dict[str, tuple[list[str], list[list[str]]]]:
    """How each number was measured, and published values, where these are told."""
    tables = {
        "How each number was measured": measured_table(report),
        "Published values, measured the same way but for what is told above": published_table(report),
    }
    return {title: table for title, table in tables.items() if table is not None}


def _curves(report: Report) -> tuple[list[go.Figure], list[go.Figure]]:
    """The columns of metrics.csv: what was validated and the losses; then all others, the table's, too."""
    read = read_series(report.curves) if report.curves is not None else {}
    ends = {name: one for name, one in read.items() if name.startswith("health/") and _RANGE.search(name)}
    groups = grouped({name: one for name, one in read.items() if name not in ends})
    ranks = {}
    for title, series in groups.items():
        names = [one.name.partition("/")[0] for one in series]
        ranks[title] = 0 if "val" in names else 1 if {"train", "health"} & {*names} else 2
    drawn: tuple[list[go.Figure], list[go.Figure]] = ([], [])
    for title in sorted(groups, key=lambda title: (ranks[title], title)):
        levels = _teacher_levels(title, report) | {
            f"teacher's range, {name.rpartition('/')[2]}": one.points[-1][1]
            for name, one in ends.items()
            if _RANGE.sub("", name) == title and one.points
        }
        figure = line_figure(title, groups[title], levels)
        if figure is not None:
            drawn[ranks[title] == 2].append(figure)
    return drawn


def _teacher_levels(title: str, report: Report) -> dict[str, float]:
    """The teacher's values, for the plot of what was measured on the same captions: at the end."""
    stage, _, metric = title.partition("/")
    teacher = report.content["teacher_metrics"] if stage == "test" else {}
    return {
        f"teacher, {steps_in_words(row)}": results[metric]["value"]
        for row, results in teacher.items()
        if metric in results
    }
