"""Every YAML in configs/ is read by the command line's own parser; a new file is found by glob."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.accelerators import CUDAAccelerator

from callbacks.time_limit import parse_limit
from commands import config_files, fit
from commands.config_files import content_of
from commands.fit import TrainerCLI, spelled
from commands.trainer_help import KEYS
from common.errors import UserError
from common.files import nearest_path
from lightning_modules.trainer_settings import is_slow_in_bf16

ROOT = Path(__file__).parent.parent
# test_sweep_command.py and test_evaluate.py read the first two; the last are parts that experiments build on
OTHERS = {ROOT / "configs/sweep", ROOT / "configs/eval", ROOT / "configs/base"}
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent not in OTHERS)
NAMES = [path.relative_to(ROOT).as_posix() for path in CONFIGS]


class ParseOnly(TrainerCLI):
    """Parses and checks a configuration, builds nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def is_whole(name: str) -> bool:
    """Whether a file is an experiment by itself, rather than a part."""
    return "model" in content_of(ROOT / name)


def command_for(name: str) -> list[str]:
    """Return the command line that a configuration's own comment gives, else one with this file alone.

    A file without a model is a part: it is tried on top of the quick start.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    for line in re.findall(r"^#.*python cli\.py (fit .*)$", text, flags=re.MULTILINE):
        files = re.findall(r"--config[ =](\S+)", line)
        if name in files:
            return ["fit", *(part for file in files for part in ("--config", file))]
    parts = [] if is_whole(name) else ["--config", "configs/quickstart.yaml"]
    return ["fit", *parts, "--config", name]


def class_names(config: Any) -> list[str]:
    """Return every class named in a nested configuration, without its module."""
    if isinstance(config, dict):
        own = [config["class_path"].rpartition(".")[2]] if "class_path" in config else []
        return own + [name for value in config.values() for name in class_names(value)]
    return [name for value in config for name in class_names(value)] if isinstance(config, list) else []


def test_there_are_configs() -> None:
    assert CONFIGS


TRAINERS = [name for name in NAMES if name.startswith("configs/trainer/")]
EXPERIMENTS = [name for name in NAMES if name.startswith("configs/experiment/")]
WHOLE = [name for name in EXPERIMENTS if "callbacks:" in (ROOT / name).read_text(encoding="utf-8")]
WHOLE += ["configs/experiment/sd15_swiftbrush.yaml"]
"""Those with callbacks of their own, and one at full size; test_experiments reads all but the callbacks."""


@pytest.mark.parametrize("name", sorted({*NAMES} - {*TRAINERS, *EXPERIMENTS} | {*WHOLE}))
def test_config_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown keys, wrong types and missing classes fail here; every class of the file is in the result."""
    monkeypatch.chdir(ROOT)
    parsed = ParseOnly(command_for(name))
    assert parsed.settings.model is not None
    assert parsed.settings.trainer.max_steps > 0
    resolved = yaml.safe_load(parsed._resolved_config())
    assert set(class_names(content_of(ROOT / name))) <= set(class_names(resolved))
    whole = [file for file in command_for(name)[2::2] if is_whole(file)]
    assert parsed.settings.experiment == Path(whole[-1]).stem, "parts name no experiment"


def test_every_base_is_built_on() -> None:
    """So that `test_config_parses` reads it."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "configs").rglob("*.yaml")]
    bases = " ".join(re.findall(r"^base: (.*)$", "\n".join(texts), flags=re.MULTILINE))
    assert all(f"{path.name}" in bases for path in (ROOT / "configs/base").iterdir())


def test_a_file_and_its_bases_together() -> None:
    """What a mapping says is added to its base's; a list and a number take the place of the base's."""
    content = content_of(ROOT / "configs/experiment/pixart_nasat.yaml")
    assert "base" not in content and content["seed_everything"] == 0
    objective = content["model"]["init_args"]["objective"]["init_args"]
    assert objective["guidance_scale"]["init_args"] == {"low": 0.5, "high": 3.0, "per_sample": False}
    assert objective["teacher_negatives"] is True and objective["max_timestep"] == 980
    assert len(content["data"]["init_args"]["eval_captions"]) == 8


@pytest.mark.parametrize(("experiment", "part"), list(zip(EXPERIMENTS, TRAINERS, strict=False)))
def test_trainer_parts_go_with_any_experiment(
    experiment: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the part says counts, the rest is the experiment's, also its callbacks and its name."""
    monkeypatch.chdir(ROOT)
    files = [part for name in (experiment, part) for part in ("--config", name)]
    settings = ParseOnly(["fit", *files]).settings
    alone, said = content_of(ROOT / experiment)["trainer"], content_of(ROOT / part)["trainer"]
    named = [one["class_path"].rpartition(".")[2] for one in alone["callbacks"] + said.get("callbacks+", [])]
    assert [one.class_path.rpartition(".")[2] for one in settings.trainer.callbacks] == named
    for name in {"accelerator", "precision", "devices"} & said.keys():
        assert settings.trainer[name] == said[name], name
    assert set(class_names(said)) <= set(class_names(settings.trainer.as_dict()))
    assert settings.trainer.max_steps == alone["max_steps"]
    assert settings.experiment == Path(experiment).stem


@pytest.mark.parametrize(
    ("is_slow", "given", "chosen", "is_told"),
    [(True, [], "32-true", False), (False, [], "bf16-mixed", False),
     (True, ["--trainer.precision=bf16-mixed"], "bf16-mixed", True),
     (False, ["--trainer.precision=32-true"], "32-true", False)],
)  # fmt: skip
def test_precision_is_chosen_where_none_is_given(
    is_slow: bool, given: list[str], chosen: str, is_told: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The choice is part of the configuration that is saved; an own choice stays, and a slow one is told."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(fit, "is_slow_in_bf16", lambda accelerator: is_slow)

    class Checked(ParseOnly):
        def instantiate_classes(self) -> None:
            self.before_instantiate_classes()

    parsed = Checked(["fit", "--config", "configs/quickstart.yaml", *given])
    assert yaml.safe_load(parsed._resolved_config())["trainer"]["precision"] == chosen
    printed = capsys.readouterr().out
    assert ("no bf16 units" in printed and "32-true" in printed) == is_told


@pytest.mark.parametrize(("units", "gpu", "accelerator", "slow"), [
    (False, False, "auto", True), (True, False, "auto", False), (False, True, "auto", False),
    (False, True, "cpu", True), (False, False, "gpu", False),
])  # fmt: skip
def test_where_bf16_is_slow(
    units: bool, gpu: bool, accelerator: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch is asked for the processor's units, Lightning for what "auto" is."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: units)
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: gpu)
    assert is_slow_in_bf16(accelerator) is slow


def test_a_time_limit_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = ["--trainer.callbacks+=TimeLimit", "--trainer.callbacks.limit=03:50:00"]
    callbacks = ParseOnly(["fit", "--config", "configs/quickstart.yaml", *options]).settings.trainer.callbacks
    assert len(callbacks) > 1 and callbacks[-1].class_path.endswith("TimeLimit")
    assert parse_limit(callbacks[-1].init_args.limit) == 3 * 3600 + 50 * 60


def test_the_keys_of_the_short_help_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    named = ("model.student_init", "model.teacher", "data.prompts", "data.eval_captions")
    given = [f"--{key}={'assets/x' if key in named else 3}" for key in KEYS]
    settings = ParseOnly(["fit", "--config", "configs/quickstart.yaml", *given]).settings
    model = settings.model.init_args
    assert model.fake_score.lora.rank == 3 and model.fake_score.lora.alpha == 64, "the rest stays"
    assert model.objective.init_args.guidance_scale == 3 and model.student.optimizer.init_args.lr == 3
    found = {one.class_path.rpartition(".")[2]: one for one in settings.trainer.callbacks}
    assert found["Evaluation"].init_args.final_size == 3 and settings.trainer.max_steps == 3


def test_spellings_of_options() -> None:
    """Hyphens; the usual class of --model.help; null for a nested setting, which jsonargparse can't read."""
    words = [
        "fit",
        "--trainer.max-steps",
        "3",
        "--seed-everything=1",
        "--data.prompts=a-b.txt",
        "--model.help",
    ]
    assert spelled(words) == [
        "fit", "--trainer.max_steps", "3", "--seed_everything=1", "--data.prompts=a-b.txt", "--model.help",
        config_files.MODEL,
    ]  # fmt: skip
    assert spelled(["--data.help", "X", "--help-all"]) == ["--data.help", "X", "--help"]
    assert config_files.expand(["--model.fake_score.lora", "null", "--model.student.clip_norm=null"]) == [
        '--model.fake_score={"lora": null}', '--model.student={"clip_norm": null}',
    ]  # fmt: skip


def test_the_adapter_of_the_fake_score_is_found_in_its_former_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    old = tmp_path / "old.yaml"
    old.write_text("base: configs/quickstart.yaml\nmodel: {init_args: {lora: {rank: 5}}}\n")
    lora = ParseOnly(["fit", "--config", str(old)]).settings.model.init_args.fake_score.lora
    assert (lora.rank, lora.alpha) == (5, 64)
    assert f"{old}: model.lora is now model.fake_score.lora" in capsys.readouterr().out
    old.write_text("model: {init_args: {fake_score: null, lora: {rank: 5}}}\n")
    assert config_files.content_of(old) == {"model": {"init_args": {"fake_score": None}}}
    settings = ParseOnly(
        ["fit", "--config", "configs/quickstart.yaml", "--model.init_args.lora=null"]
    ).settings
    assert settings.model.init_args.fake_score.lora is None
    assert "the command line: --model.lora is now" in capsys.readouterr().out


def test_callbacks_are_set_by_their_names(tmp_path: Path) -> None:
    """In the list that the files come to; what isn't there is added, and what is on the line stays behind."""
    (tmp_path / "a.yaml").write_text(
        "trainer: {callbacks: [RunCheckpoint, {class_path: c.Evaluation, init_args: {seed: 1}}]}\n"
    )
    (tmp_path / "b.yaml").write_text("trainer: {callbacks+: {class_path: c.SampleGrid}}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    named = [
        "--trainer.callbacks.Evaluation.frame.size=3",
        "--trainer.callbacks.SampleGrid.prompts",
        "[x, y]",
    ]
    more = ["--trainer.callbacks.TimeLimit.limit=03:50:00", "--trainer.callbacks+=Mine"]
    words = config_files.with_callback_settings(["fit", *files, *named, *more])
    assert words[:5] == ["fit", *files] and words[6:] == ["--trainer.callbacks+=Mine"]
    assert json.loads(words[5].removeprefix("--trainer.callbacks=")) == [
        {"class_path": "RunCheckpoint"},
        {"class_path": "c.Evaluation", "init_args": {"seed": 1, "frame": {"size": 3}}},
        {"class_path": "c.SampleGrid", "init_args": {"prompts": ["x", "y"]}},
        {"class_path": "TimeLimit", "init_args": {"limit": "03:50:00"}},
    ]


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("model.guidance_scale", "'model.objective.guidance_scale'"),
        ("model.student.lr", "'model.student.optimizer.lr' or 'model.fake_score.optimizer.lr'"),
        ("trainer.final_size", "'trainer.callbacks.Evaluation.final_size'"),
    ],
)
def test_an_option_of_another_place_is_found(
    option: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=f"did you mean {re.escape(meant)}"):
        ParseOnly(["fit", "--config", "configs/quickstart.yaml", f"--{option}=3"])


def test_the_nearest_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd21").mkdir(parents=True)
    assert nearest_path("modells/sd21") == "Did you mean models/sd21?"
    assert nearest_path("models/sd12") == "Did you mean models/sd21?"
    assert nearest_path(tmp_path / "model" / "x") == f"Did you mean {tmp_path / 'models'}?"
    assert nearest_path("assets/emoji-ds") == "Did you mean assets/emoji-sd?"
    assert nearest_path("nothing/like/it") == ""
    with pytest.raises(UserError, match="cannot be read.*Did you mean configs/quickstart.yaml"):
        ParseOnly(["fit", "--config", "configs/quickstat.yaml"])


def test_a_misspelt_key_fails(tmp_path: Path) -> None:
    """The test above can fail."""
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "model: {class_path: tests.tiny_run.TinyModule, init_args: {widht: 3}}\ntrainer: {max_steps: 1}\n"
    )
    with pytest.raises(ValueError, match="did you mean 'width'"):
        ParseOnly(["fit", "--config", str(bad)])


def test_a_file_says_what_differs_from_its_bases(tmp_path: Path) -> None:
    """Bases first, nested ones before them, then the file, then later files and options."""
    (tmp_path / "parts").mkdir()
    files = {
        "ground.yaml": "model: {class_path: tests.tiny_run.TinyModule, init_args: {width: 5}}\n"
        "data: {class_path: tests.tiny_run.TinyData}\ntrainer: {max_steps: 1, devices: 1}\n",
        "parts/middle.yaml": "base: ../ground.yaml\ntrainer: {max_steps: 2, log_every_n_steps: 3}\n",
        "mine.yaml": "# mine\nbase: [parts/middle.yaml, configs/trainer/cpu.yaml]\n"
        "model: {init_args: {learning_rate: 1.0e-3}}\ntrainer: {max_steps: 4}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    parsed = ParseOnly(["fit", "--config", str(tmp_path / "mine.yaml"), "--trainer.log_every_n_steps=7"])
    settings = parsed.settings
    assert settings.experiment == "mine"
    assert (settings.trainer.max_steps, settings.trainer.log_every_n_steps) == (4, 7)
    assert settings.trainer.accelerator == "cpu", "a base in the repository"
    assert settings.model.init_args.width == 5 and settings.model.init_args.learning_rate == 1e-3
    assert "base" not in yaml.safe_load(parsed._resolved_config())


@pytest.mark.parametrize(
    ("base", "message"), [("b.yaml", "its own base: .*b.yaml"), ("none.yaml", "has the base none.yaml")]
)
def test_bases_that_cannot_be(base: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match=message):
        ParseOnly(["fit", f"--config={tmp_path / 'a.yaml'}"])


def test_a_class_that_has_moved_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config_files, "MOVED", {"tests.old.Tiny": "tests.tiny_run.TinyModule"})
    old = tmp_path / "old.yaml"
    old.write_text("model: {class_path: tests.old.Tiny}\ntrainer: {max_steps: 1}\n")
    settings = ParseOnly(["fit", "--config", str(old)]).settings
    assert settings.model.class_path == "tests.tiny_run.TinyModule" and settings.experiment == "old"
    assert capsys.readouterr().out == f"{old}: tests.old.Tiny is now tests.tiny_run.TinyModule\n"
