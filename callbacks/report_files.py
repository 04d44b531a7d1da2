"""A report on disk: report.json, report.md, report.html and the manifest that stands beside them.

Used at the end of a run, and by anything else that has measured something.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from callbacks.run_folder import write_text_atomically

ARROWS = {"frechet_distance": "↓", "fid": "↓", "milliseconds_per_image": "↓", "clip_score": "↑"}


@dataclass(frozen=True)
class Report:
    """What a report says and shows.

    Attributes:
        content: report.json: ``experiment, step, weights, model, metrics, teacher_metrics, timing,
            environment, config_path``.
        manifest: what a comparable measurement must share with this one.
        pictures: titles to PNG files, shown in this order, the first one large, the others folded.
        curves: a metrics.csv, or None.
    """

    content: dict[str, Any]
    manifest: dict[str, Any]
    pictures: dict[str, Path] = field(default_factory=dict)
    curves: Path | None = None


def write_report(report: Report, folder: Path) -> Path:
    """Write manifest.json, report.json, report.md and report.html, each whole; returns the last."""
    from callbacks.report_html import render_html
    from callbacks.report_markdown import render_markdown

    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "manifest.json", _json(report.manifest))
    write_text_atomically(folder / "report.json", _json(report.content))
    write_text_atomically(folder / "report.md", render_markdown(report, folder))
    write_text_atomically(folder / "report.html", render_html(report))
    return folder / "report.html"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def row_title(row: str, report: Report) -> str:
    """``steps_25`` as ``Teacher, 25 steps, guidance 4.5``."""
    steps = row.removeprefix("steps_")
    guidance = (report.manifest.get("guidance") or {}).get(row)
    return f"Teacher, {steps} step{'' if steps == '1' else 's'}" + (
        f", guidance {guidance:g}" if guidance else ""
    )


def result_rows(report: Report) -> list[tuple[str, dict[str, Any]]]:
    """The rows of the table: the teacher's, the longest first, and what was measured."""
    teacher = report.content["teacher_metrics"]
    ordered = sorted(teacher, key=lambda row: -int(row.removeprefix("steps_")))
    rows = [(row_title(row, report), teacher[row]) for row in ordered]
    return [*rows, ("Student, 1 step", report.content["metrics"])]


def result_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of results; a missing value is an en dash.

    The picture counts stand beside the values: in a column of their own where all values of a row share one
    count.
    """
    rows = result_rows(report)
    names = list(dict.fromkeys(name for _, results in rows for name in results))
    names.sort(key=lambda name: name == "milliseconds_per_image")
    header = ["", *(f"{name} {ARROWS.get(name, '')}".strip() for name in names), "images measured"]
    cells = []
    for title, results in rows:
        values = [format_value(results[name]["value"]) if name in results else "–" for name in names]
        counts = {r["num_images"] for name, r in results.items() if name != "milliseconds_per_image"}
        cells.append([title, *values, ", ".join(f"{count:,}" for count in sorted(counts)) or "–"])
    return header, cells


def format_value(value: float) -> str:
    """Four significant digits, no exponent for everyday sizes."""
    if value == 0:
        return "0"
    if not math.isfinite(value) or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3e}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def notes(report: Report) -> list[str]:
    """What a reader must know to read the numbers: notes of the metrics, captions of another set."""
    found = [
        f"{name}: {result['details']['note']}"
        for _, results in result_rows(report)
        for name, result in results.items()
        if "note" in result["details"]
    ]
    reference = report.manifest.get("reference") or {}
    if reference.get("captions_are_those_of_the_evaluation") is False:
        found.append(
            "frechet_distance: the captions are not those of the reference pictures, so it is not comparable."
        )
    return list(dict.fromkeys(found))


def findings(report: Report) -> list[str]:
    """The result in sentences, as far as teacher and student were measured."""
    teacher, student = report.content["teacher_metrics"], report.content["metrics"]
    several = next((row for row in teacher if row != "steps_1"), None)
    if several is None or "steps_1" not in teacher:
        return []
    many, single = teacher[several], teacher["steps_1"]
    said = []
    if "milliseconds_per_image" in many and "milliseconds_per_image" in student:
        slow, fast = many["milliseconds_per_image"]["value"], student["milliseconds_per_image"]["value"]
        said.append(
            f"{slow / fast:.3g} times as fast as the teacher in {several.removeprefix('steps_')} steps"
        )
    if "frechet_distance" in student and "frechet_distance" in single:
        ratio = student["frechet_distance"]["value"] / max(single["frechet_distance"]["value"], 1e-12)
        said.append(f"Fréchet distance {100 * ratio:.0f} % of the teacher's in one step")
    if "clip_score" in student and "clip_score" in many and "clip_score" in single:
        gap = many["clip_score"]["value"] - single["clip_score"]["value"]
        if gap > 0:
            closed = (student["clip_score"]["value"] - single["clip_score"]["value"]) / gap
            said.append(
                f"{100 * closed:.0f} % of the teacher's CLIP-score gap between one and many steps closed"
            )
    return said
