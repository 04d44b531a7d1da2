"""sweep.html: one file that fetches nothing; the ranked table and the plots that Optuna draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.comparison import load_run
from reports.comparison_page import sheet
from reports.html import Row, Table, render
from reports.text import said, short_names

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go


_SHOWN = 4  # best trials whose samples are shown


def render_page(content: dict[str, Any], study: optuna.Study, source: str) -> str:
    """The page of a sweep.

    Args:
        content: of sweep.json.
        study: the trials that have a value, for the plots.
        source: text of the sweep's YAML, shown folded.
    """
    rows = [Row(row_cells(one, content), "marked" if one["rank"] == 1 else "") for one in content["trials"]]
    return render(
        "sweep.html", f"Sweep {content['name']}", content=content, findings_=_findings(content),
        trials=Table(row_header(content), rows), figures=list(_figures(study, content)), source=source,
        failed={one["trial"]: one["error"] for one in content["trials"] if one["error"]},
        sheets=best_samples(content["trials"]),
    )  # fmt: skip


def best_samples(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last samples of the best trials, as far as they lie on this machine."""
    best = [one for one in trials if one["rank"] and one["folder"]][:_SHOWN]
    runs = [load_run(Path(one["folder"]), f"Rank {one['rank']}, trial {one['trial']}") for one in best]
    return [sheet(run, as_it_is=False) for run in runs if run.grid is not None]


def row_header(content: dict[str, Any]) -> list[str]:
    """Names of the columns of the ranked table."""
    arrow = "↓" if content["direction"] == "minimize" else "↑"
    names = short_names(list(content["space"])).values()
    return ["#", "trial", f"{content['metric']} {arrow}", *names, "state", "step", "seconds", "run"]


def row_cells(trial: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """A row of the ranked table."""
    reason = f": {trial['error'].splitlines()[-1][:60]}" if trial["error"] else ""
    values = [trial["rank"], trial["trial"], trial["value"]]
    params = [said(trial["params"].get(key)) for key in content["space"]]
    seconds = None if trial["seconds"] is None else round(trial["seconds"])
    folder = str(trial["folder"] or "–").removeprefix(f"{content['folder']}/")
    return [
        *map(_cell, values), *params, trial["state"] + reason, _cell(trial["step"]), _cell(seconds), folder,
    ]  # fmt: skip


def _cell(value: Any) -> str:
    return "–" if value is None else said(value)


def _findings(content: dict[str, Any]) -> list[str]:
    counts, asked, best = content["counts"], content["trials_asked"], content["best"]
    texts = []
    if best:
        names = short_names(list(content["space"]))
        point = ", ".join(f"{names[key]} {said(value)}" for key, value in best["params"].items())
        texts = [f"Best: {content['metric']} {said(best['value'])}, trial {best['trial']} ({point})"]
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    texts.append(f"{asked} trials: {states or 'none has begun'}")
    if again := content["lost_and_run_again"]:
        texts.append(f"{again} interrupted and run again with the same values")
    if content["best_config"]:
        texts.append(f"Best configuration: {content['best_config']}")
    return texts


def _figures(study: optuna.Study, content: dict[str, Any]) -> Iterator[go.Figure]:
    """Optuna's plots, those for which there are enough trials."""
    from optuna import importance, visualization

    name, trials = content["metric"], study.get_trials(deepcopy=False)
    if not content["best"]:
        return
    yield visualization.plot_optimization_history(study, target_name=name)
    yield visualization.plot_parallel_coordinate(study, target_name=name)
    yield visualization.plot_slice(study, target_name=name)
    if content["importance"]:
        evaluator = importance.PedAnovaImportanceEvaluator()
        yield visualization.plot_param_importances(study, evaluator=evaluator, target_name=name)
    if any(len(trial.intermediate_values) > 1 for trial in trials):
        yield visualization.plot_intermediate_values(study)
