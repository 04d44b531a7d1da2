"""The command line as a user meets it: commands, run folders, resuming, and one message for each mistake."""

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.optimization import get_scheduler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cli
from commands.config_files import keep_references
from common.errors import UserError
from common.files import claimed
from tests.tiny_run import TinyModule

ROOT = Path(cli.__file__).parent


@pytest.fixture
def fit(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that runs `fit` on the tiny module with more options and returns the newest run folder."""
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model: {class_path: tests.tiny_run.TinyModule}\n"
        "data: {class_path: tests.tiny_run.TinyData}\n"
        "trainer:\n  accelerator: cpu\n  log_every_n_steps: 1\n  val_check_interval: 2\n"
        f"  default_root_dir: {tmp_path / 'runs'}\n"
        "  callbacks: [{class_path: RunCheckpoint, init_args: {every_n_steps: 2}}]\n"
    )

    def run(*options: str, command: str = "fit") -> Path:
        cli.main([command, "--config", str(config), *options])
        return sorted((tmp_path / "runs" / "tiny").iterdir())[-1]

    yield run
    TinyModule.at_step = None


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def rows(run: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


# Commands


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name, (_, line) in cli.COMMANDS.items():
        assert f"  {name} " in text and line in text
    for name in ("fit", "validate", "test", "predict", "generate", "export"):
        assert f"  {name} " in text


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["evaluate", "--help"]])
def test_help_for_a_reader_that_has_ended(words: list[str]) -> None:
    """As `head` does; neither a traceback nor a failure."""
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "cli.py", *words]
    run = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("command", [*cli.COMMANDS])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_help_comes_without_torch() -> None:
    """It takes seconds to import; in a process of its own, as this one has it."""
    code = (
        "import sys, cli\n"
        "for words in ([], *([name] for name in cli.COMMANDS)):\n"
        "    try: cli.main([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        "    if 'torch' in sys.modules: sys.exit(f'{words} imports torch')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("command", ["evaluate", "encode-prompts", "draw-teacher", "merge"])
def test_help_from_the_source_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(cli.COMMANDS[command][0])
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert all(len(line) <= 110 for line in text.splitlines())
    for field in (one for one in fields(module.Options) if one.init):
        (line,) = re.findall(
            rf"^  --{field.name.replace('_', '-')}(?: [\w|]+)?(?:\s\s+|$).*", text, re.MULTILINE
        )
        if isinstance(field.default, int | float) and field.default is not False:
            assert f"({field.default})" in text[text.index(line) :].partition("\n  --")[0]
        assert (f"--{field.name} {field.name.upper()}" in text) == (field.default is field.default_factory)
    assert "coco30k_swiftbrush" in text or command != "evaluate"


def test_all_options_are_listed_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help-all"])
    assert "Also the seed of model and data, unless" in " ".join(capsys.readouterr().out.split())


def test_help_of_the_trainer_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "anything.yaml", "-h"])
    lines = capsys.readouterr().out.splitlines()
    assert 20 < len(lines) < 46 and all(len(line) <= 110 for line in lines)
    assert "--trainer.max_steps" in str(lines) and "emoji_swiftbrush" in str(lines)


# Runs


def test_what_a_run_leaves(fit: Callable[..., Path]) -> None:
    run = fit("--trainer.max_steps", "5", "--trainer.callbacks.keep_step_checkpoints", "-1")
    assert run.name == "version_0"
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt", "step_2.ckpt", "step_4.ckpt"}
    assert any(path.name.startswith("events.out.tfevents") for path in run.iterdir())
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    table = rows(run)
    assert [row["step"] for row in table] == ["1", "2", "3", "4", "5"]
    assert all(row["train/loss"] for row in table)
    assert [bool(row["val/frechet_distance"]) for row in table] == [False, True, False, True, False]
    assert fit("--trainer.max_steps", "1").name == "version_1"


def test_saved_config_starts_the_same_run_again(fit: Callable[..., Path]) -> None:
    first = fit("--trainer.max_steps", "3", "--model.learning_rate", "0.03", "--experiment", "tiny")
    cli.main(["fit", "--config", str(first / "config.yaml")])
    second = first.parent / "version_1"
    assert (second / "config.yaml").read_text() == (first / "config.yaml").read_text()
    assert_same(weights(first), weights(second))
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert config["model"]["init_args"]["learning_rate"] == 0.03
    assert config["experiment"] == "tiny"


def test_configs_merge_and_interpolations_see_the_command_line(
    fit: Callable[..., Path], tmp_path: Path
) -> None:
    base = str(tmp_path / "tiny.yaml")
    extra = tmp_path / "extra.yaml"
    extra.write_text("trainer: {log_every_n_steps: '${trainer.max_steps}', max_steps: 9}\n")
    cli.main(["fit", "--config", base, "--config", str(extra), "--trainer.max_steps", "2"])
    config = yaml.safe_load((tmp_path / "runs" / "extra" / "version_0" / "config.yaml").read_text())
    assert config["trainer"]["log_every_n_steps"] == 2
    assert config["trainer"]["val_check_interval"] == 2, "the first file still counts"


def test_a_whole_run_is_quiet(tmp_path: Path, fit: Callable[..., Path]) -> None:
    """In a process of its own, as a user sees it: no warnings, a bar over the steps, exit status 0."""
    fit("--trainer.max_steps", "2")
    command = [
        sys.executable,
        "cli.py",
        "fit",
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--trainer.max_steps=4",
    ]
    done = subprocess.run(
        [*command, "--ckpt_path=last"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "4/4" in done.stderr
    assert "warn" not in done.stderr.lower() and "litlogger" not in done.stderr
    assert "trainer.max_steps: 2 -> 4" in done.stdout


# Resuming


@pytest.mark.parametrize("module", ["TinyModule", "TinyTwoRoles"])
@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_run_equals_the_uninterrupted_one(module: str, stop: int, fit: Callable[..., Path]) -> None:
    options = ("--model", f"tests.tiny_run.{module}")
    whole = fit(*options, "--trainer.max_steps", "6")
    part = fit(*options, "--trainer.max_steps", str(stop))
    assert fit(*options, "--trainer.max_steps", "6", "--ckpt_path", "last") == part
    assert part != whole
    assert_same(weights(part), weights(whole))
    assert [row["step"] for row in rows(part)] == [str(step) for step in range(1, 7)]
    assert [row["train/loss"] for row in rows(part)] == [row["train/loss"] for row in rows(whole)]


@pytest.mark.parametrize("module", ["TinyModule", "TinyTwoRoles"])
def test_resume_after_a_crash_inside_a_step(module: str, fit: Callable[..., Path]) -> None:
    options = ("--model", f"tests.tiny_run.{module}", "--trainer.max_steps", "6")
    whole = fit(*options)

    def crash() -> None:
        raise OSError("the disk is gone")

    TinyModule.at_step = (4, crash)
    with pytest.raises(OSError, match="the disk is gone"):
        fit(*options)
    TinyModule.at_step = None
    broken = whole.parent / "version_1"
    assert torch.load(broken / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert [row["step"] for row in rows(broken)] == ["1", "2", "3"]
    assert fit(*options, "--ckpt_path", "last") == broken
    assert_same(weights(broken), weights(whole))
    assert rows(broken) == rows(whole)
    board = EventAccumulator(str(broken)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_best_checkpoint_continues_exactly_too(fit: Callable[..., Path]) -> None:
    """It is written after a validation, where Lightning's loops stand elsewhere than after a step."""
    whole = fit("--trainer.max_steps", "6")
    best = torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)["global_step"]
    values = {
        int(row["step"]): float(row["val/frechet_distance"])
        for row in rows(whole)
        if row["val/frechet_distance"]
    }
    assert best == min(values, key=lambda step: values[step])
    early = fit("--trainer.max_steps", "2")
    late = fit("--trainer.max_steps", "6", "--ckpt_path", str(early / "checkpoints" / "best.ckpt"))
    assert late != early, "a checkpoint named by its path begins a version of its own"
    assert_same(weights(late), weights(whole))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_stopped_run_saves_its_step_and_continues(
    number: signal.Signals, status: int, fit: Callable[..., Path]
) -> None:
    whole = fit("--trainer.max_steps", "6")
    TinyModule.at_step = (3, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        fit("--trainer.max_steps", "6")
    TinyModule.at_step = None
    assert stopped.value.code == status
    assert signal.getsignal(number) == before
    run = whole.parent / "version_1"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    fit("--trainer.max_steps", "6", "--ckpt_path", "last")
    assert_same(weights(run), weights(whole))


def test_values_given_now_win_and_are_printed(
    fit: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("--trainer.max_steps", "4", "--model.warmup_steps", "6")
    rates: list[float] = []
    original = TinyModule.training_step

    def record(self: TinyModule, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TinyModule, "training_step", record)
    capsys.readouterr()
    options = ("--trainer.max_steps", "8", "--model.warmup_steps", "6", "--model.learning_rate", "0.6")
    run = fit(*options, "--ckpt_path", "last")
    out = capsys.readouterr().out
    assert "model.init_args.learning_rate: 0.1 -> 0.6" in out
    assert "trainer.max_steps: 4 -> 8" in out
    assert "warmup_steps" not in out
    assert rates == pytest.approx([0.5, 0.6, 0.6, 0.6]), (
        "the warm-up goes on from its place with the new rate"
    )
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"][
        "learning_rate"
    ] == pytest.approx(0.6)


class TinyLinear(TinyModule):
    """A rate that falls to zero at the last step; notes the rate of each step, and its seed."""

    rates: list[float] = []
    seeds: list[int | None] = []

    def __init__(self, learning_rate: float = 0.1, seed: int | None = None) -> None:
        super().__init__(3, learning_rate)
        self.seeds.append(seed)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = get_scheduler(
            "linear", optimizer, num_warmup_steps=0, num_training_steps=self.trainer.max_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> type[TinyLinear]:
    monkeypatch.setattr(TinyLinear, "rates", [])
    monkeypatch.setattr(TinyLinear, "seeds", [])
    return TinyLinear


def test_a_longer_run_follows_its_own_slope_from_the_first_update(
    fit: Callable[..., Path], linear: type[TinyLinear]
) -> None:
    model = ("--model", "tests.test_cli.TinyLinear")
    fit(*model, "--trainer.max_steps", "2")
    assert linear.rates == pytest.approx([0.1, 0.05])
    fit(*model, "--trainer.max_steps", "4", "--ckpt_path", "last")
    assert linear.rates[2:] == pytest.approx([0.05, 0.025])
    fit(*model, "--trainer.max_steps", "8", "--ckpt_path", "last", "--model.learning_rate", "0.8")
    assert linear.rates[4:] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_seed_everything_is_the_seed_of_the_model_unless_it_has_its_own(
    fit: Callable[..., Path], linear: type[TinyLinear], tmp_path: Path
) -> None:
    model = ("--model", "tests.test_cli.TinyLinear", "--trainer.max_steps", "1")
    run = fit(*model, "--seed_everything", "7")
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["seed"] == 7
    fit(*model, "--seed_everything", "7", "--model.seed", "0")
    (tmp_path / "own.yaml").write_text("model: {init_args: {seed: 3}}\n")
    fit(*model, "--seed_everything", "7", "--config", str(tmp_path / "own.yaml"), "--experiment", "tiny")
    fit(*model)
    assert linear.seeds == [7, 0, 3, 0]


def test_last_without_a_checkpoint_starts_afresh_with_a_notice(
    fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_steps", "1", "--ckpt_path", "last").name == "version_0"
    assert "starting afresh" in capsys.readouterr().out


def test_a_finished_run_is_completed_without_training(fit: Callable[..., Path]) -> None:
    run = fit("--trainer.max_steps", "3")
    before = weights(run)
    table = rows(run)
    assert fit("--trainer.max_steps", "3", "--ckpt_path", "last") == run
    assert_same(weights(run), before)
    assert rows(run) == table


def test_test_command_reads_a_checkpoint_and_leaves_the_training_curves(fit: Callable[..., Path]) -> None:
    run = fit("--trainer.max_steps", "4")
    table, config = rows(run), (run / "config.yaml").read_text()
    assert fit("--ckpt_path", "last", command="test") == run
    assert rows(run) == table
    assert (run / "config.yaml").read_text() == config
    measured = float(rows(run, "metrics_test.csv")[-1]["val/frechet_distance"])
    assert measured == pytest.approx(float(table[3]["val/frechet_distance"]), rel=1e-6)


def test_loggers_of_the_config_come_in_addition(fit: Callable[..., Path], tmp_path: Path) -> None:
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "more"))
    run = fit("--trainer.max_steps", "2", *logger)
    assert [row["step"] for row in rows(run)] == ["1", "2"]
    assert list((tmp_path / "more").rglob("metrics.csv"))
    silent = fit("--trainer.max_steps", "2", "--trainer.logger", "false")
    assert sorted(path.name for path in silent.iterdir()) == ["checkpoints", "config.yaml"]


def test_fast_dev_run_leaves_nothing(fit: Callable[..., Path], tmp_path: Path) -> None:
    cli.main(["fit", "--config", str(tmp_path / "tiny.yaml"), "--trainer.fast_dev_run", "true"])
    assert not (tmp_path / "runs").exists()


# Mistakes


def other_architecture(tmp_path: Path) -> list[str]:
    cli.main(["fit", "--config", str(tmp_path / "tiny.yaml"), "--trainer.max_steps=1", "--experiment=other",
              "--model.width=5", "--data.width=5"])  # fmt: skip
    checkpoint = tmp_path / "runs" / "other" / "version_0" / "checkpoints" / "last.ckpt"
    return ["--ckpt_path", str(checkpoint)]


def broken_checkpoint(tmp_path: Path) -> list[str]:
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 not all of it")
    return ["--ckpt_path", str(tmp_path / "broken.ckpt")]


def other_file(tmp_path: Path) -> list[str]:
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    return ["--ckpt_path", str(tmp_path / "other.ckpt")]


def root_is_a_file(tmp_path: Path) -> list[str]:
    (tmp_path / "file").touch()
    return ["--trainer.default_root_dir", str(tmp_path / "file")]


def misspelt_in_file(tmp_path: Path) -> list[str]:
    (tmp_path / "bad.yaml").write_text("trainer: {max_stepz: 3}\n")
    return ["--config", str(tmp_path / "bad.yaml")]


def misspelt_argument_in_file(tmp_path: Path) -> list[str]:
    (tmp_path / "bad.yaml").write_text(
        "model: {class_path: tests.tiny_run.TinyModule, init_args: {learning_rat: 3}}\n"
    )
    return ["--config", str(tmp_path / "bad.yaml")]


def misspelt_callback_argument(tmp_path: Path) -> list[str]:
    (tmp_path / "bad.yaml").write_text(
        "trainer: {callbacks: [{class_path: RunCheckpoint, init_args: {every_n_step: 3}}]}\n"
    )
    return ["--config", str(tmp_path / "bad.yaml")]


def broken_yaml(tmp_path: Path) -> list[str]:
    (tmp_path / "bad.yaml").write_text("trainer: {max_steps: [\n")
    return ["--config", str(tmp_path / "bad.yaml")]


def missing_prompts(tmp_path: Path) -> list[str]:
    return ["--data=PromptDataModule", f"--data.prompts={tmp_path / 'none.txt'}"]


MISTAKES: dict[str, tuple[Callable[[Path], list[str]] | list[str], list[str]]] = {
    "missing config": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "broken yaml": (broken_yaml, ["bad.yaml"]),
    "misspelt option": (["--trainer.max_stepz", "3"], ["max_stepz", "did you mean 'trainer.max_steps'"]),
    "misspelt key": (misspelt_in_file, ["max_stepz", "did you mean 'trainer.max_steps'"]),
    "misspelt argument": (["--model.learning_rat", "3"], ["learning_rat", "did you mean 'learning_rate'"]),
    "misspelt in file": (misspelt_argument_in_file, ["learning_rat", "did you mean 'learning_rate'"]),
    "misspelt callback": (misspelt_callback_argument, ["every_n_step", "did you mean 'every_n_steps'"]),
    "unknown class": (["--model", "TinyModul"], ["TinyModul"]),
    "wrong type": (["--trainer.max_steps", "many"], ["trainer.max_steps", "many"]),
    "missing checkpoint": (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt", "not found"]),
    "no best": (["--ckpt_path", "best"], ["no best.ckpt"]),
    "broken checkpoint": (broken_checkpoint, ["broken.ckpt"]),
    "not a checkpoint": (other_file, ["other.ckpt", "not a checkpoint"]),
    "other architecture": (other_architecture, ["layer.weight", "[1, 5]", "[1, 3]"]),
    "root is a file": (root_is_a_file, ["Not a directory", "default_root_dir"]),
    "unwritable root": (
        ["--trainer.default_root_dir", "/proc/nowhere"],
        ["/proc/nowhere", "cannot be written"],
    ),
    "endless": (["--trainer.max_steps", "-1"], ["max_steps"]),
    "option of another class": (["--learning_rate=1"], ["did you mean 'model.learning_rate'"]),
    "misspelt callback name": (
        ["--trainer.callbacks.RunCheckpoin.every_n_steps=3"],
        ["no RunCheckpoin;", "did you mean 'RunCheckpoint'"],
    ),
    "missing prompts": (missing_prompts, ["none.txt", "does not exist"]),
    "devices that are not there": (["--trainer.accelerator=cuda", "--trainer.devices=64"], ["the Trainer"]),
    "no device": (["--trainer.devices=0"], ["the Trainer", "devices"]),
    "no such accelerator": (["--trainer.accelerator=abacus"], ["the Trainer", "abacus"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message_and_leaves_nothing(
    mistake: str,
    fit: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, expected = MISTAKES[mistake]
    options = make if isinstance(make, list) else make(tmp_path)
    base = ["fit", "--config", str(tmp_path / "tiny.yaml"), "--trainer.max_steps=2"]
    monkeypatch.setattr(sys, "argv", ["cli.py", *base, *options])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    messages = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(messages) == 1 and messages[0].startswith("error: "), messages
    for text in expected:
        assert text in messages[0]
    assert "Traceback" not in messages[0]
    assert not (tmp_path / "runs" / "tiny").exists(), "nothing half-written"


def test_a_mistake_does_not_touch_the_run_it_would_continue(fit: Callable[..., Path]) -> None:
    run = fit("--trainer.max_steps", "2")
    before = {path: path.read_bytes() for path in (run / "config.yaml", run / "metrics.csv")}
    with pytest.raises(UserError, match="another architecture"):
        fit("--trainer.max_steps", "4", "--ckpt_path", "last", "--model.width", "4", "--data.width", "4")
    assert {path: path.read_bytes() for path in before} == before


def test_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cli.py", "fitt"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "did you mean 'fit'?" in capsys.readouterr().err
    for word, meant in {"train": "fit", "trainn": "fit", "eval": "evaluate", "serve": "app"}.items():
        with pytest.raises(UserError, match=f"did you mean '{meant}'"):
            cli.main([word])
    with pytest.raises(UserError, match="the commands are fit, "):
        cli.main(["xyzzy"])


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cli.py", "fitt", "--debug"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "Traceback" in capsys.readouterr().err


def test_from_python_errors_are_raised(fit: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="did you mean"):
        fit("--trainer.max_stepz", "3")


def test_a_bug_is_not_hidden_as_a_mistake(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(TinyModule, "loss", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        fit("--trainer.max_steps", "2")


def test_home_is_home_in_every_path(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.yaml").write_text("trainer: {default_root_dir: ~/runs, max_steps: 2}")
    for option in ("--config=more.yaml", "--trainer.default_root_dir=~/again"):
        cli.main(["fit", "--config", "tiny.yaml", option, "--trainer.max_steps=2", "--experiment=e"])
    for root in ("runs", "again"):
        assert (tmp_path / "home" / root / "e/version_0/checkpoints/last.ckpt").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.max_epochs=1", "max_epochs is 1, but the stream of prompts has no epochs"),
        ("--trainer.min_epochs=2", "min_epochs is 2"),
        ("--trainer.check_val_every_n_epoch=1", "check_val_every_n_epoch is 1"),
        ("--trainer.val_check_interval=0", "val_check_interval is 0"),
        ("--trainer.val_check_interval=0.5", "val_check_interval is 0.5"),
        ("--seed_everything=-1", "seed_everything is -1"),
        ("--trainer.devices=0", "the Trainer refuses its settings"),
    ],
)
def test_limits_in_epochs_and_numbers_out_of_range_are_refused(
    option: str, message: str, fit: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=message):
        fit(option, "--trainer.max_steps=2")


def test_a_cluster_that_lightning_refuses_is_one_message(
    fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "7", "JOB_NAME": "train", "PROCID": "0", "NTASKS": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match="refuses its settings.*--ntasks-per-node"):
        fit("--trainer.max_steps=2")


def test_the_second_process_in_a_run_folder_is_refused(fit: Callable[..., Path]) -> None:
    folder = fit("--trainer.max_steps=2")
    with claimed(folder), pytest.raises(UserError, match="another process is writing into"):
        fit("--trainer.max_steps=4", "--ckpt_path=last")
    assert fit("--trainer.max_steps=4", "--ckpt_path=last") == folder and rows(folder)[-1]["step"] == "4"


def test_another_optimizer_starts_anew(fit: Callable[..., Path]) -> None:
    first = fit("--trainer.max_steps=2")
    with pytest.warns(UserWarning, match="of another kind than SGD"):
        fit("--model=tests.tiny_run.TinySGD", "--trainer.max_steps=4", "--ckpt_path",
            str(first / "checkpoints/last.ckpt"))  # fmt: skip


def test_secrets_of_the_environment_are_written_as_references(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    logger = {
        "class_path": "CSVLogger",
        "init_args": {"save_dir": str(tmp_path), "name": "x-${oc.env:A_SECRET}"},
    }
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    folder = fit("--trainer.max_steps=2", f"--config={tmp_path / 'more.yaml'}", "--experiment=tiny")
    assert (tmp_path / "x-hunter2").is_dir(), "the run itself has the value"
    assert "hunter2" not in keep_references("a: {b: [x-hunter2]}", ["--a=${oc.env:A_SECRET}"])
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert "hunter2" not in json.dumps(state["callbacks"], default=str)
    assert "hunter2" not in (folder / "config.yaml").read_text()


def test_stopping_by_a_metric_that_is_not_there_is_one_message(
    fit: Callable[..., Path], tmp_path: Path
) -> None:
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/nothing"}}
    (tmp_path / "stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [stopping]}}))
    with pytest.raises(UserError, match="conditioned on metric `val/nothing` which is not available"):
        fit("--trainer.max_steps=4", f"--config={tmp_path / 'stop.yaml'}", "--experiment=tiny")


@pytest.mark.parametrize("text", ["a: ${nothing}", "a: ${oc.env:NOT_SET_ANYWHERE}", "model: ${model}"])
def test_references_to_nothing_are_one_message(text: str, fit: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(f"trainer: {{max_steps: '{text[3:]}'}}" if text[0] == "a" else text)
    with pytest.raises(UserError):
        fit(f"--config={tmp_path / 'odd.yaml'}", "--experiment=tiny")


def test_configurations_have_bounds(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    for name, text in {"bomb": bomb, "deep": "a: " + "[" * 70 + "]" * 70, "deeper": "[" * 5000}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="more than 100,000 entries or 64 levels|cannot be read"):
            cli.main(["fit", "--config", str(tmp_path / name)])
