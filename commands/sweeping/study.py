"""The trials of a sweep in Optuna's storage.

A sweep of N trials has N points, all different. An entry of the storage counts unless it is void (its point
stands in an earlier entry, or N earlier ones count) or replaced (its driver is gone, and another entry with
the same point waits in its place). Every driver asks Optuna for a trial first and then looks whether it
counts, so there are exactly N whoever asks at the same time and whatever is killed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import optuna
from filelock import FileLock, Timeout
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from commands.sweeping.settings import SweepSettings
from common.errors import UserError, first_line

_MOST_DRAWS = 20
"""Points that the sampler may repeat before chance, or what is left of a small space, takes its place."""
_MOST_LISTED = 10_000
PATIENCE = 180.0
"""Seconds without a sign of life after which a trial of another driver counts as lost."""


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two points are one; numbers that differ by rounding alone (0.3 and 0.1 + 0.2) are equal."""
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    return bool(a == b)


class SweepStudy:
    """Hands out the trials of a sweep, finds lost ones, records how they end.

    Raises:
        UserError: the storage cannot be opened, or holds a study of other settings under this name.
    """

    def __init__(self, settings: SweepSettings) -> None:
        self.settings, self.sampler = settings, cast(BaseSampler, settings.sampler)
        self.address = settings.storage or str(settings.folder / "study.journal")
        self.is_database = "://" in self.address
        self._mine: set[int] = set()
        self._seen: dict[int, tuple[Any, float]] = {}
        try:
            self.study = optuna.create_study(
                storage=_open(self.address), study_name=settings.name, direction=settings.direction,
                sampler=self.sampler, pruner=settings.pruner, load_if_exists=True,
            )  # fmt: skip
        except Exception as error:  # each database driver raises its own types
            raise UserError(
                f"{settings.path}: cannot open the storage {self.address}: {first_line(error)}; "
                "mend that, or give another --storage"
            ) from error
        # samplers of finite spaces stop `optimize` when all is tried; here trials are counted
        setattr(self.study, "stop", lambda: None)  # noqa: B010
        self._check_identity()

    def _check_identity(self) -> None:
        identity, before = self.settings.identity(), self.study.user_attrs.get("identity")
        if before is None:
            self.study.set_user_attr("identity", identity)
        elif differing := [key for key in identity if identity[key] != before.get(key)]:
            raise UserError(
                f"{self.settings.path}: the sweep {self.settings.name!r} was begun with another "
                f"{', '.join(differing)}, so its trials can't be compared with new ones; give this one "
                f"another name, or remove {self.settings.storage or self.settings.folder}"
            )

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be a driver of this sweep; the only one, if its storage is a file.

        Raises:
            UserError: another driver works on the same file.
        """
        lock = FileLock(f"{self.address}.driver")
        if not self.is_database:
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(
                    f"another process works on the sweep {self.settings.name!r}; --workers runs several "
                    "trials at once, and several machines need a database (--storage)"
                ) from error
        if self.study.get_trials(deepcopy=False):
            self.sampler.reseed_rng()  # the numbers of its seed are those of the trials before
        try:
            yield
        finally:
            lock.release()

    def live(self) -> list[FrozenTrial]:
        """The entries that count, in their order."""
        trials = self.study.get_trials(deepcopy=False)
        replaced = {trial.user_attrs.get("replaces") for trial in trials}
        ended = (TrialState.COMPLETE, TrialState.PRUNED)  # also one that was thought to be lost
        return [
            trial for trial in trials
            if trial.state in ended
            or not (trial.user_attrs.get("void") or trial.number in replaced)
            and (trial.state != TrialState.FAIL or self._is_drawn(trial))
        ]  # fmt: skip

    def replaced(self) -> int:
        """How many were lost and run again."""
        return sum("replaces" in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))

    def _is_drawn(self, trial: FrozenTrial) -> bool:
        return trial.params.keys() == self.settings.space.keys()

    def _is_being_drawn(self, trial: FrozenTrial) -> bool:
        """Whether its driver has not got all values yet; they come one by one."""
        return trial.state == TrialState.RUNNING and not self._is_drawn(trial)

    def is_over(self) -> bool:
        """Whether every trial has ended."""
        live = self.live()
        return len(live) >= self.settings.trials and all(trial.state.is_finished() for trial in live)

    def claim(self) -> Trial | None:
        """A trial to run now; None if all are taken, or another driver is just taking one.

        Raises:
            UserError: the sampler cannot draw from the space.
        """
        for draws in itertools.count():
            live = self.live()
            waiting = any(trial.state == TrialState.WAITING for trial in live)
            if not (waiting or len(live) < self.settings.trials) or any(map(self._is_being_drawn, live)):
                return None
            self.study.sampler = self._sampler(draws)
            try:
                trial = self.study.ask(self.settings.space)
            except (ValueError, ImportError) as error:
                raise UserError(
                    f"{self.settings.path}: the sampler cannot draw from this space: {first_line(error)}; "
                    "change the space, or the sampler"
                ) from error
            earlier = [other for other in self.live() if other.number < trial.number]
            taken = any(self._is_being_drawn(o) or same(o.params, trial.params) for o in earlier)
            if not taken and len(earlier) < self.settings.trials:
                self._mine.add(trial.number)
                return trial
            trial.set_user_attr("void", True)
            self.study.tell(trial, state=TrialState.FAIL)
        raise AssertionError("counting has no end")

    def _sampler(self, draws: int) -> BaseSampler:
        """The sweep's own, or, if that repeats itself, one that finds what has not been tried."""
        if draws < _MOST_DRAWS:
            return self.sampler
        seed = len(self.study.get_trials(deepcopy=False))
        if self.settings.size() > _MOST_LISTED:
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.BruteForceSampler(seed=seed)

    def tell(self, trial: Trial, state: str, value: float | None = None, **facts: Any) -> None:
        """Record how a trial ended.

        Args:
            trial: one from `claim`.
            state: "COMPLETE", "PRUNED" or "FAIL".
            value: of a complete trial.
            facts: what is known of it, such as ``error``; plain values.

        Raises:
            UpdateFinishedTrialError: another driver has given the trial up.
        """
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        self.study.tell(trial, value, state=TrialState[state], skip_if_finished=True)

    def give_up(self, number: int) -> None:
        """Put an entry with the same point in the place of one that is not run any more."""
        trial = self.study.get_trials(deepcopy=False)[number]
        if self._is_drawn(trial):
            facts = trial.user_attrs
            attributes = {
                "replaces": number, "first": facts.get("first", number), "again": facts.get("again", 0) + 1
            }  # fmt: skip
            self.study.add_trial(create_trial(
                state=TrialState.WAITING, params=trial.params, distributions=trial.distributions,
                user_attrs=attributes, system_attrs=trial.system_attrs,
            ))  # fmt: skip
        # second, so that no point is lost if this process is killed in between
        self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def recover(self) -> list[int]:
        """Give up the trials of drivers that are gone; returns their numbers."""
        now, lost = time.monotonic(), []
        for trial in self.live():
            if trial.state != TrialState.RUNNING or trial.number in self._mine:
                continue
            # clocks of machines differ: lost if no sign of life comes while we watch
            sign = trial.user_attrs.get("beat")
            if trial.number not in self._seen or self._seen[trial.number][0] != sign:
                self._seen[trial.number] = (sign, now)
            if now - self._seen[trial.number][1] >= (PATIENCE if self.is_database else 0):
                self.give_up(trial.number)
                lost.append(trial.number)
        return lost


def _open(address: str) -> BaseStorage:
    if "://" not in address:
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        # a driver killed while it was writing leaves its lock; the next one waits so many seconds for it
        lock = JournalFileSymlinkLock(address, grace_period=10)
        return JournalStorage(JournalFileBackend(address, lock))
    if not address.startswith("sqlite"):
        return RDBStorage(address)
    from sqlalchemy import event

    # Python's sqlite3 begins a transaction at its first write only, so that two drivers may read the same
    # state and both act on it; with this, whoever begins first is alone until it has written.
    storage = RDBStorage(address, engine_kwargs={"connect_args": {"timeout": 60, "isolation_level": None}})
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage
