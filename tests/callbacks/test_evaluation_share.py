"""What share of the time validations take, by a clock of the test, to the second."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks import evaluation_share
from callbacks.evaluation_share import EvaluationShare

EVERY = 2


class Run:
    """What a trainer calls, with the times that steps and validations take."""

    def __init__(self, bound: EvaluationShare, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bound, self.now, self.logged = bound, 1000.0, list[float]()
        monkeypatch.setattr(evaluation_share.time, "perf_counter", lambda: self.now)
        self.trainer: Any = SimpleNamespace(
            val_check_batch=EVERY, global_step=0, state=SimpleNamespace(fn="fit"), fast_dev_run=False,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=-1)),
            loggers=[SimpleNamespace(log_metrics=self.log)],
        )  # fmt: skip
        self.module: Any = SimpleNamespace(student_steps=0)
        bound.on_train_start(self.trainer, self.module)

    def log(self, metrics: dict[str, float], step: int) -> None:
        assert step == self.module.student_steps
        self.logged.append(metrics["throughput/evaluation_share"])

    def step(self, seconds: float) -> bool:
        """Train for a step; whether a validation follows."""
        self.trainer.fit_loop.epoch_loop.total_batch_idx += 1
        self.bound.on_train_batch_start(self.trainer, self.module)
        self.now += seconds
        self.trainer.global_step += 1
        self.module.student_steps += 1
        self.bound.on_train_batch_end(self.trainer, self.module)
        return self.trainer.global_step % self.trainer.val_check_batch == 0

    def validate(self, seconds: float) -> None:
        self.bound.on_validation_start(self.trainer, self.module)
        self.now += seconds
        self.bound.on_validation_end(self.trainer, self.module)


def test_a_validation_waits_while_it_would_take_too_much(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one to come counts as long as the last one; exactly the bound is allowed."""
    run = Run(bound := EvaluationShare(0.25), monkeypatch)
    assert bound.share is None and not run.step(5) and run.step(5)  # the first one is not bounded
    run.validate(4)
    assert (bound.evaluating, bound.last, bound.total) == (4, 4, 14)
    assert run.logged == [4 / 14] and bound.share == 4 / 14
    assert not run.step(5) and bound.waited == -1  # none is due
    assert not run.step(5)  # 4 of 24 s so far, and with it 8 of 28
    assert bound.waited == 4 and run.trainer.val_check_batch == sys.maxsize
    assert "The validation of step 4 is left out" in (said := capsys.readouterr().out)
    assert "would take 28.6% of the time so far" in said
    assert not run.step(2) and run.trainer.val_check_batch == EVERY
    assert run.step(2)  # 8 of 32 s
    run.validate(6)
    assert (bound.evaluating, bound.last, bound.total) == (10, 6, 34)
    assert run.logged == [4 / 14, 10 / 34] and bound.share == 10 / 34
    assert "Validation of step 6: 6 s; 29.4% of the time so far" in capsys.readouterr().out


def test_the_evaluation_at_the_end_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it lasts, for the report that it writes, and after."""
    run = Run(bound := EvaluationShare(None), monkeypatch)
    run.step(5)
    run.step(5)
    run.validate(4)
    run.now += 6
    bound.on_train_end(run.trainer, run.module)
    assert bound.share == 4 / 20
    run.now += 10
    assert bound.share == 14 / 30
    bound.on_fit_end(run.trainer, run.module)
    assert (bound.evaluating, bound.total, bound.share) == (14, 30, 14 / 30)
    assert "Evaluation at the end: 10 s; all evaluations: 46.7% of the run's time" in capsys.readouterr().out


def test_a_run_that_continues_does_not_make_up_for_a_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = EvaluationShare(0.25)
    bound.load_state_dict({"total": 24.0, "evaluating": 4.0, "last": 4.0, "waited": 0})
    run = Run(bound, monkeypatch)
    assert run.trainer.val_check_batch == sys.maxsize
    assert not run.step(2) and run.trainer.val_check_batch == EVERY
    assert run.step(2) and bound.total == 28  # with it 8 of 32 s
