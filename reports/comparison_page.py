"""The page of `compare`: one file; resting on a run in a table lights up its curves."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from PIL import Image

from reports.comparison import Run, best_of, data_settings, differences, same_samples
from reports.html import Row, Table, image_source, render
from reports.plots import Series, line_figure
from reports.run_report import direction, steps_in_words, with_arrow
from reports.text import format_value

_FEW = 12
"""Up to so many runs, pictures stand in the page as they are; of more, smaller files of them."""
_POINTS_OF_ALL = 40_000
_TIMINGS = ("seconds_per_step", "images_per_second", "peak_memory_gib")


def render_comparison(runs: Sequence[Run]) -> str:
    """The comparison as one HTML page; pictures and curves are inside it."""
    metrics, notes = _metrics(runs)
    return render(
        "comparison.html",
        f"{len(runs)} run{'' if len(runs) == 1 else 's'} side by side",
        problems=[f"⚠ {problem}" for run in runs for problem in run.problems],
        metrics=metrics,
        notes_=notes,
        last_values=_last_values(runs),
        figures=_curves(runs),
        differences=_differences(runs, [run.config for run in runs]),
        has_configs=any(run.config is not None for run in runs),
        sheets=_sheets(runs),
        compressed=_FEW if len(runs) > _FEW else None,
        timing=_timing(runs),
        environments=_differences(runs, [(run.report or {}).get("environment") for run in runs]),
    )


def _table(
    runs: Sequence[Run], facts: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[float | None]],
    better: Sequence[int], above: Sequence[Row] = (),
) -> Table:  # fmt: skip
    """One row for each run: its name, facts about it and values; the best of a column is marked.

    Args:
        runs: in the order of their colours.
        facts: a column's name to a text for each run.
        values: a column's name to a value for each run.
        better: -1, 0 or 1 for each column of values, see `best_of`.
        above: rows that stand over the runs.
    """
    best = [best_of(column, sign) for column, sign in zip(values.values(), better)]
    rows = list(above)
    for i, run in enumerate(runs):
        numbers = ["–" if (value := column[i]) is None else format_value(value) for column in values.values()]
        cells = [run.name, *(column[i] for column in facts.values()), *numbers]
        marked = {1 + len(facts) + k for k, places in enumerate(best) if i in places}
        rows.append(Row(cells, best=marked, number=i))
    return Table(["run", *facts, *values], rows, "sorts")


def _metrics(runs: Sequence[Run]) -> tuple[Table | None, list[str]]:
    """The final evaluations, and which metrics were not measured in one way; None if no run has a report."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not names:
        return None, []
    values: dict[str, Sequence[float | None]] = {}
    better, notes = [], []
    for name in names:
        values[with_arrow(name)] = [
            run.metrics[name]["value"] if name in run.metrics else None for run in runs
        ]
        conditions = {_conditions(run.metrics[name]) for run in runs if name in run.metrics}
        # times say something with their spread and on one machine only
        better.append(direction(name) if len(conditions) == 1 and name != "milliseconds_per_image" else 0)
        if len(conditions) > 1:
            notes.append(f"{name} was not measured in the same way in all runs, so none is marked as best.")
    facts = {
        "step": _steps(runs),
        "weights": [_weights(run) for run in runs],
        "images": [_counts(run) for run in runs],
    }
    return _table(runs, facts, values, better, _teacher_rows(runs, names)), notes


def _weights(run: Run) -> str:
    report = run.report or {}
    return f"{report.get('weights', 'no report')}{'' if report.get('finished', True) else ', not finished'}"


def _conditions(result: dict[str, Any]) -> str:
    """What two values must share to be compared: the number of pictures and all details (but a spread)."""
    details = {key: value for key, value in (result.get("details") or {}).items() if key != "spread"}
    return json.dumps([result.get("num_images"), details], sort_keys=True, default=str)


def _steps(runs: Sequence[Run]) -> list[str]:
    return ["–" if run.step is None else f"{run.step:,}" for run in runs]


def _counts(run: Run) -> str:
    counts = {r.get("num_images") for name, r in run.metrics.items() if name != "milliseconds_per_image"}
    return ", ".join(f"{count:,}" for count in sorted(c for c in counts if c is not None)) or "–"


def _teacher_rows(runs: Sequence[Run], names: Sequence[str]) -> list[Row]:
    """One row for each different measurement of a teacher (above the runs, never marked as best)."""
    seen: dict[str, Row] = {}
    for run in runs:
        for row, results in ((run.report or {}).get("teacher_metrics") or {}).items():
            # timings of the same teacher differ from run to run: the first stands for all
            values = {name: r["value"] for name, r in results.items() if name != "milliseconds_per_image"}
            numbers = [format_value(results[name]["value"]) if name in results else "–" for name in names]
            cells = [f"teacher, {steps_in_words(row)}", "", "", "", *numbers]
            seen.setdefault(json.dumps([row, values]), Row(cells, "faint"))
    return list(seen.values())


def _last_values(runs: Sequence[Run]) -> Table | None:
    """What the validations logged last, for runs that have no report (yet)."""
    names = {name for run in runs for name in run.series if name.startswith("val/")}
    if not names or all(run.metrics for run in runs):
        return None
    values = {with_arrow(name): [run.last_value(name) for run in runs] for name in sorted(names)}
    is_fair = len({_validation_set(run) for run in runs if names & run.series.keys()}) == 1
    return _table(runs, {"step": _steps(runs)}, values, [is_fair * direction(name) for name in sorted(names)])


def _validation_set(run: Run) -> str:
    """What two validations must share to be compared, as far as the configuration tells.

    All that chooses captions, reference and frame: the data module's settings of evaluations and validations.
    """
    config = run.config or {}
    data, given = data_settings(run)
    chosen = {k: v for k, v in given.items() if k.startswith(("eval_", "val_"))}
    chosen.pop("eval_batch_size", None)  # changes no number
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    judges = [one for one in callbacks if str(one).find("Evaluation") >= 0]
    return json.dumps([data, chosen, judges], sort_keys=True, default=str)


def _curves(runs: Sequence[Run]) -> list[go.Figure]:
    """One plot for each column of the runs' metrics.csv, validations first."""
    names = {name for run in runs for name in run.series if name.startswith(("val/", "train/"))}
    most = min(2000, max(40, _POINTS_OF_ALL // max(1, len(runs))))
    drawn = []
    for name in sorted(names, key=lambda name: (not name.startswith("val/"), name)):
        curves = [
            Series(run.name, run.series[name].points, run.series[name].not_finite, number=i)
            for i, run in enumerate(runs)
            if name in run.series
        ]
        drawn.append(line_figure(name, curves, most=most))
    return [figure for figure in drawn if figure is not None]


def _differences(runs: Sequence[Run], contents: Sequence[dict[str, Any] | None]) -> Table | None:
    """The keys in which contents differ; the longer side of runs and keys goes down the page."""
    found = {
        key.replace(".init_args", ""): ["–" if value is None else value for value in values]
        for key, values in differences(contents).items()
    }
    if not found:
        return None
    if len(found) >= len(runs):
        rows = [Row([key, *values]) for key, values in found.items()]
        return Table(["", *(run.name for run in runs)], rows, "text")
    rows = [
        Row([run.name, *(values[i] for values in found.values())], number=i) for i, run in enumerate(runs)
    ]
    return Table(["run", *found], rows, "text")


def _sheets(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The last sheets of samples, those of the same prompts and seeds together."""
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for run in runs:
        if run.grid is not None:
            groups.setdefault(same_samples(run), []).append(sheet(run, len(runs) <= _FEW))
    return [{"same": key is not None, "pictures": pictures} for key, pictures in groups.items()]


def sheet(run: Run, as_it_is: bool) -> dict[str, Any]:
    """The last sheet of samples of a run that has one, for a page; smaller if not ``as_it_is``."""
    assert run.grid is not None
    step, path = run.grid
    with Image.open(path) as image:
        size = image.size
        if as_it_is:
            source = image_source(path.read_bytes())
        else:
            stream = io.BytesIO()
            image.convert("RGB").save(stream, format="WEBP", quality=80, method=2)
            source = image_source(stream.getvalue(), "webp")
    return {"source": source, "caption": f"{run.name}, after {step:,} student updates", "size": size}


def _timing(runs: Sequence[Run]) -> Table | None:
    timings = [(run.report or {}).get("timing") or {} for run in runs]
    if not any(timings):
        return None
    facts = {name: [_with_spread(timing, name) for timing in timings] for name in _TIMINGS}
    return _table(runs, facts, {}, [])


def _with_spread(timing: Mapping[str, Any], name: str) -> str:
    value, ends = timing.get(name), timing.get(f"{name}_quartiles")
    text = "–" if value is None else format_value(value)
    return text + (f" ({format_value(ends[0])} to {format_value(ends[1])})" if ends else "")
