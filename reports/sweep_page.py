"""sweep.html: one file, no script, nothing fetched; made of sweep.json alone."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from reports.svg_plots import STYLE, Axis, Curve, parallel_plot, xy_plot
from reports.text import format_value, short_names

_MORE_STYLE = """
main { max-width:1320px; }
.rank1 td { background:var(--mark); font-weight:600; }
.bar { display:inline-block; height:.7rem; background:var(--accent); border-radius:3px;
  vertical-align:middle; }
.run:hover .curve { stroke-width:4; } .faded .curve, .faded .dot { opacity:.35; }
pre { white-space:pre-wrap; overflow-wrap:anywhere; font-size:.85rem; background:var(--card);
  border:1px solid var(--line); border-radius:8px; padding:.7rem .9rem; }
.broad { overflow-x:auto; background:var(--card); border:1px solid var(--line); border-radius:8px;
  padding:.6rem; }
.broad svg { height:auto; } svg text { paint-order:stroke; stroke:var(--card); stroke-width:3px; }
"""
_IMPORTANCE_NOTE = (
    "Share of each key in what separates good trials from the rest (PED-ANOVA, as Optuna computes it). "
    "With few trials it is a hint, not a measurement."
)


def render_page(content: dict[str, Any], source: str) -> str:
    """The page of a sweep.

    Args:
        content: of sweep.json.
        source: text of the sweep's YAML, shown folded.
    """
    title = f"Sweep {content['name']}"
    arrow = "↓" if content["direction"] == "minimize" else "↑"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(content["metric"])} {arrow} · base '
        f"{escape(', '.join(content['base']))}</p>",
        _findings(content),
        "<h2>Trials</h2>",
        _table(content, arrow),
        _importance(content),
        _plots(content),
        _errors(content),
        f"<details><summary>{escape(title)}: its YAML</summary><pre>{escape(source)}</pre></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_MORE_STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _findings(content: dict[str, Any]) -> str:
    counts, asked = content["counts"], content["trials_asked"]
    ended = counts["complete"] + counts["pruned"] + counts["failed"]
    said = [f"{ended} of {asked} trials have ended" if ended < asked else f"{asked} trials"]
    extra = [
        f"{counts[state]} {state}" for state in ("complete", "pruned", "failed", "running") if counts[state]
    ]
    said[0] += f": {', '.join(extra)}" if extra else ""
    if again := content["lost_and_run_again"]:
        said.append(f"{again} interrupted and run again with the same values")
    if best := content["best"]:
        names = short_names(list(content["space"]))
        point = ", ".join(f"{names[key]} {_cell(value)}" for key, value in best["params"].items())
        said.insert(
            0, f"Best: {content['metric']} {format_value(best['value'])}, trial {best['trial']} ({point})"
        )
    if content.get("best_config"):
        said.append(f"Best configuration: {content['best_config']}")
    return f'<ul class="findings">{"".join(f"<li>{escape(text)}</li>" for text in said)}</ul>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return format_value(value)
    return str(value)


def _table(content: dict[str, Any], arrow: str) -> str:
    names = short_names(list(content["space"]))
    header = [
        "#",
        "trial",
        f"{content['metric']} {arrow}",
        *names.values(),
        "state",
        "step",
        "seconds",
        "run",
    ]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    rows = []
    for trial in content["trials"]:
        seconds = f"{trial['seconds']:.0f}" if trial["seconds"] is not None else "–"
        cells = [
            _cell(trial["rank"]), str(trial["trial"]), _cell(trial["value"]),
            *(_cell(trial["params"].get(key)) for key in names), trial["state"], _cell(trial["step"]),
            seconds,
            (trial["folder"] or "–").removeprefix(f"{content['folder']}/"),
        ]  # fmt: skip
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr{' class=rank1' if trial['rank'] == 1 else ''}>{body}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide">{table}</div><p class="faint">Runs lie under {escape(content["folder"])}.</p>'


def _importance(content: dict[str, Any]) -> str:
    shares = content["importance"]
    if not shares:
        return ""
    names = short_names(list(content["space"]))
    rows = "".join(
        f'<tr><td title="{escape(key, quote=True)}">{escape(names[key])}</td><td>{100 * share:.0f} %</td>'
        '<td style="text-align:left;width:60%">'
        f'<span class="bar" style="width:{100 * share:.1f}%"></span></td></tr>'
        for key, share in shares.items()
    )
    note = f'<p class="note">{escape(_IMPORTANCE_NOTE)}</p>'
    return f'<h2>Importance</h2><div class="wide"><table><tbody>{rows}</tbody></table></div>{note}'


def _plots(content: dict[str, Any]) -> str:
    valued = [trial for trial in content["trials"] if trial["value"] is not None]
    if not valued:
        return '<p class="note">No trial has a value yet, so there is nothing to plot.</p>'
    plots = [_history(content, valued), *(_slice(content, valued, key) for key in content["space"])]
    curves = _curves(content)
    cards = "".join(f'<div class="plot">{plot}</div>' for plot in [*plots, *([curves] if curves else [])])
    note = "Dots are trials; pale ones were pruned. The line is the best so far."
    return (
        "<h2>Parallel coordinates</h2>"
        '<p class="faint">One line for each trial; the bluer, the better. Rest on a line to see its trial.'
        "</p>"
        f'<div class="broad">{_parallel(content, valued)}</div>'
        f'<h2>History and each key</h2><p class="faint">{note}</p><div class="plots">{cards}</div>'
    )


def _name(trial: dict[str, Any], content: dict[str, Any]) -> str:
    names = short_names(list(content["space"]))
    point = ", ".join(f"{names[key]} {_cell(value)}" for key, value in trial["params"].items())
    return f"trial {trial['trial']} ({trial['state']}): {content['metric']} {_cell(trial['value'])}; {point}"


def _dot(trial: dict[str, Any], content: dict[str, Any], x: float) -> Curve:
    group = "faded" if trial["state"] == "pruned" else ""
    return Curve(_name(trial, content), [(x, trial["value"])], dots=True, line=False, group=group)


def _history(content: dict[str, Any], valued: list[dict[str, Any]]) -> str:
    better = min if content["direction"] == "minimize" else max
    in_order = sorted(valued, key=lambda trial: trial["trial"])
    best: list[tuple[float, float]] = []
    for trial in in_order:
        if trial["state"] == "complete":
            best.append((trial["trial"], better([trial["value"], *(value for _, value in best[-1:])])))
    steps = [
        point
        for i, point in enumerate(best)
        for point in [*([(point[0], best[i - 1][1])] if i else []), point]
    ]
    if best:
        steps.append((in_order[-1]["trial"], best[-1][1]))
    x = Axis.around("trial", [trial["trial"] for trial in in_order], whole=True, logarithmic=False)
    y = Axis.around(content["metric"], [trial["value"] for trial in in_order])
    dots = [_dot(trial, content, trial["trial"]) for trial in in_order]
    return xy_plot([Curve("best so far", steps, "var(--curve-1)"), *dots], x, y)


def _axis(content: dict[str, Any], key: str, title: str) -> Axis:
    """The axis of a key: all of its range, so that what was not tried shows, or a list as named places."""
    dimension = content["space"][key]
    if dimension["kind"] in ("grid", "choices"):
        return Axis.of_names(title, [_cell(value) for value in dimension["values"]])
    return Axis.around(title, dimension["values"], logarithmic="log" in dimension["kind"])


def _at(content: dict[str, Any], key: str, value: Any) -> float:
    """Where a value lies on the axis of its key."""
    dimension = content["space"][key]
    if dimension["kind"] in ("grid", "choices"):
        return float(dimension["values"].index(value))
    return float(value)


def _slice(content: dict[str, Any], valued: list[dict[str, Any]], key: str) -> str:
    title = short_names(list(content["space"]))[key]
    x = _axis(content, key, title)
    y = Axis.around(content["metric"], [trial["value"] for trial in valued])
    dots = [_dot(trial, content, _at(content, key, trial["params"][key])) for trial in valued]
    return xy_plot(dots, x, y)


def _curves(content: dict[str, Any]) -> str:
    """The metric of every trial against student updates, if any trial reported it more than once."""
    trials = content["trials"]
    points = {
        trial["trial"]: [(float(step), value) for step, value in trial["values"].items() if value is not None]
        for trial in trials
    }
    all_points = [point for some in points.values() for point in some]
    if not any(len(some) > 1 for some in points.values()):
        return ""
    x = Axis.around("student updates", [step for step, _ in all_points], whole=True, logarithmic=False)
    y = Axis.around(content["metric"], [value for _, value in all_points])
    curves = [
        Curve(_name(trial, content), points[trial["trial"]], _color(trial, content), dots=True)
        for trial in reversed(trials)
    ]
    return xy_plot(curves, x, y)


def _color(trial: dict[str, Any], content: dict[str, Any]) -> str:
    """From the accent colour (best) to the page's orange (worst), by rank among all that have a value."""
    valued = sorted(t["value"] for t in content["trials"] if t["value"] is not None)
    if trial["value"] is None or len(valued) < 2:
        return "var(--faint)" if trial["value"] is None else "var(--curve-0)"
    place = valued.index(trial["value"]) / (len(valued) - 1)
    worse = place if content["direction"] == "minimize" else 1 - place
    return f"color-mix(in oklab, var(--curve-1) {100 * worse:.0f}%, var(--curve-0))"


def _parallel(content: dict[str, Any], valued: list[dict[str, Any]]) -> str:
    names = short_names(list(content["space"]))
    axes = [_axis(content, key, name) for key, name in names.items()]
    axes.append(Axis.around(content["metric"], [trial["value"] for trial in valued]))
    rows = []
    for trial in sorted(valued, key=lambda t: -(t["rank"] or math.inf)):  # the best one on top
        values = [*(_at(content, key, trial["params"][key]) for key in names), trial["value"]]
        group = "faded" if trial["state"] == "pruned" else ""
        rows.append((Curve(_name(trial, content), [], _color(trial, content), group=group), values))
    return parallel_plot(axes, rows)


def _errors(content: dict[str, Any]) -> str:
    failed = [trial for trial in content["trials"] if trial["error"]]
    items = "".join(
        f"<details><summary>Trial {trial['trial']} failed</summary>"
        f"<pre>{escape(trial['error'])}</pre></details>"
        for trial in failed
    )
    return f"<h2>Failed trials</h2>{items}" if failed else ""
