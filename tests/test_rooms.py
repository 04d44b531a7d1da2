"""Who may import whom, read from the source: arrows run downwards only, and there is no circle."""

from __future__ import annotations

import ast
import functools
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# from the top floor to the ground; a room may import from floors below, and from itself
ROOMS = ("cli", "commands", "callbacks", "reports", "lightning_modules", "datamodules", "common")
FLOOR = {room: number for number, room in enumerate(ROOMS)}
MATHEMATICS = (
    "lightning_modules.diffusion", "lightning_modules.objectives", "lightning_modules.guidance.scales",
)  # fmt: skip
MOST_LINES = 150  # of code in a method's file
SHARED_STEMS = {"__init__", "base"}  # base.py of a room holds what its files have in common


@functools.cache
def sources() -> dict[str, str]:
    """Source of every file of the rooms, by its dotted name; packages by the name of their folder."""
    files = [ROOT / "cli.py", *(f for room in FLOOR if room != "cli" for f in (ROOT / room).rglob("*.py"))]
    return {dotted(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in sorted(files)}


def dotted(path: Path) -> str:
    """Name under which a file is imported."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, source: str) -> Iterator[tuple[str, str]]:
    """What a file imports at any depth, TYPE_CHECKING included: pairs (module, name or "")."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "distributed":
            yield f"{ast.unparse(node.value)}.distributed", ""


def graph(code: Mapping[str, str]) -> dict[str, set[str]]:
    """Which of these files each of them imports."""
    arrows: dict[str, set[str]] = {}
    for module, source in code.items():
        found = {
            f"{base}.{name}" if f"{base}.{name}" in code else base for base, name in imports(module, source)
        }
        arrows[module] = {name for name in found if name in code and name != module}
    return arrows


def upward(code: Mapping[str, str]) -> list[str]:
    """Arrows that do not run down, as "importer -> imported"."""
    room = {module: FLOOR[module.partition(".")[0]] for module in code}
    return [
        f"{module} -> {other}"
        for module, others in graph(code).items()
        for other in sorted(others)
        if room[other] < room[module]
    ]


def circles(arrows: Mapping[str, set[str]]) -> set[str]:
    """Files that import themselves by way of others."""
    left = {module: set(others) for module, others in arrows.items()}
    while leaves := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in leaves}
    return {module for module in left if _reaches(module, module, left)}


def _reaches(start: str, goal: str, arrows: Mapping[str, set[str]]) -> bool:
    seen, ahead = set[str](), [start]
    while ahead:
        for other in arrows.get(ahead.pop(), set()) - seen:
            if other == goal:
                return True
            seen.add(other)
            ahead.append(other)
    return False


def of_mathematics(name: str) -> bool:
    """What the mathematics may import: standard library, torch of one process, common, itself."""
    if within(name, "torch"):
        return not within(name, "torch.distributed")
    own = any(within(name, room) for room in (*MATHEMATICS, "common"))
    return own or name.split(".")[0] in sys.stdlib_module_names


def within(name: str, package: str) -> bool:
    """Whether the dotted ``name`` is ``package`` or lies in it."""
    return name == package or name.startswith(package + ".")


def functions_that_take(source: str, *kinds: str) -> list[str]:
    """Functions outside of classes with a parameter of one of these types."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if argument.annotation is not None
        and set(
            ast.unparse(argument.annotation).replace("[", " ").replace("]", " ").replace("|", " ").split()
        )
        & set(kinds)
    ]


def lines_of_code(source: str) -> int:
    """Lines that are neither empty nor of a comment or docstring alone."""
    tree, lines = ast.parse(source), set[int]()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):  # a docstring, or a string below an attribute
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def test_arrows_run_down() -> None:
    assert upward(sources()) == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circles(graph(sources())) == set()


def test_the_mathematics_imports_torch_and_itself() -> None:
    found = [
        f"{module}: {base}.{name}".rstrip(".")
        for module, source in sources().items()
        if any(within(module, room) for room in MATHEMATICS)
        for base, name in imports(module, source)
        if not of_mathematics(f"{base}.{name}" if name else base)
    ]
    assert found == []


def test_diffusion_stands_below_the_objectives() -> None:
    arrows = {m: others for m, others in graph(sources()).items() if within(m, "lightning_modules.diffusion")}
    found = {other for others in arrows.values() for other in others}
    assert found and all(other in arrows or within(other, "common") for other in found)


@pytest.mark.parametrize(
    ("room", "unknown"),
    [("callbacks.metrics", ("lightning",)), ("reports", ("lightning", "torch"))],
)
def test_what_a_room_does_not_know(room: str, unknown: tuple[str, ...]) -> None:
    found = [
        f"{module}: {base}"
        for module, source in sources().items()
        if within(module, room)
        for base, _ in imports(module, source)
        if base.partition(".")[0] in unknown
    ]
    assert found == []


def test_no_function_takes_the_whole_module_or_a_callback() -> None:
    code = sources()
    kinds = ["LightningModule", "L.LightningModule", "OneStepDistillation"]
    kinds += [
        node.name
        for module, source in code.items()
        if within(module, "callbacks")
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Callback" for base in node.bases)
    ]
    assert len(kinds) > 10
    found = [f"{m}.{name}" for m, source in code.items() for name in functions_that_take(source, *kinds)]
    assert found == []


def test_private_names_stay_in_their_file() -> None:
    code = sources()
    found = [
        f"{module}: {base}.{name}"
        for module, source in code.items()
        for base, name in imports(module, source)
        if name.startswith("_") and base in code
    ]
    assert found == []


def test_one_stem_stands_once() -> None:
    stems = Counter(module.rpartition(".")[2] for module in sources())
    assert [stem for stem, count in stems.items() if count > 1 and stem not in SHARED_STEMS] == []


def test_a_method_is_a_short_file() -> None:
    found = {
        module: lines_of_code(source)
        for module, source in sources().items()
        if within(module, "lightning_modules.objectives")
    }
    assert len(found) > 10 and {name: count for name, count in found.items() if count > MOST_LINES} == {}


def test_lines_of_code_are_counted() -> None:
    """All of a bracket or a string that is used; of strings alone, comments and empty lines none."""
    text = '"""What.\n\nMore.\n"""\n\nA = 1  # why\n"""Of A."""\n\n# a comment\nB = """\n\n# in it"""\n'
    assert lines_of_code(text) == 1 + 3
    function = (
        'def f(\n    a: int,\n) -> int:\n    """It."""\n    # why\n\n    return {\n        1: 2,\n    }\n'
    )
    assert lines_of_code(text + function) == 4 + 3 + 3
    assert (
        lines_of_code("class A:\n    def f(self) -> None: ...\n\n    def g(self) -> None:\n        ...\n")
        == 4
    )


@pytest.mark.parametrize(
    ("lower", "import_line", "arrow"),
    [
        ("common.files", "from commands.fit import TrainerCLI", "common.files -> commands.fit"),
        (
            "lightning_modules.drawing",
            "import callbacks.samples",
            "lightning_modules.drawing -> callbacks.samples",
        ),
        ("reports.html", "from callbacks import samples", "reports.html -> callbacks.samples"),
        ("datamodules.prompts", "def f():\n    import cli", "datamodules.prompts -> cli"),
        (
            "callbacks.samples",
            "if TYPE_CHECKING:\n    from commands import fit",
            "callbacks.samples -> commands.fit",
        ),
    ],
)
def test_an_arrow_that_runs_up_is_seen(lower: str, import_line: str, arrow: str) -> None:
    code = dict.fromkeys(("cli", "commands.fit", "callbacks.samples", lower), "")
    assert upward(code | {lower: import_line}) == [arrow]
    assert upward(code | {"cli": f"import {lower}"}) == []


def test_a_circle_is_seen() -> None:
    code = {
        "common.a": "from common import b",
        "common.b": "import common.c",
        "common.c": "def f():\n  import common.a",
    }
    assert circles(graph(code)) == set(code)
    assert circles(graph(code | {"common.c": ""})) == set()


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
        ("from lightning_modules.guidance import processors", "lightning_modules.guidance.processors"),
    ],
)
def test_the_reader_sees_every_form_of_import(line: str, name: str) -> None:
    found = [f"{b}.{n}" if n else b for b, n in imports("lightning_modules.objectives.example", line)]
    assert name in found
    assert not of_mathematics(name)


@pytest.mark.parametrize(
    "line", ["from .base import Objective", "import math", "from torch.nn import functional"]
)
def test_what_is_allowed_stays_allowed(line: str) -> None:
    found = imports("lightning_modules.objectives.example", line)
    assert all(of_mathematics(f"{base}.{name}" if name else base) for base, name in found)


@pytest.mark.parametrize(
    ("signature", "taken"),
    [
        ("def f(module: OneStepDistillation) -> None: ...", ["f"]),
        ("def f(a: int, *, module: 'int' = 1, b: L.LightningModule | None = None) -> None: ...", ["f"]),
        ("def f(modules: list[OneStepDistillation]) -> None: ...", ["f"]),
        ("class A:\n    def f(self, module: OneStepDistillation) -> None: ...", []),
        ("def f(module: nn.Module) -> None: ...", []),
    ],
)
def test_functions_that_take_a_kind(signature: str, taken: list[str]) -> None:
    assert functions_that_take(signature, "OneStepDistillation", "L.LightningModule") == taken
