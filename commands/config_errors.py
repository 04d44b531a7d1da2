"""Turns the parser's errors into one line: the innermost cause, and the nearest right name."""

from __future__ import annotations

import argparse
import difflib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import jsonargparse

_UNKNOWN = re.compile(r"unrecognized arguments: (--[\w.+-]+)|(?:does not accept option|Option|Key) '([^']+)'")
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_PACKAGE = re.compile(r"No module named '(bitsandbytes|torchao)'.*class_path='([^']+)'", re.DOTALL)
# lines that frame the innermost cause
_FRAMES = ("Parser key", "Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class",
           "Expected a path but", "Problem with given class_path", "Not a valid subclass")  # fmt: skip


def explain(error: Exception, parser: jsonargparse.ArgumentParser, args: list[str]) -> str:
    """Return one message for an error of the parser: what is wrong, where, and what to write instead.

    ``args`` is the command line: of its first word, the command, the sub-parser knows the options' names.
    """
    text = str(error)
    if missing := _PACKAGE.search(text):
        return f'{missing[2]} needs the package {missing[1]}, which is missing: pip install -e ".[8bit]"'
    if unknown := _UNKNOWN.search(text):
        name = unknown[1] or unknown[2]
        owner = None if name.startswith("--") else (_CLASS.findall(text) or [None])[-1]
        known = _options(parser, args) if owner is None else _class_options(owner)
        name = name.removeprefix("--")
        elsewhere = [*_options(parser, args), *_configured_options(args)]
        return f"unknown option {name!r}{f' of {owner}' if owner else ''}{_nearest(name, known, elsewhere)}"
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    cause = next((line for line in lines if not line.startswith(_FRAMES)), " ".join(lines))
    key = re.search(r'Parser key "([^"]+)"', text)
    given = re.findall(r"Given value: (.{1,60})$", text, flags=re.MULTILINE)
    place = f"{key[1]}: " if key and key[1] not in cause else ""
    value = f" (given: {given[-1]})" if given and given[-1] not in cause else ""
    return f"the configuration is not valid: {place}{cause}{value}"


def _nearest(name: str, known: list[str], elsewhere: list[str]) -> str:
    """Return "; did you mean ...?", comparing the last part first, as keys share long prefixes.

    Args:
        known: options where the name stands. ``elsewhere``: all others, looked up by their last part.
    """
    prefix, _, leaf = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == prefix}
    close = [key for key in elsewhere if key.rpartition(".")[2] == leaf][:3]
    close = close or [siblings[key] for key in difflib.get_close_matches(leaf, siblings, n=1)]
    if close := close or difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; known options: {', '.join(sorted(siblings) or sorted(known)[:20])}"


def _configured_options(args: list[str]) -> list[str]:
    """Options of the classes that the configuration files of a command line name, by their whole keys."""
    from commands.config_files import contents  # it imports torch, which --help need not

    keys = {}
    for place, class_path in (pair for content in contents(args) for pair in _classes(content)):
        try:
            keys[place] = _class_options(class_path)
        except (ImportError, AttributeError, ValueError):  # a short name, or one that is wrong
            continue
    return [f"{place}.{option}" for place, options in keys.items() for option in options]


def _classes(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Places and class paths in a configuration; those in a list go by the name of their class."""
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield place, value["class_path"]
        for key, inner in value.items():
            yield from _classes(inner, place if key == "init_args" else f"{place}.{key}".lstrip("."))
    for one in value if isinstance(value, list) else ():
        name = str(one.get("class_path")).rpartition(".")[2] if isinstance(one, dict) else ""
        yield from _classes(one, f"{place}.{name}")


def _options(parser: argparse.ArgumentParser, args: list[str]) -> list[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and args and args[0] in action.choices:
            parser = action.choices[args[0]]
    return [name.removeprefix("--") for action in parser._actions for name in action.option_strings
            if name.startswith("--")]  # fmt: skip


def _class_options(class_path: str) -> list[str]:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(pkgutil.resolve_name(class_path), fail_untyped=False)
    return [action.dest for action in parser._actions if action.dest != "help"]
