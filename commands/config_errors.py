"""Turns the parser's errors into one line that names the mistake and the nearest right name."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path

import jsonargparse
import yaml

_NOT_ACCEPTED = re.compile(
    r"(?:does not accept option|Option|Key) '([^']+)'(?: is not (?:accepted|expected))?"
)
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (--[\w.+-]+)")
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_MISSING = re.compile(r"No module named '(\w+)'.*class_path='([^']+)'", re.DOTALL)
_EXTRAS = {"bitsandbytes": "8bit", "torchao": "8bit"}


def explain(error: Exception, parser: jsonargparse.ArgumentParser, args: list[str]) -> str:
    """Return one message for an error of the parser: what is wrong, where, and what to write instead.

    Args:
        error: What jsonargparse raised.
        parser: The main parser; its sub-parser for the command knows the names of the options.
        args: The command line, first word the command.
    """
    text = str(error)
    if (missing := _MISSING.search(text)) and missing[1] in _EXTRAS:
        extra = f'pip install -e ".[{_EXTRAS[missing[1]]}]"'
        return f"{missing[2]} needs the package {missing[1]}, which is not installed: {extra}"
    match = _UNRECOGNIZED.search(text) or _NOT_ACCEPTED.search(text)
    if match is None:
        return _unreadable_config(text, args) or _first_cause(text)
    name = match.group(1)
    owner = _CLASS.findall(text)
    if owner and not name.startswith("--"):
        known = _class_options(owner[-1])
        return f"the configuration has an unknown option {name!r} for {owner[-1]}{_nearest(name, known)}"
    known = _command_options(parser, args)
    plain = name.lstrip("-")
    where = "on the command line" if name.startswith("--") else "in the configuration"
    return f"unknown option {plain!r} {where}{_nearest(plain, known)}"


def _unreadable_config(text: str, args: list[str]) -> str | None:
    """Return a message for a configuration file that is missing or no YAML, or None for other errors."""
    if missing := re.search(r'Parser key "config": File does not exist: (\S+)', text):
        return f"configuration file not found: {missing[1]}"
    if "parsing config" not in text:
        return None
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("-c", "--config", action="append", default=[])
    for path in options.parse_known_args(args)[0].config:
        try:
            yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            return f"configuration file {path} cannot be read: {' '.join(str(error).split())}"
    return None


def _nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean ...?", comparing the last part first, as keys share long prefixes."""
    prefix, _, leaf = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == prefix}
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {siblings[close[0]]!r}?"
    if close := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; known options: {', '.join(sorted(siblings) or sorted(known)[:20])}"


def _command_options(parser: jsonargparse.ArgumentParser, args: list[str]) -> list[str]:
    command = args[0] if args else ""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and command in action.choices:
            parser = action.choices[command]
    return [
        option.removeprefix("--")
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    ]


def _class_options(class_path: str) -> list[str]:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    module, _, name = class_path.rpartition(".")
    component = getattr(__import__(module, fromlist=[name]), name)
    parser.add_class_arguments(component, fail_untyped=False)
    return [action.dest for action in parser._actions if action.dest != "help"]


def _first_cause(text: str) -> str:
    """Return the innermost cause of a nested error on one line."""
    where = re.search(r'Parser key "([^"]+)"', text)
    lines = [line.strip(" -\n") for line in text.splitlines()]
    noise = (
        "Parser key",
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value",
        "Expected a <class 'NoneType'>",
        "Expected a path but",
        "Problem with given class_path",
        "Not a valid subclass",
    )
    causes = [line for line in lines if line and not line.startswith(noise)]
    message = causes[0] if causes else " ".join(line for line in lines if line)
    given = re.findall(r"Given value: (.*)", text)
    is_short = bool(given) and len(given[-1]) < 60 and given[-1] not in message
    suffix = f" (given: {given[-1]})" if is_short else ""
    place = f"{where.group(1)}: " if where and where.group(1) not in message else ""
    return f"the configuration is not valid: {place}{message}{suffix}"
