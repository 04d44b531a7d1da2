"""Runs the trials of a sweep: keeps so many at once, watches their metric, records how they end."""

from __future__ import annotations

import difflib
import math
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from commands.sweeping.study import SweepStudy
from commands.sweeping.trial_process import (
    TrialProcess,
    environment,
    fit_command,
    logged_names,
    threads_per_worker,
)
from common.errors import UserError
from reports.text import format_value, short_names

_BEAT = 20.0  # seconds between signs of life


@dataclass
class _Running:
    trial: Trial
    process: TrialProcess
    last_beat: float = -math.inf
    stop_at: float = math.inf
    """When it is killed, if it was asked to stop."""


@dataclass
class Driver:
    """Works through a sweep, together with every other driver of the same database.

    Attributes:
        study: the sweep's trials.
        workers: trials at once.
        on_change: called whenever a trial has ended.
        command: the words that start a trial, before the options.
        gpus: names of the GPUs that workers share.
        poll: seconds between looks at the running trials.
        grace: seconds a trial gets to end gracefully before it is killed.
    """

    study: SweepStudy
    workers: int = 1
    on_change: Callable[[], object] = lambda: None
    command: Sequence[str] = field(default_factory=fit_command)
    gpus: Sequence[str] = ()
    poll: float = 0.5
    grace: float = 120.0
    _running: dict[int, _Running] = field(default_factory=dict)

    def run(self) -> None:
        """Return when every trial of the sweep has ended, here or elsewhere.

        Raises:
            UserError: the metric is in no run, trials cannot be started, or another driver works on the same
                file; those that run are stopped.
            KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM; the running trials are stopped and will be
                run again when the sweep goes on.
        """
        with self.study.joined(), _noted_signals() as signals:
            try:
                while not signals:
                    for number in self.study.recover():
                        print(f"trial {number}: its driver is gone; it is run again", flush=True)
                    self._fill()
                    for worker in list(self._running):
                        self._watch(worker)
                    if not self._running and self.study.is_over():
                        return
                    time.sleep(self.poll)
            finally:
                self._stop_all(signals)
        raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])

    def _fill(self) -> None:
        for worker in range(self.workers):
            if worker not in self._running:
                trial = self.study.claim()
                if trial is None:
                    return
                self._start(worker, trial)

    def _start(self, worker: int, trial: Trial) -> None:
        settings, facts = self.study.settings, trial.user_attrs
        again = f"_again_{facts['again']}" if "again" in facts else ""
        name = f"trial_{facts.get('first', trial.number):03d}{again}"
        words = [*settings.launcher, *self.command, *settings.options(trial.params)]
        env = environment(self.workers, worker, self.gpus)
        try:
            process = TrialProcess.start(words, settings.folder, name, settings.metric, env)
        except BaseException as error:
            self.study.give_up(trial.number)
            if isinstance(error, OSError):
                raise UserError(f"cannot start a trial by {words[0]!r}: {error}") from error
            raise
        self._running[worker] = _Running(trial, process)
        trial.set_user_attr("folder", str(process.folder))
        trial.set_user_attr("host", socket.gethostname())
        trial.set_user_attr("threads", threads_per_worker(self.workers))

    def _watch(self, worker: int) -> None:
        running = self._running[worker]
        ended = running.process.status() is not None  # before its last values are read
        try:
            self._look_at(running, ended)
            if not ended:
                return
            del self._running[worker]
            self._finish(running)
        except UpdateFinishedTrialError:
            self._running.pop(worker, None)
            running.process.kill()
            print(f"trial {running.trial.number}: another driver has taken it over", flush=True)
        self.on_change()

    def _look_at(self, running: _Running, ended: bool) -> None:
        """Tell Optuna the new values, and stop a trial that it prunes or that is overdue."""
        now, process = time.monotonic(), running.process
        if now - running.last_beat > _BEAT:
            running.last_beat = now
            running.trial.set_user_attr("beat", time.time())
        for step, value in process.new_values():
            running.trial.report(value, step)
            if not process.stopping and not ended and running.trial.should_prune():
                process.stop()
                running.stop_at = now + self.grace
        if now > running.stop_at:
            process.kill()

    def _finish(self, running: _Running) -> None:
        trial, process, metric = running.trial, running.process, self.study.settings.metric
        values = process.values()
        last = max(values, default=None)
        facts: dict[str, Any] = {"seconds": process.seconds, "step": last}
        value, missing = values.get(last) if last is not None else None, None
        state = "COMPLETE"
        if process.stopping:
            state = "PRUNED"
        elif process.status() != 0:
            facts["error"] = process.error()
        elif value is None:
            facts["error"] = missing = self._missing(process)
        elif not math.isfinite(value):
            facts["error"] = f"{metric} is {value} at step {last}"
        if "error" in facts:
            state = "FAIL"
        self.study.tell(trial, state, value if state == "COMPLETE" else None, **facts)
        print(self._line(trial, state, value, facts), flush=True)
        if missing and not any(other.intermediate_values for other in self.study.live()):
            raise UserError(missing)

    def _missing(self, process: TrialProcess) -> str:
        names = logged_names(process.folder / "metrics.csv")
        settings = self.study.settings
        close = difflib.get_close_matches(settings.metric, names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return (
            f"the metric {settings.metric!r} never appeared in {process.folder / 'metrics.csv'}; {hint}"
            f"It holds {', '.join(names) or 'nothing'}. Does a validation come before the last step? "
            f"Change metric (or the config) in {settings.path} and remove {settings.folder}, or "
            "give the sweep another name"
        )

    def _line(self, trial: Trial, state: str, value: float | None, facts: dict[str, Any]) -> str:
        """What is printed of a trial that has ended."""
        names = short_names(list(self.study.settings.space))
        point = ", ".join(
            f"{names[key]} {format_value(one) if isinstance(one, float) else one}"
            for key, one in sorted(trial.params.items())
        )
        outcome = {"COMPLETE": "", "PRUNED": "pruned at ", "FAIL": "failed: "}[state]
        outcome += str(facts["error"]).splitlines()[-1] if state == "FAIL" else f"{value:.6g}"
        done = sum(other.state.is_finished() for other in self.study.live())
        return (
            f"[{done}/{self.study.settings.trials}] trial {trial.number} ({point}): {outcome}, "
            f"{facts['seconds']:.0f} s"
        )

    def _stop_all(self, signals: list[int]) -> None:
        """Stop what runs, all at the same time, at once if Ctrl-C comes twice; they will be run again."""
        running, self._running = list(self._running.values()), {}
        deadline = time.monotonic() + self.grace
        if running:
            print(f"stopping {len(running)} trials; the same command goes on with the sweep", flush=True)
        for one in running:
            one.process.stop()
        while any(one.process.status() is None for one in running):
            if time.monotonic() > deadline or len(signals) > 1:
                break
            time.sleep(self.poll)
        for one in running:
            if one.process.status() is None:
                one.process.kill()
            self.study.give_up(one.trial.number)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM, by which clusters end a job, instead of breaking off what is being written."""
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda one, _: seen.append(one)) for number in numbers]
    try:
        yield seen
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
