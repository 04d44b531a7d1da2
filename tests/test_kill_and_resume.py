"""A small version of scripts/kill_and_resume.py: real SIGKILLs in forked processes, on the tiny models."""

import csv
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from scripts import kill_and_resume
from scripts.kill_and_resume import MARKS_FD, Session, check, differences, moments, prepare
from tests.test_configs import ParseOnly
from tests.tiny_distillation import write_config


def start_fork(arguments: list[str], log: Path) -> Session:
    """The command in a fork of this process, which need not import everything again."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        status = 70
        try:
            os.close(reading)
            os.environ[MARKS_FD] = str(writing)
            sys.stdout = sys.stderr = log.open("w")
            cli.main(arguments)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writing)
    return Session(pid, reading, lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def short_config(folder: Path, teacher: Path, clip: Path) -> Path:
    evaluation = {"scoring_clip": str(clip), "reference": None, "final_size": 4, "batch_size": 2,
                  "teacher_rows": False, "timing_batch_size": 2}  # fmt: skip
    checkpoint = {"every_n_steps": 2, "monitor": "val/clip_score", "mode": "max"}
    return write_config(
        folder / "tiny.yaml", teacher, trainer__max_steps=6, trainer__val_check_interval=3,
        trainer__limit_val_batches=1.0, trainer__callbacks=[
            {"class_path": "RunCheckpoint", "init_args": checkpoint},
            {"class_path": "Evaluation", "init_args": evaluation},
            {"class_path": "SampleGrid", "init_args": {"num_images": 1, "teacher_steps": 2}},
            {"class_path": "RunReport"},
        ],
    )  # fmt: skip


class Arguments:
    """What the command line gives."""

    def __init__(self, output: Path, config: Path, kills: int) -> None:
        self.output, self.config, self.kills, self.seed, self.threads = output, [config], kills, 3, 1


def test_a_run_killed_in_every_phase_is_the_uninterrupted_one(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    wanted = [("step", 1, 0.5), ("checkpoint", 2, 0.3), ("evaluation", 3, 0.5)]
    monkeypatch.setattr(kill_and_resume, "moments", lambda *_: wanted)
    config = short_config(tmp_path, tiny_sd, tiny_clip)
    arguments: Any = Arguments(tmp_path / "out", config, len(wanted))
    assert check(arguments, start_fork) == []
    printed = capsys.readouterr().out
    assert "identical" in printed and "DIFFERENT" not in printed and "0 too late" in printed

    # the comparison sees a changed digit, weight and leftover
    run = kill_and_resume.newest_run(tmp_path / "out" / "killed")
    alone = kill_and_resume.newest_run(tmp_path / "out" / "alone")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[4]["train/student_vsd"] += "1"
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    name = next(iter(content["ema"]["shadow"]))
    content["ema"]["shadow"][name].view(-1)[0] += 1e-6
    torch.save(content, run / "checkpoints" / "last.ckpt")
    (run / "checkpoints" / "saving.tmp").touch()
    wrong, _ = kill_and_resume.compare(alone, run)
    assert [line.split(" ")[0] for line in wrong] == ["last.ckpt:", "metrics.csv:", "left"]
    assert f"['ema']['shadow']['{name}']" in wrong[0] and "[4]['train/student_vsd']" in wrong[1]


def test_moments_are_seeded_and_cover_all_phases() -> None:
    chosen = moments(20, 60, 0)
    assert chosen == moments(20, 60, 0) != moments(20, 60, 1)
    phases = [phase for phase, _, _ in chosen]
    assert [phases.count(phase) for phase in kill_and_resume.PHASES] == [10, 5, 5]
    assert [step for _, step, _ in chosen] == sorted(step for _, step, _ in chosen)


def test_differences_are_named() -> None:
    one = {"a": [torch.zeros(2), 1.0], "b": {"c": torch.zeros(2, dtype=torch.float64)}}
    other = {"a": [torch.tensor([0.0, 1e-38]), 1.0], "b": {"c": torch.zeros(2)}}
    assert differences(one, other) == ["['a'][0]", "['b']['c']"]
    assert differences({"a": 1}, {"a": 1, "b": 2}) == ["['b']"]
    assert differences(one, one) == []


def test_the_short_settings_fit_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's callbacks are replaced, those of a given configuration are kept."""
    monkeypatch.setenv(MARKS_FD, "1")
    arguments: Any = Arguments(tmp_path / "out", tmp_path / "own.yaml", 1)
    prepare(arguments)
    assert "callbacks+" in (tmp_path / "out" / "marked.yaml").read_text()
    arguments.output, arguments.config = tmp_path / "short", None
    settings = ParseOnly(["fit", *prepare(arguments)]).settings
    names = [callback.class_path.rpartition(".")[2] for callback in settings.trainer.callbacks]
    assert names == ["RunCheckpoint", "Evaluation", "SampleGrid", "RunReport", "PhaseMarks"]
    assert settings.trainer.precision == "32-true" and settings.data.init_args.batch_size == 4
    assert settings.trainer.max_steps == 60
