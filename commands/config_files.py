"""The configuration files of a command line: what they build on, and names that have moved since."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from common.errors import UserError
from common.files import ROOT, asset_path, at_home
from common.processes import say

PARTS = ("trainer", "data")
MOST_ENTRIES, DEEPEST = 100_000, 64
_VARIABLE = re.compile(r"\$\{oc\.env:(\w+)")
MOVED = {
    "lightning_modules.pretraining_pixart.PixArtPretraining":
        "lightning_modules.pretraining.transformer.PixArtPretraining",
}  # fmt: skip
"""Class paths of earlier versions, as they stand in saved configurations, and what they are now."""


def given_configs(args: list[str]) -> list[str]:
    """The values of `--config` on a command line, in their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    given: list[str] = parser.parse_known_args(args)[0].config
    return given


def experiment_name(args: list[str]) -> str:
    """Return the stem of the last `--config` file of a command line, or "experiment" if there is none.

    Files in folders called trainer or data are parts that go with any experiment: they name it only
    where there is no other.
    """
    configs = given_configs(args)
    whole = [name for name in configs if Path(name).parent.name not in PARTS]
    return Path([*configs, *whole][-1]).stem if configs else "experiment"


def expand(args: list[str]) -> list[str]:
    """Put the bases of each configuration file before it, and present names in place of moved ones.

    A file's top-level key `base` names one or more files, relative to it or to the repository, whose settings
    hold unless it says otherwise. What has to be changed is handed on as text in place of the file's name.

    Raises:
        UserError: a file is missing, is no YAML with keys, or is its own base.
    """
    expanded: list[str] = []
    rest = iter(args)
    for arg in rest:
        option, joined, value = arg.partition("=")
        if option in ("--config", "-c") and (name := value if joined else next(rest, "")):
            for config in _with_bases(asset_path(name)):
                expanded += ["--config", config]
        else:
            expanded.append(_renamed(arg, "the command line"))
    return expanded


def content_of(path: str | Path) -> dict[str, Any]:
    """What a configuration file says together with its bases; no defaults of classes are filled in.

    Raises:
        UserError: as `expand`.
    """
    parts = expand(["--config", str(path)])[1::2]
    texts = (part if "\n" in part else Path(part).read_text(encoding="utf-8") for part in parts)
    merged = OmegaConf.merge(*map(OmegaConf.create, texts))
    return OmegaConf.to_container(merged)


def keep_references(config: str, args: list[str]) -> str:
    """The YAML of a configuration with values of environment variables as references, as they may be secret.

    Args:
        config: as it was resolved.
        args: the command line from `expand`, which holds or names what was given.
    """
    given = " ".join(Path(arg).read_text(encoding="utf-8") if is_yaml_file(arg) else arg for arg in args)
    values = {os.environ.get(name): f"${{oc.env:{name}}}" for name in _VARIABLE.findall(given)}

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(item) for name, item in value.items()}
        if isinstance(value, list):
            return [kept(item) for item in value]
        for secret, reference in values.items() if isinstance(value, str) else ():
            if secret and (value == secret or len(secret) > 3):
                value = value.replace(secret, reference)
        return value

    return yaml.safe_dump(kept(yaml.safe_load(config)), sort_keys=False) if values else config


def is_yaml_file(arg: str) -> bool:
    """Whether a word of a command line names a file of settings."""
    return arg.endswith((".yaml", ".yml")) and "\n" not in arg and Path(arg).is_file()


def check_size(content: Any, path: Path) -> None:
    """Refuse what is nested without end, or grows without end when its references are followed."""
    count, ahead = 0, [(content, 0)]
    while ahead:
        value, depth = ahead.pop()
        count += 1
        if count > MOST_ENTRIES or depth > DEEPEST:
            raise UserError(
                f"configuration file {path} holds more than {MOST_ENTRIES:,} entries or {DEEPEST} levels: "
                "that is no configuration; prompts belong in a file of their own"
            )
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        ahead += [(item, depth + 1) for item in items]


def _with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[str]:
    """A file's bases, then itself: its name, or its text where that differs from the file's."""
    if path.resolve() in above:
        circle = " -> ".join(str(file) for file in (*above[above.index(path.resolve()) :], path))
        raise UserError(f"the configuration {path} is its own base: {circle}; remove one `base`")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"configuration file {path} cannot be read: {reason}") from error
    check_size(content, path)
    if not isinstance(content, dict):
        raise UserError(f"configuration file {path} holds no keys such as `model:` and `trainer:`")
    if "base" not in content and at_home(content) == content:
        renamed = _renamed(text, str(path))
        return [str(path) if renamed == text else renamed]
    bases, content = content.pop("base", []), at_home(content)
    configs: list[str] = []
    for base in bases if isinstance(bases, list) else [bases]:
        places = (path.parent / str(base), ROOT / str(base))
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(f"{path} has the base {base}, which is neither beside it nor in the repository")
        configs += _with_bases(found, (*above, path.resolve()))
    own = [_renamed(yaml.safe_dump(content, sort_keys=False), str(path))] if content else []
    return [*configs, *own]


def _renamed(text: str, where: str) -> str:
    for old, new in MOVED.items():
        if old in text:
            say(f"{where}: {old} is now {new}")
            text = text.replace(old, new)
    return text
