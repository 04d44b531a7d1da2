"""Who may import whom, read from the source: the mathematics knows torch only, nothing knows the shell."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lightning_modules", "datamodules", "callbacks", "scripts", "benchmarks")
MATHEMATICS = (
    "lightning_modules.diffusion",
    "lightning_modules.objectives",
    "lightning_modules.guidance.scales",
)


def sources(*folders: str) -> list[Path]:
    """Python files under these folders, relative to the root."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path, source: str) -> Iterator[str]:
    """Absolute dotted names that the file imports at any depth, and uses of ``torch.distributed``."""
    package = list(path.parent.parts)
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "distributed":
            yield f"{ast.unparse(node.value)}.distributed"


def within(name: str, package: str) -> bool:
    """Whether the dotted ``name`` is ``package`` or lies in it."""
    return name == package or name.startswith(package + ".")


def of_mathematics(name: str) -> bool:
    """What objectives/ and diffusion/ may import: the standard library, single-process torch, each other."""
    if within(name, "torch"):
        return not within(name, "torch.distributed")
    return name.split(".")[0] in sys.stdlib_module_names or any(within(name, room) for room in MATHEMATICS)


def offenders(paths: list[Path], allowed: Callable[[str], bool]) -> list[str]:
    """Imports of these files that ``allowed`` refuses, as "file: name"."""
    assert paths
    return [
        f"{path}: {name}"
        for path in paths
        for name in imports(path, (ROOT / path).read_text(encoding="utf-8"))
        if not allowed(name)
    ]


def test_the_mathematics_imports_torch_and_itself() -> None:
    paths = sources("lightning_modules/diffusion", "lightning_modules/objectives")
    paths.append(Path("lightning_modules/guidance/scales.py"))
    assert offenders(paths, of_mathematics) == []


def test_diffusion_stands_below_objectives_and_guidance() -> None:
    above = ("lightning_modules.objectives", "lightning_modules.guidance")
    paths = sources("lightning_modules/diffusion")
    assert offenders(paths, lambda name: not any(within(name, room) for room in above)) == []


def test_callbacks_import_modules_and_never_the_reverse() -> None:
    paths = sources("lightning_modules", "datamodules")
    assert offenders(paths, lambda name: not within(name, "callbacks")) == []


def test_nothing_imports_the_command_line() -> None:
    assert offenders(sources(*PACKAGES), lambda name: not within(name, "cli")) == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import lightning", "lightning"),
        ("from diffusers import DDIMScheduler", "diffusers.DDIMScheduler"),
        ("def f():\n    import transformers", "transformers"),
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("import torch\ntorch.distributed.get_rank()", "torch.distributed"),
        ("from ..networks import roles", "lightning_modules.networks.roles"),
        ("from lightning_modules.guidance import attention", "lightning_modules.guidance.attention"),
    ],
)
def test_the_reader_sees_every_form_of_import(line: str, name: str) -> None:
    found = list(imports(Path("lightning_modules/objectives/example.py"), line))
    assert name in found
    assert not of_mathematics(name)


@pytest.mark.parametrize(
    "line", ["from .base import Objective", "import math", "from torch.nn import functional"]
)
def test_what_is_allowed_stays_allowed(line: str) -> None:
    assert all(map(of_mathematics, imports(Path("lightning_modules/objectives/example.py"), line)))
