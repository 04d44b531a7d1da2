"""Every YAML in configs/ is read by the command line's own parser; a new file is found by glob."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.trainer_cli import TrainerCLI

ROOT = Path(__file__).parent.parent
# no configurations of fit: tests/test_sweep_command.py and tests/test_evaluate.py read them
OTHERS = {ROOT / "configs/sweep", ROOT / "configs/eval"}
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent not in OTHERS)
NAMES = [path.relative_to(ROOT).as_posix() for path in CONFIGS]


class ParseOnly(TrainerCLI):
    """Parses and checks a configuration, builds nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def command_for(name: str) -> list[str]:
    """Return the command line that a configuration's own comment gives, else one with this file alone.

    A file without a model is a part: it is tried on top of the quick start.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    for line in re.findall(r"^#.*python cli\.py (fit .*)$", text, flags=re.MULTILINE):
        files = re.findall(r"--config[ =](\S+)", line)
        if name in files:
            return ["fit", *(part for file in files for part in ("--config", file))]
    parts = [] if "model" in yaml.safe_load(text) else ["--config", "configs/quickstart.yaml"]
    return ["fit", *parts, "--config", name]


def class_names(config: Any) -> list[str]:
    """Return every class named in a nested configuration, without its module."""
    if isinstance(config, dict):
        own = [config["class_path"].rpartition(".")[2]] if "class_path" in config else []
        return own + [name for value in config.values() for name in class_names(value)]
    return [name for value in config for name in class_names(value)] if isinstance(config, list) else []


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("name", NAMES)
def test_config_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown keys, wrong types and missing classes fail here; every class of the file is in the result."""
    monkeypatch.chdir(ROOT)
    parsed = ParseOnly(command_for(name))
    assert parsed.settings.model is not None
    assert parsed.settings.trainer.max_steps > 0
    resolved = yaml.safe_load(parsed._resolved_config())
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert set(class_names(content)) <= set(class_names(resolved))
    assert parsed.settings.experiment == Path(name).stem


def test_a_misspelt_key_fails(tmp_path: Path) -> None:
    """The test above can fail."""
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "model: {class_path: tests.tiny_run.TinyModule, init_args: {widht: 3}}\ntrainer: {max_steps: 1}\n"
    )
    with pytest.raises(ValueError, match="did you mean 'width'"):
        ParseOnly(["fit", "--config", str(bad)])
