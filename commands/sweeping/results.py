"""What a sweep has come to: sweep.json, the ranked table, the best configuration."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from callbacks.run_folder import CONFIG_NAME
from commands.sweeping.settings import SweepSettings
from commands.sweeping.study import TrialBook, import_optuna, point_of
from common.files import write_text_atomically
from reports.text import format_value, short_names

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
_ORDER = ["complete", "pruned", "running", "waiting", "failed"]
_FEWEST_FOR_IMPORTANCE = 4


def collect(book: TrialBook) -> dict[str, Any]:
    """The content of sweep.json; trials are ranked, the best first."""
    settings, live = book.settings, book.live()
    keys = [dimension.key for dimension in settings.space.dimensions]
    trials = [_row(slot, live[slot], keys) for slot in sorted(live) if slot < settings.trials]
    sign = 1 if settings.minimize else -1
    # pruned ones had less time, so they stand after all that came to their end
    trials.sort(key=lambda t: (_ORDER.index(t["state"]), sign * _or(t["value"], math.inf * sign), t["trial"]))
    rank = 0
    for trial in trials:
        rank += trial["state"] == "complete"
        trial["rank"] = rank if trial["state"] == "complete" else None
    best = trials[0] if rank else None
    return {
        "name": settings.name,
        "folder": str(settings.folder),
        "metric": settings.metric,
        "direction": settings.direction,
        "trials_asked": settings.trials,
        "counts": {state: sum(t["state"] == state for t in trials) for state in _ORDER},
        "lost_and_run_again": sum(bool(t.user_attrs.get("lost")) for t in book.trials()),
        "best": best,
        "importance": importance(book),
        "trials": trials,
        "space": {
            d.key: {"kind": d.kind, "values": list(d.values), "step": d.step}
            for d in settings.space.dimensions
        },
        "base": [str(path) for path in settings.base],
        "overrides": settings.overrides,
    }


def _row(slot: int, trial: FrozenTrial, keys: list[str]) -> dict[str, Any]:
    point = point_of(trial)
    facts, values = trial.user_attrs, dict(sorted(trial.intermediate_values.items()))
    state = _STATES.get(trial.state.name, "waiting")
    value = trial.value if state in ("complete", "pruned") else None
    if value is not None and not math.isfinite(value):  # a pruned one
        value = None
    return {
        "trial": slot,
        "state": state,
        "value": value,
        "step": facts.get("step"),
        "params": {key: point[key] for key in keys},
        "seconds": facts.get("seconds"),
        "threads": facts.get("threads"),
        "host": facts.get("host"),
        "folder": facts.get("folder"),
        "error": facts.get("error"),
        "values": {step: value if math.isfinite(value) else None for step, value in values.items()},
    }


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def importance(book: TrialBook) -> dict[str, float] | None:
    """Each key's share in the variance of good trials (PED-ANOVA, Watanabe et al. 2023, by Optuna).

    Returns:
        Key to share, the largest first, sum 1; None with fewer than four complete trials, or if all of them
        have one value.
    """
    complete = [trial for trial in book.live().values() if trial.state.name == "COMPLETE"]
    if len(complete) < _FEWEST_FOR_IMPORTANCE or len({trial.value for trial in complete}) == 1:
        return None
    optuna = import_optuna()
    copy = optuna.create_study(direction=book.settings.direction)  # without void and lost trials
    copy.add_trials(complete)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    shares = optuna.importance.get_param_importances(copy, evaluator=evaluator)
    return {key: float(share) for key, share in sorted(shares.items(), key=lambda item: -item[1])}


def write_results(book: TrialBook) -> dict[str, Any]:
    """Write sweep.json, sweep.html and, if any trial is complete, best.yaml; returns sweep.json's content."""
    from reports.sweep_page import render_page

    settings, content = book.settings, collect(book)
    settings.folder.mkdir(parents=True, exist_ok=True)
    content["best_config"] = write_best(settings, content["best"])
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomically(settings.folder / "sweep.json", text)
    source = settings.path.read_text(encoding="utf-8")
    write_text_atomically(settings.folder / "sweep.html", render_page(content, source))
    return content


def write_best(settings: SweepSettings, best: dict[str, Any] | None) -> str | None:
    """Write the best trial's resolved configuration as ``best.yaml``; returns its path.

    None if there is no complete trial yet, or if its run folder lies on another machine.
    """
    source = Path(best["folder"] or "") / CONFIG_NAME if best else None
    if best is None or source is None or not source.is_file():
        return None
    config = yaml.safe_load(source.read_text(encoding="utf-8"))
    config["experiment"] = f"{settings.name}_best"
    config.setdefault("trainer", {})["default_root_dir"] = str(settings.root)
    header = (
        f"# Best of the {settings.trials} trials of {settings.path.name}: trial {best['trial']}, "
        f"{settings.metric} {best['value']!r} at step {best['step']}.\n"
        f"# The same value comes out with the same number of threads: OMP_NUM_THREADS={best['threads']}\n"
    )
    path = settings.folder / "best.yaml"
    write_text_atomically(path, header + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return str(path)


def text_table(content: dict[str, Any]) -> str:
    """The ranked table for a terminal."""
    names = short_names(list(content["space"]))
    header = ["#", "trial", content["metric"], *names.values(), "state", "run"]
    rows = [
        [
            str(t["rank"] or "–"), str(t["trial"]), _text(t["value"]),
            *(_text(t["params"].get(key)) for key in names), _state(t), str(t["folder"] or ""),
        ]
        for t in content["trials"]
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [header, *rows]
    )


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return format_value(value) if isinstance(value, float) else str(value)


def _state(trial: dict[str, Any]) -> str:
    if trial["state"] == "pruned":
        return f"pruned at step {trial['step']}"
    if trial["state"] == "failed":
        last = re.sub(r"\s+", " ", str(trial["error"] or "").splitlines()[-1] if trial["error"] else "")
        return f"failed: {last[:60]}"
    return str(trial["state"])
