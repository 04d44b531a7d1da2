"""What a sweep's YAML says."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from commands.sweeping.space import Point, Space, option, read_dimension
from common.errors import UserError

_DIRECTIONS = ("minimize", "maximize")
_SAMPLERS = ("tpe", "random")
_OWN = ("experiment", "trainer.default_root_dir", "config")
"""What the sweep itself gives to every trial."""


@dataclass(frozen=True)
class Pruning:
    """When a trial is stopped early: its metric is worse than the median of earlier ones at the same step.

    Attributes:
        warmup_steps: no trial is stopped before this student update.
        finished_trials: no trial is stopped before so many have run to their end.
    """

    warmup_steps: int = 0
    finished_trials: int = 4


@dataclass(frozen=True)
class SweepSettings:
    """A sweep.

    Attributes:
        path: the YAML this was read from.
        name: of the sweep and of its folder.
        base: configurations of `fit`, merged in this order.
        space: what is searched.
        metric: column of metrics.csv; a trial's value is the last one of its run.
        direction: "minimize" or "maximize".
        trials: how many points are tried.
        overrides: options every trial gets, by dotted key.
        sampler: "tpe" or "random".
        seed: of the search.
        pruning: None: every trial runs to its end.
        root: the sweep's folder is ``<root>/<name>``.
        storage: a file (Optuna's journal) or a database address; None: ``<root>/<name>/study.journal``.
        launcher: words before the command of every trial, such as ``[srun]``.
    """

    path: Path
    name: str
    base: tuple[Path, ...]
    space: Space
    metric: str
    direction: str
    trials: int
    overrides: dict[str, Any]
    sampler: str = "tpe"
    seed: int = 0
    pruning: Pruning | None = None
    root: Path = Path("runs")
    storage: str | None = None
    launcher: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the results and the runs of the trials lie."""
        return self.root / self.name

    @property
    def minimize(self) -> bool:
        """Whether lower values are better."""
        return self.direction == "minimize"

    def options(self, point: Point) -> list[str]:
        """What a trial's command line says after `fit`."""
        files = [part for path in self.base for part in ("--config", str(path))]
        values = {**self.overrides, **point}
        return [*files, *(option(key, value) for key, value in values.items())]

    def identity(self) -> dict[str, Any]:
        """What all trials of one study have in common; trials of another identity can't be compared."""
        bases = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in self.base}
        space = {d.key: {d.kind: list(d.values), "step": d.step} for d in self.space.dimensions}
        return {
            "base": bases, "overrides": self.overrides, "space": space, "metric": self.metric,
            "direction": self.direction,
        }  # fmt: skip


def read_settings(path: Path) -> SweepSettings:
    """Read and check a sweep's YAML.

    Raises:
        UserError: the file or a base config is missing, a key is unknown or missing, a value out of range.
    """
    given = _mapping(path)
    known = [field.name for field in fields(SweepSettings) if field.name != "path"]
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
            raise UserError(f"{path}: unknown key {key!r}; {hint}")
    if missing := [key for key in ("base", "space", "metric", "direction", "trials") if key not in given]:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    space, overrides = given["space"], given.get("overrides") or {}
    if not isinstance(space, dict) or not space or not isinstance(overrides, dict):
        raise UserError(f"{path}: space and overrides are mappings from config keys; space is not empty")
    if twice := sorted(space.keys() & overrides.keys()):
        raise UserError(f"{path}: {twice[0]} is both searched and overridden; keep one of them")
    for key in _OWN:
        if key in space or key in overrides:
            raise UserError(
                f"{path}: {key} is given to each trial by the sweep; leave it out, see base, root and name"
            )
    launcher = given.get("launcher") or []
    settings = SweepSettings(
        path=path,
        name=str(given.get("name") or path.stem),
        base=_base_files(given["base"], path),
        space=Space(tuple(read_dimension(str(key), value, str(path)) for key, value in space.items())),
        metric=str(given["metric"]),
        direction=_one_of(given["direction"], _DIRECTIONS, "direction", path),
        trials=_whole(given["trials"], 1, "trials", path),
        overrides={str(key): value for key, value in overrides.items()},
        sampler=_one_of(given.get("sampler", "tpe"), _SAMPLERS, "sampler", path),
        seed=_whole(given.get("seed", 0), 0, "seed", path),
        pruning=_pruning(given.get("pruning"), path),
        root=Path(given.get("root") or "runs"),
        storage=given.get("storage"),
        launcher=tuple(map(str, launcher if isinstance(launcher, list) else str(launcher).split())),
    )
    size = settings.space.size()
    if settings.trials > size:
        raise UserError(
            f"{path}: trials is {settings.trials}, but the space has only {int(size)} different points; "
            f"write trials: {int(size)} or widen the space"
        )
    return settings


def _mapping(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the sweep {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the sweep {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise UserError(f"{path} is no sweep: it must map base, space, metric, direction and trials")
    return given


def _base_files(given: Any, path: Path) -> tuple[Path, ...]:
    files = tuple(Path(str(name)) for name in (given if isinstance(given, list) else [given]))
    for file in files:
        if not file.is_file():
            raise UserError(f"{path}: the base config {file} does not exist (seen from {Path.cwd()})")
    if not files:
        raise UserError(f"{path}: base is empty; name a configuration of fit")
    return files


def _one_of(value: Any, allowed: tuple[str, ...], key: str, path: Path) -> str:
    if value not in allowed:
        raise UserError(f"{path}: {key} is {value!r}; it must be {' or '.join(allowed)}")
    return str(value)


def _whole(value: Any, least: int, key: str, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{path}: {key} is {value!r}; it must be a whole number of at least {least}")
    return value


def _pruning(given: Any, path: Path) -> Pruning | None:
    if given is None or given is False:
        return None
    if given is True:
        return Pruning()
    known = [field.name for field in fields(Pruning)]
    if not isinstance(given, dict) or not given.keys() <= set(known):
        raise UserError(
            f"{path}: pruning is {given!r}; write true, false, or a mapping of {' and '.join(known)}"
        )
    return Pruning(
        _whole(given.get("warmup_steps", 0), 0, "pruning.warmup_steps", path),
        _whole(given.get("finished_trials", 4), 1, "pruning.finished_trials", path),
    )
