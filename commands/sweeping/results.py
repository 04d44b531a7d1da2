"""What a sweep has come to: sweep.json, sweep.html, the ranked table, the best configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from callbacks.run_folder import CONFIG_NAME
from commands.sweeping.settings import SweepSettings
from commands.sweeping.study import SweepStudy
from common.files import write_text_atomically
from reports.sweep_page import render_page, row_cells, row_header
from reports.text import short_names, text_table

_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
_ORDER = ["complete", "pruned", "running", "waiting", "failed"]
_FEWEST_FOR_IMPORTANCE = 4


def collect(study: SweepStudy) -> dict[str, Any]:
    """The content of sweep.json; trials are ranked, the best first."""
    settings = study.settings
    trials = [_row(trial) for trial in study.live()]
    sign = 1 if settings.direction == "minimize" else -1
    # pruned ones had less time, so they stand after all that came to their end
    trials.sort(
        key=lambda t: (
            _ORDER.index(t["state"]), math.inf if t["value"] is None else sign * t["value"], t["trial"]
        )
    )  # fmt: skip
    for i, trial in enumerate(trials):
        trial["rank"] = i + 1 if trial["state"] == "complete" else None
    return {
        "name": settings.name,
        "folder": str(settings.folder),
        "metric": settings.metric,
        "direction": settings.direction,
        "trials_asked": settings.trials,
        "counts": {state: sum(t["state"] == state for t in trials) for state in _ORDER},
        "lost_and_run_again": study.replaced(),
        "best": trials[0] if trials and trials[0]["rank"] else None,
        "importance": importance(plain_copy(study)),
        "trials": trials,
        "space": settings.space_as_data(),
        "base": settings.base,
        "overrides": settings.overrides,
    }


def _row(trial: FrozenTrial) -> dict[str, Any]:
    facts, values = trial.user_attrs, dict(sorted(trial.intermediate_values.items()))
    state = _STATES.get(trial.state.name, "waiting")
    value = trial.value if state in ("complete", "pruned") else None
    return {
        "trial": facts.get("first", trial.number),
        "state": state,
        "value": value if value is not None and math.isfinite(value) else None,
        "params": trial.params,
        **{name: facts.get(name) for name in ("step", "seconds", "threads", "host", "folder", "error")},
        "values": {step: value if math.isfinite(value) else None for step, value in values.items()},
    }


def plain_copy(study: SweepStudy) -> optuna.Study:
    """A study in memory of the trials that have a value, with short names of the keys, to be shown."""
    names = short_names(list(study.settings.space))
    copy = optuna.create_study(direction=study.settings.direction)
    for trial in study.live():
        if trial.value is not None and math.isfinite(trial.value):
            copy.add_trial(create_trial(
                state=trial.state, value=trial.value, intermediate_values=trial.intermediate_values,
                params={names[key]: value for key, value in trial.params.items()},
                distributions={names[key]: one for key, one in trial.distributions.items()},
            ))  # fmt: skip
    return copy


def importance(study: optuna.Study) -> dict[str, float] | None:
    """Each key's share in the variance of good trials (PED-ANOVA, Watanabe et al. 2023, by Optuna).

    Returns:
        Key to share, the largest first, sum 1; None with fewer than four complete trials, or if all of them
        have one value.
    """
    complete = study.get_trials(states=[TrialState.COMPLETE])
    if len(complete) < _FEWEST_FOR_IMPORTANCE or len({trial.value for trial in complete}) == 1:
        return None
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}


def write_results(study: SweepStudy) -> dict[str, Any]:
    """Write sweep.json, sweep.html and, if any trial is complete, best.yaml; returns sweep.json's content."""
    settings, content = study.settings, collect(study)
    settings.folder.mkdir(parents=True, exist_ok=True)
    content["best_config"] = write_best(settings, content["best"])
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomically(settings.folder / "sweep.json", text)
    page = render_page(content, plain_copy(study), settings.path.read_text(encoding="utf-8"))
    write_text_atomically(settings.folder / "sweep.html", page)
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
    config.setdefault("trainer", {})["default_root_dir"] = settings.root
    header = (
        f"# Best of the {settings.trials} trials of {settings.path.name}: trial {best['trial']}, "
        f"{settings.metric} {best['value']!r} at step {best['step']}.\n"
        f"# The same value comes out with the same number of threads: OMP_NUM_THREADS={best['threads']}\n"
    )
    path = settings.folder / "best.yaml"
    write_text_atomically(path, header + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return str(path)


def ranked_table(content: dict[str, Any]) -> str:
    """The ranked table for a terminal."""
    return text_table(row_header(content), [row_cells(trial, content) for trial in content["trials"]])
