"""Runs that are asked to stop: by signals, by SLURM, by a time limit; and validations that were cut off."""

import csv
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoint import RunCheckpoint
from callbacks.loggers import MetricsCSV, StepAxis
from callbacks.run_folder import RunFolder
from callbacks.time_limit import TimeLimit, parse_limit
from common.errors import UserError
from tests.tiny_run import TinyData, TinyModule


class Watched(TinyModule):
    """Notes when it validates, and does what a test asks for in a validation."""

    validated: list[int] = []
    in_validation: Callable[[int, int], None] | None = None

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(self.trainer.global_step)
        if (act := type(self).in_validation) is not None:
            act(self.trainer.global_step, batch_idx)
        super().validation_step(batch, batch_idx)


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Watched, "validated", [])
    monkeypatch.setattr(Watched, "in_validation", None)
    yield
    TinyModule.at_step = None


def train(folder: Path, steps: int, *callbacks: Callback, every: int = 2, **kwargs: Any) -> None:
    """A run that validates every third step; goes on from last.ckpt if there is one."""
    last = folder / "checkpoints" / "last.ckpt"
    resume = torch.load(last, weights_only=True)["global_step"] if last.exists() else None
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=MetricsCSV(folder, resume),
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[RunFolder(folder), *callbacks, StepAxis(), RunCheckpoint(every)],
        val_check_interval=3, check_val_every_n_epoch=None, **kwargs,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(Watched(), TinyData(), ckpt_path=str(last) if resume is not None else None)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for name in ("last", "best"):
        first, second = (
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (one, other)
        )
        assert first["global_step"] == second["global_step"], name
        assert all(
            torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items()
        )


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the project may act on it."""


def kill(folder: Path, monkeypatch: pytest.MonkeyPatch, arrange: Callable[[], None], steps: int) -> None:
    """Run until something raises Killed, with all that the project does on exceptions switched off."""
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "on_exception", lambda *_: None)
        patch.setattr(MetricsCSV, "finalize", lambda *_: None)
        arrange()
        with pytest.raises(Killed):
            train(folder, steps)
    TinyModule.at_step = None
    Watched.in_validation = None


def die(*_: Any) -> None:
    raise Killed


@pytest.mark.parametrize(
    "moment", ["after the checkpoint", "in a validation", "after a validation", "in the last one"]
)
def test_a_killed_run_is_the_uninterrupted_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of metrics.csv, too: Lightning hands on a step's values after its checkpoint."""
    steps, every = 9, 3 if "validation" in moment else 2
    monkeypatch.setattr(
        RunCheckpoint.__init__, "__defaults__", (every, *RunCheckpoint.__init__.__defaults__[1:])
    )
    monkeypatch.setattr(train, "__kwdefaults__", {"every": every})
    train(tmp_path / "whole", steps)

    def arrange() -> None:
        if moment == "after the checkpoint":
            TinyModule.at_step = (5, die)
        elif moment == "in a validation":
            Watched.in_validation = lambda step, batch: die() if (step, batch) == (6, 1) else None
        elif moment == "after a validation":
            TinyModule.at_step = (7, die)
        else:
            Watched.in_validation = lambda step, batch: die() if (step, batch) == (9, 1) else None

    kill(tmp_path / "killed", monkeypatch, arrange, steps)
    Watched.validated.clear()
    train(tmp_path / "killed", steps)
    expected = {"after the checkpoint": [6, 9], "in a validation": [6, 9], "after a validation": [9],
                "in the last one": [9]}  # fmt: skip
    assert Watched.validated == expected[moment]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("place", ["step", "validation"])
def test_sigterm_loses_no_row_and_no_validation(place: str, tmp_path: Path) -> None:
    train(tmp_path / "whole", 6)
    before = signal.getsignal(signal.SIGTERM)
    send = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    if place == "step":
        TinyModule.at_step = (3, send)
    else:
        Watched.in_validation = lambda step, batch: send() if batch == 0 else None
    with pytest.raises(SIGTERMException):
        train(tmp_path / "stopped", 6)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["step"] for row in rows(tmp_path / "stopped")] == ["1", "2", "3"], "no row is lost"
    TinyModule.at_step = Watched.in_validation = None
    train(tmp_path / "stopped", 6)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> SLURMEnvironment:
    """The environment of a job's only process, and a scontrol that writes down what it is asked."""
    job = {"JOB_ID": "4711", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    script = folder / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder / "asked"}\necho no such job >&2\nexit {status}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return SLURMEnvironment(requeue_signal=signal.SIGUSR2)


@pytest.mark.parametrize(("array", "job"), [(None, "4711"), ("40", "40_7")])
def test_slurm_gets_the_job_back_after_the_step_is_saved(
    array: str | None, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = slurm(tmp_path, monkeypatch)
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    TinyModule.at_step = (3, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    with pytest.raises(SIGTERMException):
        train(tmp_path / "run", 6, plugins=[environment])
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
    run = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert run["global_step"] == 3
    assert not list((tmp_path / "run").glob("hpc_ckpt*")), "Lightning's own checkpoint would be in the way"


def test_a_refused_requeue_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = slurm(tmp_path, monkeypatch, status=1)
    TinyModule.at_step = (1, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    with (
        pytest.warns(UserWarning, match="requeue 4711 failed .no such job."),
        pytest.raises(SIGTERMException),
    ):
        train(tmp_path / "run", 6, plugins=[environment])


def test_a_time_limit_saves_and_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "whole", 6)
    limit = TimeLimit("00:00:05")
    TinyModule.at_step = (3, lambda: setattr(limit, "started", limit.started - 5))
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "limited", 6, limit)
    assert stopped.value.code == 75
    assert (
        "time limit is reached: stopped after step 3; --ckpt_path last continues from step 3" in caplog.text
    )
    TinyModule.at_step = None
    train(tmp_path / "limited", 6, TimeLimit("1-00:00:00"))
    assert_same_run(tmp_path / "limited", tmp_path / "whole")


def test_forms_of_a_time_limit() -> None:
    assert parse_limit("01:02:03") == 3723 and parse_limit("2-01:00:00") == 49 * 3600
    assert parse_limit(3723) == 3723, "what YAML makes of an unquoted 1:02:03"
    for wrong in ("1:60:00", "90", "00:00:00", "", -1):
        with pytest.raises(UserError, match="HH:MM:SS"):
            parse_limit(wrong)


def test_a_time_limit_needs_somebody_who_saves(tmp_path: Path) -> None:
    trainer = Trainer(
        callbacks=[TimeLimit("01:00:00")], enable_checkpointing=False, logger=False, max_steps=1
    )
    with pytest.raises(UserError, match="needs RunCheckpoint"):
        trainer.fit(TinyModule(), TinyData())
