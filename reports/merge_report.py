"""What `merge --evaluate` writes beside the merged model: numbers, plots and pictures against lambda."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from reports.html import Row, Table, image_source, render
from reports.plots import Point, Series, line_figure
from reports.run_report import metric_notes, with_arrow
from reports.sheets import labelled_grid, save_png
from reports.text import bullets, format_value, markdown_table
from reports.text import text_table as plain_table

X_NAME = "λ (0: second model, 1: first model)"
SAMPLES = "merge_samples.png"
_BEST: dict[str, tuple[str, Callable[..., Any]]] = {
    "frechet_distance": ("Lowest Fréchet distance", min),
    "clip_score": ("Highest CLIP score", max),
}


@dataclass(frozen=True)
class MergePoint:
    """One lambda: results ``{name: {"value", "num_images", "details"}}``, and a few pictures [B, 3, H, W]."""

    weight: float
    metrics: dict[str, dict[str, Any]]
    pictures: ArrayLike


@dataclass(frozen=True)
class MergeReport:
    """An evaluation over a grid of lambda.

    Attributes:
        facts: of the merged model that was written (``merge_weight`` is its lambda).
        points: ascending lambdas.
        prompts: of the points' pictures.
        manifest: what a comparable measurement must share with this one.
        environment: on what it ran.
    """

    facts: dict[str, Any]
    points: list[MergePoint]
    prompts: list[str]
    manifest: dict[str, Any]
    environment: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the metrics."""
        return list(self.points[0].metrics)

    def curve(self, name: str) -> list[Point]:
        """(lambda, value) of one metric."""
        return [(point.weight, point.metrics[name]["value"]) for point in self.points]


def write_merge_report(report: MergeReport, folder: Path) -> None:
    """Write merge.json, merge.md, merge.html and merge_samples.png."""
    content = {
        **report.facts,
        "points": [{"weight": point.weight, "metrics": point.metrics} for point in report.points],
        "manifest": report.manifest,
        "environment": report.environment,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    (folder / "merge.json").write_text(text, encoding="utf-8")
    views = {f"lambda {point.weight:g}": point.pictures for point in report.points}
    save_png(labelled_grid(views, report.prompts, columns=1), folder / SAMPLES)
    (folder / "merge.md").write_text(_markdown(report), encoding="utf-8")
    (folder / "merge.html").write_text(_html(report, folder / SAMPLES), encoding="utf-8")


def findings(report: MergeReport) -> list[str]:
    """Where each metric is best, with the two plain models beside it if they were measured."""
    said = []
    for name in report.names:
        words, best = _BEST[name]
        values = dict(report.curve(name))
        weight = best(values, key=values.__getitem__)
        ends = [f"{word} alone {format_value(values[end])}" for end, word in ((1, "first"), (0, "second"))
                if end in values]  # fmt: skip
        beside = f" ({', '.join(ends)})" if ends else ""
        said.append(f"{words} {format_value(values[weight])} at λ = {weight:g}{beside}")
    return said


def notes(report: MergeReport) -> list[str]:
    """What a reader must know to read the numbers."""
    found = metric_notes(point.metrics for point in report.points)
    if report.manifest["reference"].get("captions_are_those_of_the_evaluation") is False:
        found.append(
            "frechet_distance: the captions are not those of the reference pictures, so compare it "
            "within this table only."
        )
    return list(dict.fromkeys(found))


def result_table(report: MergeReport) -> tuple[list[str], list[list[str]]]:
    """Header and cells; the model that was written is marked."""
    header = ["λ", *(with_arrow(name) for name in report.names), "images measured"]
    cells = []
    for point in report.points:
        known = [(0.0, "second model"), (1.0, "first model"), (report.facts["merge_weight"], "written")]
        words = ", ".join(word for weight, word in known if weight == point.weight)
        values = [format_value(point.metrics[name]["value"]) for name in report.names]
        count = f"{next(iter(point.metrics.values()))['num_images']:,}"
        cells.append([f"{point.weight:g}" + (f" ({words})" if words else ""), *values, count])
    return header, cells


def text_table(report: MergeReport) -> str:
    """The table in plain text, for a terminal."""
    return plain_table(*result_table(report))


def _heading(report: MergeReport) -> str:
    return f"{report.facts['first']} and {report.facts['second']}, merged"


def _markdown(report: MergeReport) -> str:
    lines = [f"# {_heading(report)}", "", "θ = λ · first + (1 − λ) · second", ""]
    lines += [*(f"- {text}" for text in findings(report)), ""]
    lines += [*markdown_table(*result_table(report)), ""]
    lines += [*(f"- {text}" for text in notes(report)), ""]
    lines += ["Plots over λ: merge.html.", "", f"![pictures]({SAMPLES})", ""]
    for title, values in _lists(report).items():
        lines += [f"## {title}", "", *bullets(values), ""]
    return "\n".join(lines)


def _html(report: MergeReport, samples: Path) -> str:
    header, cells = result_table(report)
    kinds = ["marked" if point.weight == report.facts["merge_weight"] else "" for point in report.points]
    return render(
        "merge.html",
        _heading(report),
        findings_=findings(report),
        figures=[
            line_figure(with_arrow(name), [Series(with_arrow(name), report.curve(name))], x_name=X_NAME)
            for name in report.names
        ],
        results=Table(header, [Row(row, kind) for row, kind in zip(cells, kinds, strict=True)]),
        notes_=notes(report),
        samples=image_source(samples.read_bytes()),
        lists=_lists(report),
    )


def _lists(report: MergeReport) -> dict[str, dict[str, Any]]:
    return {
        "The model that was written": report.facts,
        "How it was measured": report.manifest,
        "Environment": report.environment,
    }
