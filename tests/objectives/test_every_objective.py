"""Every file in objectives/ defines a documented Objective; found by glob."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import lightning_modules.objectives
from lightning_modules.objectives.base import Objective
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.f_distill import FDistill
from lightning_modules.objectives.sim import SIM
from lightning_modules.objectives.uni_instruct import UniInstruct

FOLDER = Path(next(iter(lightning_modules.objectives.__path__)))
PARTS = {"__init__", "base", "pair_regression", "pieces", "discriminator", "divergences"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in PARTS)


def test_objectives_are_found() -> None:
    assert "swiftbrush" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_file_holds_a_documented_objective(name: str) -> None:
    module = importlib.import_module(f"lightning_modules.objectives.{name}")
    found = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Objective) and cls.__module__ == module.__name__ and not inspect.isabstract(cls)
    ]
    assert found, f"{name}.py defines no concrete Objective"
    for cls in found:
        assert "arxiv" in (cls.__dict__.get("__doc__") or "").lower(), f"{cls.__name__} cites no paper"
        for role in cls.roles:
            assert getattr(cls, f"{role}_loss").__doc__, f"{cls.__name__}.{role}_loss has no docstring"


@pytest.mark.parametrize("method", [FDistill, UniInstruct])
def test_a_hinge_loss_has_no_density_ratio(method: type[FDistill] | type[UniInstruct]) -> None:
    with pytest.raises(ValueError, match="set the discriminator's loss to softplus"):
        method(Discriminator(["x"], loss="hinge"))


def test_sids_weight_is_refused_where_there_is_none() -> None:
    for build in (lambda: SIM(a=1.2), lambda: UniInstruct(Discriminator(["x"]), a=1.2)):
        with pytest.raises(ValueError, match=r"a is 1.2, which (SIM|UniInstruct) has not: leave it out"):
            build()
