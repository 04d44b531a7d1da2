"""Runs the trials of a sweep: keeps so many at once, watches their metric, records how they end."""

from __future__ import annotations

import difflib
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from commands.sweeping.settings import SweepSettings
from commands.sweeping.study import TrialBook
from commands.sweeping.trial_process import (
    TrialProcess,
    environment,
    fit_command,
    logged_names,
    threads_per_worker,
)
from common.errors import UserError
from reports.text import short_names

if TYPE_CHECKING:
    from optuna.trial import Trial

_BEAT = 20.0  # seconds between signs of life


@dataclass
class _Running:
    trial: Trial
    process: TrialProcess
    last_beat: float = field(default_factory=time.monotonic)
    stop_at: float = math.inf
    """When it is killed, if it was asked to stop."""


@dataclass
class Driver:
    """Works through a sweep together with every other driver of the same storage.

    Attributes:
        settings: the sweep.
        book: its trials.
        workers: trials at once.
        on_change: called whenever a trial has ended.
        command: the words that start a trial, before the options.
        gpus: names of the GPUs that workers share.
        poll: seconds between looks at the running trials.
        grace: seconds a trial gets to end gracefully before it is killed.
    """

    settings: SweepSettings
    book: TrialBook
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
            UserError: the metric is in no run, or trials cannot be started; others that run are stopped.
            KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM; the running trials are stopped and will be
                run again when the sweep goes on.
        """
        with self._progress() as bar, _stop_signals() as leave_if_asked:
            try:
                while True:
                    self._recover()
                    leave_if_asked()
                    self._fill()
                    for worker in list(self._running):
                        self._watch(worker)
                    self._show(bar)
                    if not self._running and self.book.is_over():
                        return
                    leave_if_asked()
                    time.sleep(self.poll)
            except BaseException:
                self._stop_all()
                raise

    def _progress(self) -> Any:
        return tqdm(total=self.settings.trials, desc=self.settings.name, unit="trial", dynamic_ncols=True)

    def _show(self, bar: Any) -> None:
        ended = [trial for trial in self.book.live().values() if trial.state.is_finished()]
        values = [
            trial.value for trial in ended if trial.state.name == "COMPLETE" and trial.value is not None
        ]
        best = (min if self.settings.minimize else max)(values, default=None)
        if bar.n != len(ended):
            bar.n = len(ended)
            bar.set_postfix_str(f"best {best:.6g}" if best is not None else "")

    def _recover(self) -> None:
        for slot in self.book.recover():
            tqdm.write(f"trial {slot}: its driver is gone; it is run again")

    def _fill(self) -> None:
        for worker in range(self.workers):
            if worker in self._running:
                continue
            trial = self.book.claim()
            if trial is None:
                return
            self._start(worker, trial)

    def _start(self, worker: int, trial: Trial) -> None:
        facts = trial.user_attrs
        slot, attempt = facts["slot"], facts["attempt"]
        name = f"trial_{slot:03d}" + (f"_again_{attempt}" if attempt else "")
        words = [*self.settings.launcher, *self.command, *self.settings.options(trial.params)]
        env = environment(self.workers, worker, self.gpus)
        try:
            process = TrialProcess.start(words, self.settings.folder, name, self.settings.metric, env)
        except OSError as error:
            self.book.give_up(trial)
            raise UserError(f"cannot start a trial by {words[0]!r}: {error}") from error
        except BaseException:
            self.book.give_up(trial)
            raise
        self._running[worker] = _Running(trial, process)
        for key, fact in {
            "folder": str(process.folder), "host": socket.gethostname(),
            "threads": threads_per_worker(self.workers),
        }.items():  # fmt: skip
            trial.set_user_attr(key, fact)

    def _watch(self, worker: int) -> None:
        running = self._running[worker]
        if running.process.status() is not None:
            del self._running[worker]
            self._finish(running)
            self.on_change()
            return
        now = time.monotonic()
        if now > running.stop_at:
            running.process.kill()
        elif now - running.last_beat > _BEAT:
            running.last_beat = now
            if not self.book.beat(running.trial):  # given up by another driver, who runs it again
                running.process.kill()
        elif self._report(running) and not running.process.stopping:
            running.process.stop()
            running.stop_at = now + self.grace

    def _report(self, running: _Running) -> bool:
        """Tell Optuna the new values; whether the trial should stop."""
        pruned = False
        for step, value in running.process.new_values():
            if self.book.report(running.trial, step, value) and self.settings.pruning is not None:
                pruned = pruned or running.trial.should_prune()
        return pruned

    def _finish(self, running: _Running) -> None:
        trial, process = running.trial, running.process
        status = process.status()
        self._report(running)
        values = process.values()
        facts: dict[str, Any] = {"seconds": process.seconds}
        last = max(values, default=None)
        state, value, missing = "COMPLETE", None, None
        if process.stopping:
            state = "PRUNED"
        elif status != 0:
            state, facts["error"] = "FAIL", process.error()
        elif last is None:
            state, missing = "FAIL", self._missing(process)
            facts["error"] = missing
        elif not math.isfinite(values[last]):
            state, facts["error"] = "FAIL", f"{self.settings.metric} is {values[last]} at step {last}"
        else:
            value = values[last]
        if last is not None:
            facts["step"] = last
        if not self.book.tell(trial, state, value, **facts):
            tqdm.write(f"trial {trial.user_attrs['slot']}: another driver had taken it over; result dropped")
            return
        tqdm.write(_line(trial, state, value if value is not None else values.get(last or 0), facts))
        if missing and not any(t.intermediate_values for t in self.book.trials()):
            raise UserError(missing)

    def _missing(self, process: TrialProcess) -> str:
        names = logged_names(process.folder / "metrics.csv")
        metric = self.settings.metric
        close = difflib.get_close_matches(metric, names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return (
            f"the metric {metric!r} never appeared in {process.folder / 'metrics.csv'}; {hint}"
            f"It holds {', '.join(names) or 'nothing'}. Does a validation come before the last step? "
            f"Change metric (or the config) in {self.settings.path} and remove {self.settings.folder}, or "
            "give the sweep another name"
        )

    def _stop_all(self) -> None:
        """Stop what runs, all at the same time; the trials are free to be run again."""
        running, self._running = list(self._running.values()), {}
        deadline = time.monotonic() + self.grace
        if running:
            many = f"{len(running)} running trial{'s' if len(running) > 1 else ''}"
            tqdm.write(f"stopping {many}; the same command goes on with the sweep")
        for one in running:
            one.process.stop()
        try:
            for one in running:
                one.process.stop_and_wait(max(0.0, deadline - time.monotonic()))
        except BaseException:  # a second Ctrl-C: at once
            for one in running:
                one.process.kill()
            raise
        finally:
            for one in running:
                self.book.give_up(one.trial)


def _line(trial: Trial, state: str, value: float | None, facts: dict[str, Any]) -> str:
    """What is printed of a trial that has ended."""
    params = dict(sorted(trial.params.items()))
    names = short_names(list(params))
    point = ", ".join(f"{names[key]} {_short(value)}" for key, value in params.items())
    outcome = {"COMPLETE": "", "PRUNED": "pruned at ", "FAIL": "failed"}[state]
    if state != "FAIL" and value is not None:
        outcome += f"{value:.6g}"
    elif state == "FAIL":
        outcome += f": {str(facts['error']).splitlines()[-1]}"
    return f"trial {trial.user_attrs['slot']} ({point}): {outcome}, {facts['seconds']:.0f} s"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM, by which clusters end a job, wait for the storage to be at rest, the first time.

    Yields:
        What leaves if one has come: KeyboardInterrupt, or SystemExit with status 143.
    """
    seen: list[int] = []

    def leave_if_asked() -> None:
        if seen:
            raise KeyboardInterrupt if seen[0] == signal.SIGINT else SystemExit(128 + signal.SIGTERM)

    def note(number: int, _: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            leave_if_asked()

    if threading.current_thread() is not threading.main_thread():
        yield leave_if_asked
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield leave_if_asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
