"""The page of `compare`: one file, nothing fetched; a few lines of script light up a run in all plots."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from reports.comparison import Run, best_of, differences, direction, same_samples
from reports.html import _STYLE
from reports.plots import Axis, Curve, Point, color, xy_plot
from reports.run_report import format_value

_MORE_STYLE = """
main { max-width:1560px; }
td.best { background:var(--mark); font-weight:700; } td.best::after { content:" ★"; color:var(--accent); }
tr.teacher td { color:var(--faint); }
.swatch { display:inline-block; width:.8rem; height:.8rem; border-radius:3px; margin-right:.45rem;
  background:var(--c); vertical-align:-1px; }
th.text, td.text { text-align:left; }
td.text { white-space:normal; overflow-wrap:anywhere; min-width:5rem; max-width:24rem; }
.sheets { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,560px),1fr)); gap:.8rem; }
.plots.focus .run { opacity:.12; } .plots.focus .run.lit { opacity:1; } .lit .curve { stroke-width:3; }
tr[data-run] { cursor:default; } tr[data-run]:hover td { background:var(--mark); }
.scroll { max-height:80vh; overflow:auto; } .scroll thead th { position:sticky; top:0;
  background:var(--card); }
th.sorts { cursor:pointer; } th.sorts:hover { color:var(--ink); }
"""
_SCRIPT = """
const plots = document.querySelectorAll(".plots");
document.querySelectorAll("tr[data-run]").forEach(row => {
  const marks = document.querySelectorAll(".run-" + row.dataset.run);
  const light = on => () => {
    plots.forEach(plot => plot.classList.toggle("focus", on));
    marks.forEach(mark => mark.classList.toggle("lit", on));
  };
  row.addEventListener("mouseenter", light(true));
  row.addEventListener("mouseleave", light(false));
});
const amount = (row, i) => Number(row.cells[i].textContent.replace(/[,★]/g, ""));
document.querySelectorAll("th.sorts").forEach(head => {
  let sign = head.textContent.includes("↑") ? -1 : 1;
  head.addEventListener("click", () => {
    const i = head.cellIndex, rows = [...head.closest("table").querySelectorAll("tr[data-run]")];
    const known = row => !Number.isNaN(amount(row, i));
    rows.sort((a, b) => known(b) - known(a) || (known(a) ? sign * (amount(a, i) - amount(b, i)) : 0));
    rows.forEach(row => row.parentNode.append(row));
    sign = -sign;
  });
});
"""
_FEW = 12
"""Up to so many runs, pictures stand in the page as they are; of more, smaller files of them."""
_MOST_ROWS = 30
"""Longer tables scroll by themselves."""
_POINTS_OF_ALL = 40_000
_TIMES = ("seconds_per_step", "images_per_second", "peak_memory_gib")
_TIMES_BETTER = {"seconds_per_step": -1, "images_per_second": 1, "peak_memory_gib": -1}


def render_comparison(runs: Sequence[Run]) -> str:
    """The comparison as one HTML page; pictures and curves are inside it."""
    title = f"{len(runs)} run{'' if len(runs) == 1 else 's'} side by side"
    parts = [
        f"<h1>{title}</h1>",
        _problems(runs),
        "<h2>Metrics</h2>",
        _metrics(runs),
        _last_values(runs),
        _curves(runs),
        _differences(runs, "config", "Configuration differences"),
        _samples(runs),
        _timing(runs),
        _differences(runs, "environment", "Environment differences"),
        f"<script>{_SCRIPT}</script>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}{_MORE_STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _problems(runs: Sequence[Run]) -> str:
    found = [problem for run in runs for problem in run.problems]
    return "".join(f'<p class="note">⚠ {escape(problem)}</p>' for problem in found)


def _table(header: Sequence[str], rows: Sequence[str], kind: str = "sorts") -> str:
    """A table whose first column names its rows; the others are of a kind, "sorts" (numbers) or "text"."""
    cells = [f'<th scope="col"{f" class={kind}" if i else ""}>{escape(h)}</th>' for i, h in enumerate(header)]
    body = f"<table><thead><tr>{''.join(cells)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="{"wide scroll" if len(rows) > _MOST_ROWS else "wide"}">{body}</div>'


def _row(i: int, run: Run, cells: Sequence[str]) -> str:
    swatch = f'<span class="swatch" style="--c:{color(i)}"></span>'
    return f'<tr data-run="{i}"><td>{swatch}{escape(run.name)}</td>{"".join(cells)}</tr>'


def _columns(values: Sequence[Sequence[float | None]], better: Sequence[int]) -> list[list[str]]:
    """Cells by row from values by column; the best of a column is marked."""
    columns = []
    for column, sign in zip(values, better):
        best = best_of(column, sign)
        columns.append([
            f"<td{' class=best' if i in best else ''}>{'–' if v is None else escape(format_value(v))}</td>"
            for i, v in enumerate(column)
        ])  # fmt: skip
    return [list(row) for row in zip(*columns)]


def _arrow(name: str) -> str:
    return {-1: f"{name} ↓", 0: name, 1: f"{name} ↑"}[direction(name)]


def _metrics(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not names:
        return '<p class="note">No run has a report yet; what was logged last stands below.</p>'
    values, better, notes = [], [], []
    for name in names:
        values.append([run.metrics[name]["value"] if name in run.metrics else None for run in runs])
        conditions = {_conditions(run.metrics[name]) for run in runs if name in run.metrics}
        better.append(direction(name) if len(conditions) == 1 else 0)
        if len(conditions) > 1:
            notes.append(f"{name} was not measured in the same way in all runs, so none is marked as best.")
    cells = _columns(values, better)
    rows = [*_teacher_rows(runs, names)]
    for i, run in enumerate(runs):
        facts = [f"<td>{escape(text)}</td>" for text in _facts(run)]
        rows.append(_row(i, run, [*facts, *cells[i]]))
    header = ["run", "step", "weights", "images", *map(_arrow, names)]
    return _table(header, rows) + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _conditions(result: dict[str, Any]) -> str:
    """What two values must share to be compared: the number of pictures and all details (not of a timing)."""
    details = dict(result.get("details") or {})
    return json.dumps([result.get("num_images"), details], sort_keys=True, default=str)


def _facts(run: Run) -> list[str]:
    counts = {r.get("num_images") for name, r in run.metrics.items() if name != "milliseconds_per_image"}
    images = ", ".join(f"{count:,}" for count in sorted(count for count in counts if count is not None))
    step = f"{run.step:,}" if run.step is not None else "–"
    return [step, str((run.report or {}).get("weights", "no report")), images or "–"]


def _teacher_rows(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """One row for each different measurement of a teacher (above the runs, never marked as best)."""
    seen: dict[str, str] = {}
    for run in runs:
        for row, results in ((run.report or {}).get("teacher_metrics") or {}).items():
            steps = row.removeprefix("steps_")
            # timings of the same teacher differ from run to run: the first stands for all
            key = json.dumps(
                [row, {name: r["value"] for name, r in results.items() if name != "milliseconds_per_image"}]
            )
            cells = "".join(
                f"<td>{escape(format_value(results[name]['value'])) if name in results else '–'}</td>"
                for name in names
            )
            label = f"teacher, {steps} step{'' if steps == '1' else 's'}"
            seen.setdefault(
                key, f'<tr class="teacher"><td>{label}</td><td></td><td></td><td></td>{cells}</tr>'
            )
    return list(seen.values())


def _last_values(runs: Sequence[Run]) -> str:
    """What the validations logged last, for runs that have no report (yet)."""
    names = sorted({name for run in runs for name in run.series if name.startswith("val/")})
    if not names or all(run.metrics for run in runs):
        return ""
    values = [[run.last_value(name) for run in runs] for name in names]
    cells = _columns(values, [direction(name) for name in names])
    rows = [_row(i, run, [f"<td>{_facts(run)[0]}</td>", *cells[i]]) for i, run in enumerate(runs)]
    note = '<p class="note">From the smaller validation set, after unequal numbers of steps perhaps.</p>'
    return f"<h3>Last validation</h3>{_table(['run', 'step', *map(_arrow, names)], rows)}{note}"


def _curves(runs: Sequence[Run]) -> str:
    names = {name for run in runs for name in run.series if name.startswith(("val/", "train/"))}
    order = sorted(names, key=lambda name: (not name.startswith("val/"), name))
    most = max(40, _POINTS_OF_ALL // max(1, len(runs)))
    plots = [f'<div class="plot">{plot}</div>' for name in order if (plot := _overlay(runs, name, most))]
    if not plots:
        return ""
    note = "Rest on a row of a table to light up its run, on a curve to see whose it is."
    return f'<h2>Curves</h2><p class="faint">{note}</p><div class="plots">{"".join(plots)}</div>'


def _overlay(runs: Sequence[Run], name: str, most: int) -> str:
    with_it = [(i, run) for i, run in enumerate(runs) if name in run.series and run.series[name].points]
    points = [point for _, run in with_it for point in run.series[name].points]
    if not points:
        return ""
    curves = [
        Curve(
            run.name, _lighter(run.series[name].points, most), color(i), group=f"run-{i}",
            dots=len(run.series[name].points) <= 30 and len(runs) <= _FEW,
        )
        for i, run in with_it
    ]  # fmt: skip
    x = Axis.around("student updates", [x for x, _ in points], whole=True, logarithmic=False)
    return xy_plot(curves, x, Axis.around(name, [y for _, y in points]))


def _lighter(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points: the lowest and highest of equal stretches."""
    if len(points) <= most:
        return list(points)
    stretch = -(-2 * len(points) // most)
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _differences(runs: Sequence[Run], what: str, title: str) -> str:
    """The keys in which the runs differ; the longer side of runs and keys goes down the page."""
    contents = [run.config if what == "config" else (run.report or {}).get(what) for run in runs]
    found = differences(contents)
    if not found:
        missing = sum(content is None for content in contents)
        if what != "config":
            return ""
        said = "The configurations are the same." if missing < len(runs) else "No run has a config.yaml."
        return f'<h2>{title}</h2><p class="note">{said}</p>'
    names = {key: key.replace(".init_args", "") for key in found}
    cell = '<td class="text">{}</td>'.format
    if len(found) >= len(runs):
        rows = [
            f"<tr><td>{escape(names[key])}</td>"
            + "".join(cell(escape("–" if value is None else value)) for value in values)
            + "</tr>"
            for key, values in found.items()
        ]
        return f"<h2>{title}</h2>{_table(['', *(run.name for run in runs)], rows, 'text')}"
    rows = [
        _row(
            i, run, [cell(escape("–" if values[i] is None else str(values[i]))) for values in found.values()]
        )
        for i, run in enumerate(runs)
    ]
    return f"<h2>{title}</h2>{_table(['run', *names.values()], rows, 'text')}"


def _samples(runs: Sequence[Run]) -> str:
    """The last sheets, those of the same prompts and seeds side by side."""
    groups: dict[str | None, list[Run]] = {}
    for run in runs:
        if run.grid is not None:
            groups.setdefault(same_samples(run), []).append(run)
    if not groups:
        return ""
    parts = []
    for key, members in groups.items():
        same = "Same prompts, same seeds" if key else "Prompts and seeds are not known"
        if len(groups) > 1:
            parts.append(f"<h3>{same}: {len(members)} run{'' if len(members) == 1 else 's'}</h3>")
        sheets = "".join(_sheet(run, len(runs) <= _FEW) for run in members)
        parts.append(f'<div class="sheets">{sheets}</div>')
    only = next(iter(groups))
    note = "Every sheet shows the same prompts from the same seeds." if len(groups) == 1 and only else ""
    small = f" More than {_FEW} runs: the pictures are compressed." if len(runs) > _FEW else ""
    said = f'<p class="faint">{note}{small}</p>' if note or small else ""
    return f"<h2>Samples</h2>{said}{''.join(parts)}"


def _sheet(run: Run, as_it_is: bool) -> str:
    assert run.grid is not None
    step, path = run.grid
    data, kind, lazy = path.read_bytes(), "png", ""
    with Image.open(path) as image:
        width, height = image.size
        if not as_it_is:
            stream = io.BytesIO()
            image.convert("RGB").save(stream, format="WEBP", quality=80, method=2)
            data, kind, lazy = stream.getvalue(), "webp", ' loading="lazy"'
    caption = escape(f"{run.name}, after {step:,} student updates")
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    picture = f'<img alt="{caption}" width="{width}" height="{height}"{lazy} src="{source}">'
    return f"<figure><figcaption>{caption}</figcaption>{picture}</figure>"


def _timing(runs: Sequence[Run]) -> str:
    timings = [(run.report or {}).get("timing") or {} for run in runs]
    if not any(timings):
        return ""
    values = [[timing.get(name) for timing in timings] for name in _TIMES]
    cells = _columns(values, [_TIMES_BETTER[name] for name in _TIMES])
    rows = [_row(i, run, cells[i]) for i, run in enumerate(runs)]
    note = '<p class="note">Comparable on the same machine under the same load only.</p>'
    return f"<h2>Timing</h2>{_table(['run', *_TIMES], rows)}{note}"
