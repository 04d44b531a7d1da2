"""The configuration files of a command line: what they build on, and names that have moved since."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from common.errors import UserError
from common.files import ROOT, asset_path, at_home, nearest_path
from common.processes import say

PARTS = ("trainer", "data")
MOST_ENTRIES, DEEPEST = 100_000, 64
_VARIABLE = re.compile(r"\$\{oc\.env:(\w+)")
MOVED = {
    "lightning_modules.pretraining_pixart.PixArtPretraining":
        "lightning_modules.pretraining.transformer.PixArtPretraining",
}  # fmt: skip
"""Class paths of earlier versions, as they stand in saved configurations, and what they are now."""
MODEL, DATA = "lightning_modules.distillation.OneStepDistillation", "datamodules.prompts.PromptDataModule"
"""What a model and data are as a rule."""


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
    # so deep, jsonargparse takes null for a text
    nested = r"\0--model(?:\.init_args)?\.(student|fake_score)\.(\w+)[=\0](?:null|None)(?=\0)"
    return re.sub(nested, r'\0--model.\1={"\2": null}', "\0".join(["", *expanded, ""])).split("\0")[1:-1]


def content_of(path: str | Path) -> dict[str, Any]:
    """What a configuration file says together with its bases; no defaults of classes are filled in.

    Raises:
        UserError: as `expand`.
    """
    parts = contents(expand(["--config", str(path)]))
    return OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, parts)))


def contents(args: list[str]) -> list[dict[str, Any]]:
    """What each configuration file of an expanded command line says."""
    named = [value for option, value in zip(args, args[1:], strict=False) if option == "--config"]
    texts = (value if "\n" in value else Path(value).read_text(encoding="utf-8") for value in named)
    return [yaml.safe_load(text) or {} for text in texts]


def with_callback_settings(args: list[str]) -> list[str]:
    """An expanded command line with `--trainer.callbacks.NAME.KEY VALUE` written into the files' callbacks.

    jsonargparse knows no names in lists: the whole list stands behind the last file then. A callback that is
    not in it is added.

    Raises:
        UserError: there is none of that name, but one of nearly the same.
    """
    rest, named, words = [], [], iter(args)
    for word in words:
        if found := re.fullmatch(r"--trainer\.callbacks\.([A-Z]\w*)\.([^=]+)(=?)(.*)", word, re.DOTALL):
            name, keys, joined, value = found.groups()
            named.append((name, keys.split("."), value if joined else next(words, "")))
        else:
            rest.append(word)
    if not named:
        return rest
    callbacks = _callbacks(rest)
    for name, keys, value in named:
        own = {one["class_path"].rpartition(".")[2]: one for one in callbacks}
        if name not in own:
            if close := difflib.get_close_matches(name, own, n=1):
                raise UserError(f"trainer.callbacks has no {name}; did you mean {close[0]!r}?")
            own[name] = {"class_path": name}
            callbacks.append(own[name])
        place = own[name].setdefault("init_args", {})
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = yaml.safe_load(value)
    behind = max((i + 2 for i, word in enumerate(rest) if word == "--config"), default=1)
    return [*rest[:behind], f"--trainer.callbacks={json.dumps(callbacks, default=str)}", *rest[behind:]]


def _callbacks(args: list[str]) -> list[dict[str, Any]]:
    """The callbacks that the configuration files of an expanded command line come to."""
    listed: list[Any] = []
    for trainer in (content.get("trainer") or {} for content in contents(args)):
        listed = trainer["callbacks"] or [] if "callbacks" in trainer else listed
        listed = listed if isinstance(listed, list) else [listed]
        more = trainer.get("callbacks+") or []
        listed = [*listed, *(more if isinstance(more, list) else [more])]
    return [{"class_path": one} if isinstance(one, str) else one for one in listed]


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
        hint = nearest_path(path)
        raise UserError(f"configuration file {path} cannot be read: {reason}. {hint}".rstrip()) from error
    check_size(content, path)
    if not isinstance(content, dict):
        raise UserError(f"configuration file {path} holds no keys such as `model:` and `trainer:`")
    moved = _moved_keys(content, path)
    if "base" not in content and at_home(content) == content:
        renamed = _renamed(yaml.safe_dump(content, sort_keys=False) if moved else text, str(path))
        return [str(path) if renamed == text else renamed]
    bases, content = content.pop("base", []), at_home(content)
    configs: list[str] = []
    for base in bases if isinstance(bases, list) else [bases]:
        places = (path.parent / str(base), ROOT / str(base))
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(
                f"{path} has the base {base}, which is neither beside it nor in the repository: correct it"
            )
        configs += _with_bases(found, (*above, path.resolve()))
    own = [_renamed(yaml.safe_dump(content, sort_keys=False), str(path))] if content else []
    return [*configs, *own]


def _renamed(text: str, where: str) -> str:
    for old, new in MOVED.items():
        if old in text:
            say(f"{where}: {old} is now {new}")
            text = text.replace(old, new)
    option = re.sub(r"\A--model(\.init_args)?\.lora(?=[.=]|\Z)", "--model.fake_score.lora", text)
    if option != text:
        say(f"{where}: --model.lora is now --model.fake_score.lora")
    return option


def _moved_keys(content: dict[str, Any], path: Path) -> bool:
    """Move the fake score's adapter, which was `model.lora`, in a file's content; whether it was there."""
    model = content.get("model")
    settings = model.get("init_args") if isinstance(model, dict) else None
    if not isinstance(settings, dict) or "lora" not in settings:
        return False
    if not MODEL.endswith(str(model.get("class_path", MODEL))):  # type: ignore[union-attr]
        return False
    say(f"{path}: model.lora is now model.fake_score.lora")
    lora = settings.pop("lora")
    if settings.get("fake_score", {}) is not None:  # null: there is no fake score to have one
        settings.setdefault("fake_score", {})["lora"] = lora
    return True
