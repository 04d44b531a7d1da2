"""Several runs as they lie on disk, finished or not, and what differs between them."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import nearest_path
from reports.plots import Series, read_series

_FILES = ("report.json", "config.yaml", "metrics.csv")
_GRID = re.compile(r"step_(\d+)\.png")
# where a run lies and how it was started says nothing about what was trained
_PLACES = {"experiment", "ckpt_path", "trainer.default_root_dir", "weights_only"}
# ten times as fast as the Python one, where PyYAML was built with it
_YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Run:
    """What is known of one run; everything but its name may be missing.

    Attributes:
        folder: the run folder.
        name: the shortest tail of its path that no other run has.
        report: report.json.
        config: config.yaml.
        series: the columns of metrics.csv.
        grid: the last sheet of samples, and the student updates it was drawn after.
        problems: files that could not be read, and why.
    """

    folder: Path
    name: str = ""
    report: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    series: dict[str, Series] = field(default_factory=dict)
    grid: tuple[int, Path] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Name to ``{"value", "num_images", "details"}`` of the final evaluation."""
        return (self.report or {}).get("metrics") or {}

    @property
    def step(self) -> int | None:
        """Student updates done, as far as the files tell."""
        if self.report is not None and "step" in self.report:
            return int(self.report["step"])
        last = [series.points[-1][0] for series in self.series.values() if series.points]
        return int(max(last)) if last else None

    def last_value(self, name: str) -> float | None:
        """The last value of a column of metrics.csv."""
        series = self.series.get(name)
        return series.points[-1][1] if series is not None and series.points else None


def is_run(folder: Path) -> bool:
    """Whether a folder holds anything that a run leaves."""
    return any((folder / name).is_file() for name in _FILES)


def find_runs(given: Sequence[str]) -> list[Path]:
    """The run folders that paths, patterns and folders of runs (experiments, sweeps) name, each once.

    Raises:
        UserError: one of them names no run.
    """
    found: dict[Path, Path] = {}
    for name in given:
        paths = [Path(name)] if Path(name).exists() else [Path(p) for p in glob.glob(name, recursive=True)]
        runs = [run for path in sorted(paths, key=_natural) for run in _runs_in(path)]
        if not runs:
            what = "holds no run." if paths else f"does not exist. {nearest_path(name)}".rstrip()
            raise UserError(
                f"{name} {what} Give run folders such as runs/quickstart/version_0, the folder of an "
                "experiment, or a pattern in quotes"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(path: Path) -> list[Path]:
    if is_run(path):
        return [path]
    runs = []
    for parent, folders, _ in os.walk(path):
        inner = [name for name in folders if is_run(Path(parent, name))]
        runs += [Path(parent, name) for name in inner]
        folders[:] = [name for name in folders if name not in inner]
    return sorted(runs, key=_natural)


def _natural(path: Path) -> list[tuple[str, int]]:
    """Sorts version_2 before version_10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(path))]


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read all runs; what is damaged is named in their ``problems``."""
    names = _short_names([folder.resolve().parts for folder in folders])
    pairs = tqdm(list(zip(folders, names)), desc="runs", unit="run", disable=len(folders) < 20)
    return [load_run(folder, name) for folder, name in pairs]


def load_run(folder: Path, name: str) -> Run:
    """Read one run as far as it is there and whole."""
    run = Run(folder, name)
    run.report = _mapping(run, "report.json", json.loads)
    run.config = _mapping(run, "config.yaml", lambda text: yaml.load(text, _YamlLoader))
    if run.report is not None and (wrong := _not_a_report(run.report)):
        run.problems.append(f"{folder / 'report.json'} is damaged: {wrong}")
        run.report = None
    try:
        run.series = read_series(folder / "metrics.csv")
    except (ValueError, KeyError, TypeError, OSError, csv.Error) as error:
        run.problems.append(f"{folder / 'metrics.csv'} is damaged: {first_line(error)}")
    run.grid = _last_grid(run)
    return run


def _last_grid(run: Run) -> tuple[int, Path] | None:
    matches = [(_GRID.fullmatch(path.name), path) for path in (run.folder / "samples").glob("step_*.png")]
    grids = {int(match.group(1)): path for match, path in matches if match}
    if not grids:
        return None
    step, path = max(grids.items())
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError) as error:  # Pillow calls some damages syntax errors
        run.problems.append(f"{path} is damaged: {first_line(error)}")
        return None
    return step, path


def _mapping(run: Run, name: str, parse: Any) -> dict[str, Any] | None:
    path = run.folder / name
    if not path.is_file():
        return None
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, OSError) as error:  # JSON and Unicode errors are ValueErrors
        run.problems.append(f"{path} is damaged: {first_line(error)}")
        return None
    if not isinstance(content, dict):
        run.problems.append(f"{path} is damaged: it is not a mapping")
        return None
    return content


def _not_a_report(content: dict[str, Any]) -> str | None:
    """What keeps a mapping from being a report, None if nothing does."""
    tables = [content.get("metrics", {}), *(content.get("teacher_metrics") or {}).values()]
    for table in tables:
        for name, result in table.items() if isinstance(table, dict) else [("metrics", None)]:
            if not isinstance(result, dict) or not isinstance(result.get("value"), int | float):
                return f"{name} has no value"
    return None


def _short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Experiment and version, with as many parents as it takes to tell all paths apart."""
    for length in range(2, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return ["/".join(path) for path in paths]


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys to values as text; members of a list of classes go by the name of their class."""
    if isinstance(value, dict):
        pairs = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and value and all(isinstance(v, dict) and "class_path" in v for v in value):
        names = [str(inner["class_path"]).rpartition(".")[2] for inner in value]
        counts = [names[:i].count(name) for i, name in enumerate(names)]
        labels = [name + (f" {n + 1}" if n else "") for name, n in zip(names, counts)]
        pairs = [(f"{prefix}[{label}]", inner) for label, inner in zip(labels, value)]
    else:
        return {prefix: value if isinstance(value, str) else json.dumps(value, default=str)}
    flat: dict[str, str] = {}
    for key, inner in pairs:
        flat.update(flatten(inner, key))
    return flat


def differences(contents: Sequence[dict[str, Any] | None]) -> dict[str, list[str | None]]:
    """Keys whose values are not the same in all contents that are there, with each one's value.

    None stands where a content is missing or lacks the key. Where runs lie is no difference.
    """
    flat = [flatten(content) if content is not None else None for content in contents]
    keys = dict.fromkeys(key for one in flat if one is not None for key in one if key not in _PLACES)
    found = {}
    for key in keys:
        values = [one.get(key) if one is not None else None for one in flat]
        if len({value for value, one in zip(values, flat) if one is not None}) > 1:
            found[key] = values
    return found


def best_of(values: Sequence[float | None], better: int) -> set[int]:
    """The places of the best values; none without a direction, or where fewer than two values differ."""
    known = [value for value in values if value is not None and value == value]
    if not better or len(set(known)) < 2:
        return set()
    best = max(value * better for value in known)
    return {i for i, value in enumerate(values) if value is not None and value * better == best}


def data_settings(run: Run) -> tuple[str | None, dict[str, Any]]:
    """The data module's class and settings, as far as config.yaml has them."""
    data = (run.config or {}).get("data")
    if not isinstance(data, dict):
        return None, {}
    given = data.get("init_args")
    return data.get("class_path"), given if isinstance(given, dict) else {}


def same_samples(run: Run) -> str | None:
    """A text that two runs share if their sheets of samples show the same prompts from the same seeds."""
    if run.config is None:
        return None
    callbacks = (run.config.get("trainer") or {}).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, dict) and str(callback.get("class_path", "")).endswith("SampleGrid"):
            settings = callback.get("init_args") or {}
            what = {key: settings.get(key) for key in ("prompts", "num_images", "seed")}
            if what["prompts"] is None:  # the first captions of the evaluation
                what["data"], given = data_settings(run)
                what["captions"] = [given.get(key) for key in ("eval_captions", "eval_column", "eval_set")]
            return json.dumps(what, sort_keys=True, default=str)
    return None
