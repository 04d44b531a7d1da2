"""Distillation by the command line: resuming bit for bit, two processes, new objectives, a whole run."""

import csv
import json
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn

import cli
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.reference import compute_reference
from callbacks.report import python_command
from common.errors import UserError
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.networks.loading import load_parts
from lightning_modules.objectives.base import Networks, Objective, StudentSample, Terms
from tests.distributed_runs import run_processes
from tests.tiny_distillation import PROMPTS, write_config

THIS = "tests.test_distillation_runs"


def fit(config: Path, *options: str) -> Path:
    """Run `fit` and return the folder of the run."""
    cli.main(["fit", "--config", str(config), *options])
    return sorted((config.parent / "runs").glob("*/version_*"))[-1]


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def assert_identical(first: Any, second: Any, place: str = "") -> None:
    """Nested dicts and lists with bit-identical tensors and equal values."""
    assert type(first) is type(second), place
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_identical(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for number, (one, other) in enumerate(zip(first, second)):
            assert_identical(one, other, f"{place}.{number}")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), place
    else:
        assert first == second, place


def curves(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without time and memory."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if not name.startswith(("throughput/", "memory/"))]
    return [{name: row[name] for name in names} for row in rows]


# --- resuming


class Interrupt(L.Callback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGINT)


def test_resumed_run_is_the_uninterrupted_one(tiny_sd: Path, tmp_path: Path) -> None:
    """Ctrl-C in step two of four; a linear schedule, which depends on max_steps, beside a constant one."""
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    changes: dict[str, Any] = {"trainer__max_steps": 4} | {
        f"model__init_args__{role}": {"optimizer": optimizer, "schedule": schedule, "warmup_steps": 3}
        for role, schedule in (("student", "linear"), ("fake_score", "constant"))
    }
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = fit(write_config(tmp_path / "whole" / "tiny.yaml", tiny_sd, **changes))
    interrupt = [{"class_path": f"{THIS}.Interrupt", "init_args": {"step": 2}}]
    config = write_config(tmp_path / "parts" / "tiny.yaml", tiny_sd, **changes, trainer__callbacks=interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(config)
    write_config(config, tiny_sd, **changes)
    assert checkpoint(next((tmp_path / "parts").glob("runs/*/*")))["global_step"] == 2
    parts = fit(config, "--ckpt_path=last")
    assert parts.name == "version_0"
    first, second = checkpoint(whole), checkpoint(parts)
    assert first["counters"] == {"student_steps": 4, "fake_score_steps": 4, "skipped_updates": 0}
    assert first["ema"]["num_updates"] == 4
    assert first["PromptDataModule"] == {"position": 16}
    kept = {"state_dict", "ema", "counters", "optimizer_states", "lr_schedulers", "one_step", "global_step",
            "PromptDataModule"}  # fmt: skip
    for key in kept:
        assert_identical(first[key], second[key], key)
    assert curves(whole) == curves(parts) and len(curves(whole)) == 4
    assert [row["counts/images_seen"] for row in curves(parts)] == ["4", "8", "12", "16"]


# --- several processes


def test_two_processes_are_one(tiny_sd: Path, tmp_path: Path) -> None:
    """Half the batch on each of two processes, micro-batches of one on both: the same weights and numbers.

    Plain SGD, because Adam turns the rounding of a vanishing gradient into a full step. float32 sums over
    another split differ by about 1e-7 of the values; the weights move by more than 1e-3.
    """
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 20.0}}
    roles = {f"model__init_args__{name}": {"optimizer": sgd} for name in ("student", "fake_score")}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        # bf16, which processors with such units take by default, would round by more than that
        settings = {"trainer__max_steps": 2, "trainer__precision": "32-true"}
        write_config(tmp_path / name / "tiny.yaml", tiny_sd, **roles, **settings)
    one = fit(tmp_path / "one" / "tiny.yaml")
    # the module itself allows for unused weights
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.micro_batch_size=1"]
    run_processes(2, lambda: fit(tmp_path / "two" / "tiny.yaml", *options), tmp_path / "log")
    two = next((tmp_path / "two").glob("runs/*/*"))
    first, second = checkpoint(one), checkpoint(two)
    assert first["counters"] == second["counters"] and second["PromptDataModule"] == {"position": 8}
    states = (first["state_dict"], second["state_dict"])
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=2e-5, msg=name)
    start = load_parts(tiny_sd).denoiser.state_dict()
    assert max((states[0][f"student.{n}"] - p).abs().max() for n, p in start.items()) > 1e-3
    rows = [
        [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()] for run in (one, two)
    ]
    assert rows[0][0] == rows[1][0]
    for name, alone, together in zip(rows[0][0], rows[0][-1], rows[1][-1]):
        if name in (
            "train/student_vsd",
            "train/fake_score_denoising",
            "gradient_norm/student",
            "latents/mean",
        ):
            assert float(together) == pytest.approx(float(alone), rel=1e-2), name


# --- a new objective


class Nearest(Objective):
    """Draws the latents to a colour; all that a new method needs is a class like this and a class_path."""

    def __init__(self, colour: float, strength: float = 1.0) -> None:
        super().__init__()
        self.colour, self.strength = colour, strength
        self.own = nn.Parameter(torch.zeros(1))

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        near = self.strength * (sample.x0 - self.colour).square().mean()
        return Terms({"near": near}, {"distance": (sample.x0 - self.colour).abs().mean()})

    def fake_score_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        return Terms({"own": (self.own - sample.x0.mean()).square().sum()})


def test_a_new_objective_needs_a_class_and_a_class_path(tiny_sd: Path, tmp_path: Path) -> None:
    objective = {"class_path": f"{THIS}.Nearest", "init_args": {"colour": 5.0}}
    config = write_config(
        tmp_path / "new.yaml", tiny_sd, model__init_args__objective=objective, trainer__max_steps=3
    )
    run = fit(config)
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    losses = [float(line[lines[0].index("train/student_near")]) for line in lines[1:]]
    assert (
        len(losses) == 3 and losses[2] < losses[1]
    )  # the first update is at learning rate 0, of the warm-up
    assert "objective/distance" in lines[0] and "train/fake_score_own" in lines[0]
    content = checkpoint(run)
    assert content["state_dict"]["objective.own"].abs() > 0
    stored = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["objective"]
    assert stored == {"class_path": f"{THIS}.Nearest", "init_args": {"colour": 5.0, "strength": 1.0}}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--model.init_args.objective.init_args.max_timestep=2000",
            "max_timestep is 2000.*only 1000 timesteps",
        ),
        ("--model.init_args.start_timestep=1000", "start_timestep 1000 is not one of the teacher's"),
        ("--model.fake_score.lora.targets=[to_x]", r"LoRA targets \['to_x'\] match no layer"),
        ("--model.init_args.student.schedule=step", "schedule is 'step'"),
        ("--model.init_args.teacher=missing/model", "missing/model"),
        ("--model.init_args.objective.init_args.prompt_dropout=2", "prompt_dropout is a probability, got 2"),
        ("--model.init_args.max_skipped_updates=0", "max_skipped_updates is 0"),
        ("--trainer.precision=16-true", "trainer.precision is 16-true"),
        ("--trainer.gradient_clip_val=1", "clip_norm of model.init_args.student"),
        ("--trainer.accumulate_grad_batches=2", "data.init_args.micro_batch_size"),
        ("--data.init_args.batch_size=10", "fewer than one batch"),
    ],
)
def test_settings_that_cannot_work_leave_nothing(
    option: str, message: str, tiny_sd: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "tiny.yaml", tiny_sd)
    with pytest.raises(UserError, match=message):
        fit(config, option)
    assert not (tmp_path / "runs").exists()


# --- the whole


def test_a_whole_run(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two steps with every callback; the finished run is completed by `--ckpt_path last`; export reads it."""
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    pictures = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    compute_reference([pictures], PROMPTS, ClipExtractor(tiny_clip), "noise").save(
        tmp_path / "reference.safetensors"
    )
    evaluation = {
        "scoring_clip": str(tiny_clip), "reference": str(tmp_path / "reference.safetensors"), "final_size": 4,
        "batch_size": 4, "teacher_steps": 2, "timing_batch_size": 2,
    }  # fmt: skip
    callbacks = [
        {"class_path": "StartSummary", "init_args": {"timed_updates": 1}},
        {"class_path": "RunCheckpoint", "init_args": {"every_n_steps": 1}},
        {"class_path": "Evaluation", "init_args": evaluation},
        {"class_path": "SampleGrid", "init_args": {"num_images": 2, "teacher_steps": 2}},
        {"class_path": "ScoreViews", "init_args": {"num_images": 2}},
        {"class_path": "RunReport"},
    ]
    config = write_config(
        tmp_path / "tiny.yaml", tiny_sd, trainer__callbacks=callbacks, trainer__limit_val_batches=1.0,
        trainer__val_check_interval=1,
    )  # fmt: skip
    run = fit(config)
    printed = capsys.readouterr().out
    assert (
        "fake score (LoRA adapter)" in printed and "1 process x micro-batch 4 x accumulation 1 = 4" in printed
    )
    assert "per student update: 2 take about" in printed
    last = run / "checkpoints" / "last.ckpt"
    next_command = f'Next: {python_command()} cli.py generate --model {last} --prompt "a red apple"'
    assert printed.splitlines()[-1].startswith(next_command)
    report = json.loads((run / "report.json").read_text())
    assert set(report) == {"experiment", "step", "weights", "model", "metrics", "teacher_metrics", "timing",
                           "environment", "config_path", "command", "commit", "finished", "run",
                           "evaluation_set"}  # fmt: skip
    assert (report["experiment"], report["step"], report["weights"]) == ("tiny", 2, "ema")
    assert set(report["teacher_metrics"]) == {"steps_2", "steps_1"}
    assert {"Prompts", "Evaluation captions"} <= report["run"]["data"].keys()
    assert "- Evaluation captions: 9" in (run / "report.md").read_text()
    for results in (report["metrics"], *report["teacher_metrics"].values()):
        assert set(results) == {"frechet_distance", "clip_score", "milliseconds_per_image"}
        for result in results.values():
            assert set(result) == {"value", "num_images", "details"}
    assert set(report["timing"]) == {
        "seconds_per_step", "seconds_per_step_quartiles", "images_per_second", "peak_memory_gib",
    }  # fmt: skip
    assert (run / "report.md").is_file() and "<html" in (run / "report.html").read_text()
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        f"{stem}{n}.png" for stem in ("score_views_step_", "step_") for n in (0, 1, 2)
    ]
    assert checkpoint(run, "best")["global_step"] in (1, 2)
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/frechet_distance", "val/clip_score", "test/clip_score", "train/student_vsd"} <= set(header)

    (run / "report.json").unlink()
    assert fit(config, "--ckpt_path=last") == run
    again = json.loads((run / "report.json").read_text())
    assert again["metrics"]["clip_score"]["value"] == report["metrics"]["clip_score"]["value"]
    assert again["step"] == 2 and [path.name for path in run.parent.iterdir()] == ["version_0"]

    cli.main(
        ["export", "--checkpoint", str(run / "checkpoints" / "last.ckpt"), "--output", str(tmp_path / "out")]
    )
    assert (tmp_path / "out" / "model_index.json").is_file()
