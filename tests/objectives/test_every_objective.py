"""Every file in objectives/ defines a documented Objective; found by glob."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import lightning_modules.objectives
from lightning_modules.objectives.base import Objective

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
