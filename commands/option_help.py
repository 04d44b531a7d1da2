"""The help of commands whose modules import torch: read from their source, so that it comes at once.

Options and their defaults are the fields of the dataclass `Options`, their help its docstring.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from textwrap import wrap

from common.files import ROOT

_WIDTH, _NAMES = 110, 31
_MORE = {
    "evaluate": [
        "Give either --model, or --images with --captions.",
        "--config FILE says what is measured on what (several merge; else emoji). In configs/eval/:",
        *wrap(" ".join(sorted(file.stem for file in (ROOT / "configs" / "eval").glob("*.yaml"))), 106,
              initial_indent="  ", subsequent_indent="  "),
        "Every option may stand in such a file. --data.KEY VALUE is an option of the set; --data.help CLASS",
        "and --metrics.help CLASS list those of a class. docs/evaluation.md tells what each of them needs.",
    ],
}  # fmt: skip


def text(command: str, module: str, description: str) -> str:
    """The help of a command, by the dotted name of its module."""
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    options = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Options"
    )
    told = dict(_told(ast.get_docstring(options) or ""))
    lines, required = [], []
    for field in options.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if (name := field.target.id) not in told:
            continue  # a constant of the class
        option = f"--{name.replace('_', '-')}"
        required += [f"{option} {name.upper()}"] if field.value is None else []
        default = _default(field.value)
        words = " ".join([told[name], *([f"({default})"] if default else [])])
        head = f"  {option} {_choices(ast.unparse(field.annotation))}".rstrip()
        first, *rest = wrap(words, _WIDTH - _NAMES - 2, break_on_hyphens=False)
        lines += [f"{head:<{_NAMES}}  {first}"] if len(head) <= _NAMES else [head, f"{'':<{_NAMES}}  {first}"]
        lines += [f"{'':<{_NAMES}}  {line}" for line in rest]
    more = _MORE.get(command, [])
    return "\n".join([
        f"usage: python cli.py {command} {' '.join(required)} [--KEY VALUE …]", "", f"{description}.", "",
        *more, *([""] if more else []), "Options; what holds otherwise stands in brackets:", *lines,
    ])  # fmt: skip


def _told(docstring: str) -> Iterator[tuple[str, str]]:
    """Name and help of each option in the part "Args:" of a docstring."""
    part = inspect.cleandoc(docstring).partition("Args:\n")[2]
    for found in re.finditer(r"^    (\w+): (.*(?:\n {6,}.*)*)", part, re.MULTILINE):
        yield found[1], " ".join(found[2].split())


def _default(value: ast.expr | None) -> str:
    """A default that says something; an option that is off by itself has none."""
    if not isinstance(value, ast.Constant) or str(value.value) in ("None", "False", ""):
        return ""
    return str(value.value)


def _choices(annotation: str) -> str:
    """What may be given, where that is one of a few words."""
    if found := re.search(r"Literal\[(.+?)\]", annotation):
        return "|".join(re.findall(r"'([^']+)'", found[1]))
    return "true|false" if annotation == "bool" else ""
