"""report.html: one file, no script, nothing fetched; readable on a phone, in light and in dark."""

import base64
from html import escape
from pathlib import Path
from typing import Any

from reports.plots import grouped, line_plot, read_series
from reports.run_report import (
    Report,
    findings,
    headline,
    measured_table,
    notes,
    published_table,
    result_rows,
    result_table,
)
from reports.text import _text

_STYLE = """
:root { color-scheme: light dark; --paper:#fbfbfa; --card:#fff; --ink:#1d1f23; --faint:#646a73;
  --line:#dfe1e5;
  --accent:#1f63c4; --mark:#eaf1fc; --curve-0:#1f63c4; --curve-1:#c2410c; --curve-2:#15803d;
  --curve-3:#7e22ce;
  --curve-4:#a16207; }
@media (prefers-color-scheme: dark) { :root { --paper:#15171a; --card:#1e2125; --ink:#e7e9ec; --faint:#9aa1ab;
  --line:#34393f; --accent:#7fb0ff; --mark:#22304a; --curve-0:#7fb0ff; --curve-1:#ff9a66; --curve-2:#6fd58f;
  --curve-3:#c99bff; --curve-4:#e6c34d; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 system-ui, sans-serif; }
main { max-width:1120px; margin:0 auto; padding:2rem 1.1rem 4rem; }
h1 { font-size:1.75rem; line-height:1.2; margin:0 0 .2rem; overflow-wrap:anywhere; }
h2 { font-size:1.2rem; margin:2.4rem 0 .8rem; }
p { margin:.4rem 0; max-width:75ch; } .faint, figcaption, .note { color:var(--faint); font-size:.9rem; }
.findings { display:grid; grid-template-columns:repeat(auto-fit,minmax(230px,1fr)); gap:.8rem; padding:0;
  margin:1.4rem 0;
  list-style:none; }
.findings li { background:var(--card); border:1px solid var(--line); border-left:4px solid var(--accent);
  border-radius:8px; padding:.7rem .9rem; }
.wide { overflow-x:auto; background:var(--card); border:1px solid var(--line); border-radius:8px; }
table { border-collapse:collapse; width:100%; }
th, td { padding:.55rem .9rem; text-align:right; border-bottom:1px solid var(--line);
  font-variant-numeric:tabular-nums;
  white-space:nowrap; }
th:first-child, td:first-child { text-align:left; } tr:last-child td { border-bottom:0; }
thead th { color:var(--faint); font-weight:600; font-size:.87rem; } tr.student td { background:var(--mark);
  font-weight:600; }
.words td, .words th { white-space:normal; text-align:left; vertical-align:top; min-width:5rem; }
figure { margin:0 0 1rem; } figure img { display:block; max-width:100%; height:auto; border:1px solid
  var(--line);
  border-radius:8px; } figcaption { margin:.3rem 0; }
.plots { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr)); gap:.8rem; }
.plot { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:.6rem; min-width:0; }
svg { display:block; width:100%; height:auto; } svg text { fill:var(--faint); font:12px system-ui, sans-serif;
  }
svg .grid { stroke:var(--line); stroke-width:1; } svg .axis { fill:none; stroke:var(--faint); stroke-width:1;
  }
svg .curve { fill:none; stroke:var(--c); stroke-width:1.8; stroke-linejoin:round; } svg .dot { fill:var(--c);
  }
svg .level { stroke:var(--ink); stroke-width:1.2; stroke-dasharray:5 4; opacity:.65; } svg .name {
  fill:var(--ink); font-size:11px; }
.legend { list-style:none; margin:.3rem 0 0; padding:0; font-size:.8rem; overflow-wrap:anywhere; }
.legend li::before { content:""; display:inline-block; width:14px; height:3px; margin-right:6px;
  vertical-align:middle;
  background:var(--c); }
details { margin:.5rem 0; } summary { cursor:pointer; color:var(--accent); padding:.2rem 0; }
dl { display:grid; grid-template-columns:minmax(9rem,max-content) 1fr; gap:.15rem 1rem; margin:.4rem 0;
  font-size:.92rem; }
dt { color:var(--faint); } dd { margin:0; overflow-wrap:anywhere; min-width:0; } dl dl { grid-column:1/-1;
  margin-left:1rem; }
@media (max-width:560px) { dl { grid-template-columns:1fr; } dd { margin-bottom:.4rem; } }
"""


_COMPARABLE = "A measurement is comparable with this one only if all of this is the same (see manifest.json)."


def render_html(report: Report) -> str:
    """The report as one HTML page; pictures and curves are inside it."""
    content = report.content
    environment = content["environment"] | {"settings": content["config_path"]}
    title = headline(report)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(str(content["weights"]))} weights · {escape(str(content["model"]))}</p>',
        _findings(report),
        "<h2>Results</h2>",
        _results(report),
        *(f'<p class="note">{escape(text)}</p>' for text in notes(report)),
        _more_tables(report),
        _pictures(report.pictures),
        _curves(report),
        "<h2>Timing</h2>",
        _list(content["timing"]),
        "<h2>How it was measured</h2>",
        f'<p class="faint">{_COMPARABLE}</p>',
        _list(report.manifest),
        f"<details><summary>Details of every value</summary>{_details(report)}</details>",
        f"<details><summary>Environment</summary>{_list(environment)}</details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _findings(report: Report) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in findings(report))
    return f'<ul class="findings">{items}</ul>' if items else ""


def _results(report: Report) -> str:
    if not report.content["metrics"]:
        return '<p class="note">Nothing was measured in this run.</p>'
    return _table(*result_table(report), mark_last=True)


def _more_tables(report: Report) -> str:
    """How each number was measured, and published values, where these are told."""
    parts = []
    for title, table in [
        ("How each number was measured", measured_table(report)),
        ("Published values, measured the same way", published_table(report)),
    ]:
        if table is not None:
            parts.append(f'<h2>{title}</h2><div class="words">{_table(*table)}</div>')
    return "\n".join(parts)


def _table(header: list[str], cells: list[list[str]], mark_last: bool = False) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    rows = []
    for i, row in enumerate(cells):
        kind = ' class="student"' if mark_last and i == len(cells) - 1 else ""
        rows.append(f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _details(report: Report) -> str:
    return "".join(
        f"<h3>{escape(title)}</h3>" + _list({name: _measured(result) for name, result in results.items()})
        for title, results in result_rows(report)
    )


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    return {"value": result["value"], "num_images": result["num_images"], **result["details"]}


def _pictures(pictures: dict[str, Path]) -> str:
    figures = []
    for i, (title, path) in enumerate(pictures.items()):
        data = base64.b64encode(path.read_bytes()).decode()
        figure = (
            f'<figure><img alt="{escape(title, quote=True)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(title)}</figcaption></figure>"
        )
        figures.append(figure if i == 0 else f"<details><summary>{escape(title)}</summary>{figure}</details>")
    return "<h2>Pictures</h2>" + "".join(figures) if figures else ""


def _curves(report: Report) -> str:
    series = read_series(report.curves) if report.curves is not None else {}
    plots = []
    for title, group in sorted(grouped(series).items(), key=lambda item: _importance(item[0], report)):
        svg = line_plot(title, group, _teacher_levels(title, report))
        if svg:
            plots.append(f'<div class="plot">{svg}</div>')
    if not plots:
        return ""
    note = (
        "Dashed: the teacher, on the pictures of the table. val/ curves are drawn over the smaller "
        "validation set, which raises a Fréchet distance; test/ is the evaluation of the table."
    )
    return f'<h2>Curves</h2><p class="faint">{note}</p><div class="plots">{"".join(plots)}</div>'


def _importance(title: str, report: Report) -> tuple[bool, str]:
    return title not in report.content["metrics"], title


def _teacher_levels(title: str, report: Report) -> dict[str, float]:
    teacher = report.content["teacher_metrics"]
    return {
        f"teacher, {row.removeprefix('steps_')} step{'' if row == 'steps_1' else 's'}": results[title][
            "value"
        ]
        for row, results in teacher.items()
        if title in results
    }


def _list(values: dict[str, Any]) -> str:
    items = []
    for name, value in values.items():
        if isinstance(value, dict):
            items.append(f"<dt>{escape(name)}</dt><dd></dd>{_list(value)}")
        else:
            items.append(f"<dt>{escape(name)}</dt><dd>{escape(_text(value))}</dd>")
    return f"<dl>{''.join(items)}</dl>"
