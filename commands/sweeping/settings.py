"""What a sweep's YAML says; it names Optuna's classes, which jsonargparse checks and builds."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from commands.config_errors import explain
from commands.config_files import check_size
from common.errors import UserError, first_line
from common.files import asset_path

_OWN = ("experiment", "trainer.default_root_dir", "config")
"""What the sweep itself gives to every trial."""
_OLD = (
    "the search is written with Optuna's classes, such as {class_path: FloatDistribution, init_args: "
    "{low: 1.0e-5, high: 1.0e-3, log: true}}; `range`, `choices`, `grid`, `pruning` and `seed` are from "
    "before (docs/sweeps.md says what stands for each)"
)

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass
class SweepSettings:
    """A sweep.

    Attributes:
        base: configurations of `fit`, merged in this order.
        space: config key to the values that are searched.
        metric: column of metrics.csv; a trial's value is the last one of its run.
        direction: "minimize" or "maximize".
        trials: how many points are tried.
        overrides: options every trial gets, by dotted key.
        sampler: how points are chosen; None: by TPE with seed 0.
        pruner: which trials are stopped early; None: none.
        name: of the sweep and of its folder; None: the stem of the YAML.
        root: the sweep's folder is ``<root>/<name>``.
        storage: a file (Optuna's journal) or a database address; None: ``<root>/<name>/study.journal``.
        launcher: words before the command of every trial, such as ``[srun]``.
        path: the YAML this was read from.
    """

    base: str | list[str]
    space: dict[str, BaseDistribution]
    metric: str
    direction: Literal["minimize", "maximize"]
    trials: PositiveInt
    overrides: dict[str, Any] = field(default_factory=dict)
    sampler: BaseSampler | None = None
    pruner: BasePruner | None = None
    name: str | None = None
    root: str = "runs"
    storage: str | None = None
    launcher: list[str] = field(default_factory=list)
    path: Path = Path()

    def __post_init__(self) -> None:
        """Fill in what has no fixed default."""
        given = [self.base] if isinstance(self.base, str) else self.base
        self.base = [str(asset_path(name)) for name in given]
        self.sampler = self.sampler or optuna.samplers.TPESampler(seed=0, constant_liar=True)
        self.pruner = self.pruner or optuna.pruners.NopPruner()

    @property
    def folder(self) -> Path:
        """Where the results and the runs of the trials lie."""
        return Path(self.root) / str(self.name)

    def options(self, point: dict[str, Any]) -> list[str]:
        """What a trial's command line says after `fit`."""
        files = [part for path in self.base for part in ("--config", path)]
        return [*files, *(option(key, value) for key, value in {**self.overrides, **point}.items())]

    def identity(self) -> dict[str, Any]:
        """What all trials of one study have in common; trials of another identity can't be compared."""
        return {
            "base": {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.base},
            "overrides": self.overrides, "space": self.space_as_data(), "metric": self.metric,
            "direction": self.direction,
        }  # fmt: skip

    def space_as_data(self) -> dict[str, Any]:
        """Key to what its distribution says, as JSON has it."""
        return {key: json.loads(distribution_to_json(one)) for key, one in self.space.items()}

    def size(self) -> float:
        """The number of different points; infinite with a continuous range."""
        return math.prod(_count(one) for one in self.space.values())


def _count(one: Any) -> float:
    if isinstance(one, CategoricalDistribution):
        return len(one.choices)
    if one.single():
        return 1
    return math.inf if one.step is None else round((one.high - one.low) / one.step) + 1


def option(key: str, value: Any) -> str:
    """``--key=value`` as `fit` reads it: numbers in full precision, the rest as JSON, text as it is."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def read_settings(path: Path, storage: str | None = None) -> SweepSettings:
    """Read and check a sweep's YAML.

    Args:
        path: of the YAML.
        storage: takes the place of the file's.

    Raises:
        UserError: the file or a base config is missing, a key is unknown or missing, a value out of range.
    """
    path = asset_path(path)
    given = _mapping(path)
    space = given.get("space")
    if isinstance(space, dict) and (
        given.keys() & {"pruning", "seed"}
        or any(not isinstance(entry, str | dict) or "class_path" not in entry for entry in space.values())
    ):
        raise UserError(f"{path}: {_OLD}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SweepSettings, None, skip={"path", "overrides"})
    overrides = given.pop("overrides", None) or {}  # as they are: the parser would build classes named there
    if not isinstance(overrides, dict):
        raise UserError(f"{path}: overrides maps config keys to values, not {overrides!r}")
    try:
        read = parser.instantiate(parser.parse_object(given))
        settings = SweepSettings(**vars(read), overrides=overrides, path=path)
    except (ArgumentError, ImportError, ValueError, TypeError) as error:
        what = explain(error, parser, []) if isinstance(error, ArgumentError) else first_line(error)
        raise UserError(f"{path}: {what}") from error
    settings.name, settings.storage = settings.name or path.stem, storage or settings.storage
    _check(settings)
    return settings


def _mapping(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the sweep {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"the sweep {path} is no YAML: {' '.join(str(error).split())}") from error
    check_size(given, path)
    if not isinstance(given, dict):
        raise UserError(f"{path} is no sweep: it must map base, space, metric, direction and trials")
    return given


def _check(settings: SweepSettings) -> None:
    path = settings.path
    for file in settings.base:
        if not Path(file).is_file():
            raise UserError(f"{path}: the base config {file} does not exist (seen from {Path.cwd()})")
    if not settings.space or not settings.base:
        raise UserError(f"{path}: base and space must not be empty")
    if twice := sorted(settings.space.keys() & settings.overrides.keys()):
        raise UserError(f"{path}: {twice[0]} is both searched and overridden; keep one of them")
    for key in _OWN:
        if key in settings.space or key in settings.overrides:
            raise UserError(
                f"{path}: {key} is given to each trial by the sweep; leave it out, see base, root and name"
            )
    for key, one in settings.space.items():  # Optuna can't tell 1 from 1.0 and true either
        if isinstance(one, CategoricalDistribution) and len(set(one.choices)) < len(one.choices):
            raise UserError(f"{path}: space: {key} holds the same value twice: {list(one.choices)}")
    if settings.trials > (size := settings.size()):
        raise UserError(
            f"{path}: trials is {settings.trials}, but the space has only {int(size)} different points; "
            f"write trials: {int(size)} or widen the space"
        )
