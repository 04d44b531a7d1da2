"""The options of a command: a dataclass with typed fields, which jsonargparse reads from the command line.

A field `num_images` is written `--num-images` (underscores do, too); its help is its line in the docstring.
A module with options does without `from __future__ import annotations`: jsonargparse would then import what
stands under TYPE_CHECKING, and `--help` would take the seconds that torch needs.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, get_type_hints

import jsonargparse
from jsonargparse.typing import restricted_number_type

from commands.config_errors import explain
from common.errors import UserError

if TYPE_CHECKING:
    Scale: TypeAlias = float
    Guidance: TypeAlias = float
    Port: TypeAlias = int
    Seed: TypeAlias = int
    Count: TypeAlias = int
else:
    Scale = restricted_number_type("Scale", float, [(">=", 0), ("<", math.inf)])
    Guidance = restricted_number_type("Guidance", float, [(">", -math.inf), ("<", math.inf)])
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
    Count = restricted_number_type("Count", int, [(">=", 1), ("<=", 10**6)])
    Port = restricted_number_type("Port", int, [(">=", 1), ("<=", 65535)])

Options = TypeVar("Options")
_RANGE = re.compile(r"Not of type \w+: (?:(?P<given>\S+) )?does not conform to restriction (?P<range>.+)")
_CHOICES = re.compile(r"Expected a typing\.Literal\[(.+?)\]")


class CommandParser(jsonargparse.ArgumentParser):
    """Writes options with hyphens; a list of texts takes one or several, and may be given several times.

    Attributes:
        lists: names of the options that are such lists.
    """

    lists: Collection[str] = ()

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """See argparse."""
        if names[0].lstrip("-") in getattr(self, "lists", ()):  # a nested class's group has none
            action = {"action": "extend"} if names[0].startswith("-") else {}
            del settings["action"]  # jsonargparse's: YAML in one word
            names, settings = names[:1], settings | {"type": str, "nargs": "+"} | action
        return super().add_argument(*(_hyphens(name) for name in names), **settings)


def parse(kind: type[Options], args: Sequence[str], **description: Any) -> Options:
    """Read a command line.

    Args:
        kind: a dataclass. Fields without a default are required; those that are not keyword-only are the
            command's positional arguments. If it has a ``default_config`` (a YAML file), every option may
            also stand in such files, named by ``--config``; the attribute ``resolved`` is set to the file
            that repeats the whole.
        args: the words behind the command.
        description: `prog`, `description` and `epilog` of the parser.

    Raises:
        UserError: an option is unknown, missing, out of range or of another type.
        SystemExit: after `--help`.
    """
    config = getattr(kind, "default_config", None)
    if config is not None:  # this mode resolves ${...} after the command line has been read
        description |= {"parser_mode": "omegaconf+"}
    parser = CommandParser(exit_on_error=False, allow_abbrev=False, **description)
    parser.lists = {name for name, type_ in get_type_hints(kind).items() if type_ == list[str]}
    given = [_hyphens(word) for word in args]
    if config is not None:
        from commands.config_files import expand, given_configs  # torch comes with it

        parser.add_argument("--config", action="config", help=f"YAML files; merged (default: {config.name})")
        given = expand(given if given_configs(given) else ["--config", str(config), *given])
    parser.add_class_arguments(kind, as_group=False, as_positional=True)
    try:
        found = parser.parse_args(given)
    except argparse.ArgumentError as error:
        raise UserError(_message(error, parser, given)) from error
    except ValueError as error:
        if type(error).__module__.startswith("omegaconf"):  # not imported where there are no such files
            raise UserError(explain(error, parser, given)) from error
        raise
    values = parser.instantiate(found).as_dict()
    if config is not None:
        values.pop("config", None)
    options = kind(**values)
    if config is not None:
        options.resolved = parser.dump(found)  # type: ignore[attr-defined]
    return options


def _hyphens(word: str) -> str:
    """An option as it is written in help, nested keys (`--data.file_names`) with underscores; values stay."""
    name, nested, rest = re.match(r"([^.=]*)([^=]*)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    return name.replace("_", "-") + nested.replace("-", "_") + rest if name.startswith("--") else word


def _message(error: argparse.ArgumentError, parser: jsonargparse.ArgumentParser, args: list[str]) -> str:
    """What is wrong with an option, on one line."""
    text = str(error)
    if missing := re.search(r"arguments are required: (.+)", text):
        named = {action.dest: action.option_strings for action in parser._actions}
        names = [(named.get(name) or [name.upper()])[-1] for name in missing[1].split(", ")]
        return f"{' and '.join(names)} must be given; see --help"
    key = re.search(r'Parser key "(\w+)"', text)
    if any(word in text for word in ("unrecognized", "not accepted", "class_path")):
        return explain(error, parser, args)
    if key is None:
        return f"{text}; see --help"
    option = f"--{key[1].replace('_', '-')}"
    given = re.search(r"(?:Given|Got) value: (.*)", text)
    if limits := _RANGE.search(text):
        return f"{option} {limits['given'] or (given or '')[1]}: must be {limits['range'].replace('v', '')}"
    if choices := _CHOICES.search(text):
        return f"{option} {given[1] if given else ''}: must be one of {choices[1]}"
    of_several = re.search(r"Errors:\n\s+- (.+)", text)  # types: the first one's, not "none of the types"
    return f"{option}: {of_several[1] if of_several else ' '.join(text.splitlines()[1].split())}"
