"""The trials of a sweep in Optuna's storage, shared by any number of drivers on any number of machines.

A sweep of N trials has N slots. A driver writes down a point for a free slot (`enqueue_trial`, one atomic
entry), then asks for it. Two drivers may plan the same slot at once: the entry with the lower number counts,
the other is void. So there are exactly N trials whatever happens, no two with the same point, and a driver
that is killed leaves a trial that is seen to be lost and planned anew with the same point.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from commands.sweeping.settings import SweepSettings
from commands.sweeping.space import Point, same
from commands.sweeping.storage import import_optuna, is_alive, open_storage, this_process
from common.errors import UserError

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

_MOST_DRAWS = 30
_MOST_LISTED = 10_000
"""Points of a space that are listed to find a free one; of more, they are drawn."""
PATIENCE = 180.0
"""Seconds without a sign of life after which a trial of another machine counts as lost."""


def slot_of(trial: FrozenTrial) -> int | None:
    """The slot of a trial; None for one that does not count (void, lost)."""
    given_up = trial.user_attrs.get("void") or trial.user_attrs.get("lost")
    if given_up and trial.state.name not in ("COMPLETE", "PRUNED"):  # ended well after all: it counts
        return None
    slot = trial.user_attrs.get("slot")
    return int(slot) if slot is not None else None


def point_of(trial: FrozenTrial) -> Point:
    """The values of a trial, also of one that is still waiting."""
    return dict(trial.system_attrs.get("fixed_params") or trial.params)


@dataclass
class TrialBook:
    """Plans trials, hands them out and finds lost ones."""

    settings: SweepSettings
    study: Study
    me: str = field(default_factory=this_process)
    _seen: dict[int, tuple[Any, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, settings: SweepSettings) -> TrialBook:
        """Join the study of the settings' name, or begin it.

        Raises:
            UserError: the storage cannot be opened, or holds a study of other settings under this name.
        """
        optuna = import_optuna()
        storage = open_storage(settings)
        pruner: Any = optuna.pruners.NopPruner()
        if settings.pruning is not None:
            pruner = optuna.pruners.MedianPruner(
                n_startup_trials=settings.pruning.finished_trials,
                n_warmup_steps=settings.pruning.warmup_steps,
            )
        study = optuna.create_study(
            storage=storage, study_name=settings.name, direction=settings.direction, pruner=pruner,
            sampler=optuna.samplers.RandomSampler(), load_if_exists=True,
        )  # fmt: skip
        identity = settings.identity()
        before = study.user_attrs.get("identity")
        if before is None:
            study.set_user_attr("identity", identity)
        elif differing := [key for key in identity if identity[key] != before.get(key)]:
            raise UserError(
                f"{settings.path}: the sweep {settings.name!r} was begun with another "
                f"{', '.join(differing)}, so its trials can't be compared with new ones; give this one "
                f"another name, or remove {settings.storage or settings.folder}"
            )
        return cls(settings, study)

    def trials(self) -> list[FrozenTrial]:
        """All entries, also void and lost ones."""
        return self.study.get_trials(deepcopy=False)

    def live(self) -> dict[int, FrozenTrial]:
        """Slot to the trial that counts there: the one with the lowest number."""
        found: dict[int, FrozenTrial] = {}
        for trial in self.trials():
            if (slot := slot_of(trial)) is not None:
                found.setdefault(slot, trial)
        return found

    def is_over(self) -> bool:
        """Whether every slot has a finished trial."""
        live = self.live()
        return all(slot in live and live[slot].state.is_finished() for slot in range(self.settings.trials))

    def claim(self) -> Trial | None:
        """A trial to run now; None if all slots are taken."""
        while True:
            live = self.live()
            free = [slot for slot in range(self.settings.trials) if slot not in live]
            waiting = any(trial.state.name == "WAITING" for trial in live.values())
            if not free and not waiting:
                return None
            if not waiting:
                self._plan(free[0], live)
            trial = self.study.ask(self.settings.space.distributions())
            if self._take(trial):
                return trial

    def _take(self, trial: Trial) -> bool:
        """Make a trial that was asked for this driver's own; False, and it is void, if it does not count."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            trial.set_user_attr("owner", self.me)
            if self._counts(trial):
                trial.set_user_attr("attempt", self._attempts_before(trial))
                return True
            trial.set_user_attr("void", True)
        except UpdateFinishedTrialError:
            return False  # its planner is gone, and another driver gave it up before it was known to be ours
        self.tell(trial, "FAIL")
        return False

    def _plan(self, slot: int, live: dict[int, FrozenTrial]) -> None:
        lost = [t for t in self.trials() if t.user_attrs.get("slot") == slot and t.user_attrs.get("lost")]
        point = point_of(lost[-1]) if lost else self._new_point(slot, live)
        self.study.enqueue_trial(point, user_attrs={"slot": slot, "owner": self.me})

    def _new_point(self, slot: int, live: dict[int, FrozenTrial]) -> Point:
        """A point no other trial has: drawn by Optuna's sampler, or, if that repeats itself, any free one."""
        settings, used = self.settings, [point_of(trial) for trial in live.values()]
        cells = settings.space.cells()
        cell = cells[slot % len(cells)]
        draft, draws = self._draft(slot, live), 0
        distributions = settings.space.distributions()
        while draws < _MOST_DRAWS or settings.space.size() > _MOST_LISTED:
            if draws == _MOST_DRAWS:
                draft.sampler = import_optuna().samplers.RandomSampler(seed=slot)
            point = {**draft.ask(distributions).params, **cell}
            if not any(same(point, other) for other in used):
                return point
            draws += 1
        chosen = random.Random(f"{settings.seed} {slot}")
        points = [p for p in settings.space.points() if not any(same(p, other) for other in used)]
        in_cell = [point for point in points if same(cell, {key: point[key] for key in cell})]
        return chosen.choice(in_cell or points)

    def _draft(self, slot: int, live: dict[int, FrozenTrial]) -> Study:
        """A copy in memory to draw from, seeded by the slot: two drivers never draw the same numbers."""
        optuna = import_optuna()
        seed = self.settings.seed * 1_000_003 + slot
        sampler: Any = optuna.samplers.RandomSampler(seed)
        if self.settings.sampler == "tpe":
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=False, constant_liar=True)
        draft = optuna.create_study(direction=self.settings.direction, sampler=sampler)
        draft.add_trials([t for t in live.values() if t.state.name in ("COMPLETE", "PRUNED", "RUNNING")])
        return draft

    def _counts(self, trial: Trial) -> bool:
        """Whether a trial that was just taken has a slot and a point that no earlier one has."""
        slot = trial.user_attrs.get("slot")
        if slot is None:
            return False
        earlier = [t for t in self.trials() if t.number < trial.number and slot_of(t) is not None]
        return not any(slot_of(t) == slot or same(point_of(t), trial.params) for t in earlier)

    def _attempts_before(self, trial: Trial) -> int:
        """How many lost trials stood in the slot of this one before it."""
        slot = trial.user_attrs["slot"]
        return sum(
            t.number < trial.number and t.user_attrs.get("slot") == slot and bool(t.user_attrs.get("lost"))
            for t in self.trials()
        )

    def beat(self, trial: Trial) -> bool:
        """Give a sign of life to other machines; False if one of them has given the trial up."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            trial.set_user_attr("heartbeat", time.time())
        except UpdateFinishedTrialError:
            return False
        return True

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """Record the metric at a step; False if another driver has given the trial up."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            trial.report(value, step)
        except UpdateFinishedTrialError:
            return False
        return True

    def tell(self, trial: Trial, state: str, value: float | None = None, **facts: Any) -> bool:
        """Record how a trial ended.

        Args:
            trial: one from `claim`.
            state: "COMPLETE", "PRUNED" or "FAIL".
            value: of a complete trial.
            facts: what is known of it, such as ``error``; plain values.

        Returns:
            False if another driver has given the trial up in the meantime, so that this result is dropped.
        """
        return self._end(trial.number, trial._trial_id, state, value, facts)

    def _end(self, number: int, key: int, state: str, value: float | None, facts: dict[str, Any]) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            for name, fact in facts.items():
                self.study._storage.set_trial_user_attr(key, name, fact)
            self.study.tell(number, value, state=TrialState[state])
        except (UpdateFinishedTrialError, ValueError) as error:
            if isinstance(error, UpdateFinishedTrialError) or "Cannot tell a" in str(error):
                return False  # another driver has ended it
            raise
        return True

    def give_up(self, trial: Trial) -> None:
        """Mark a trial as lost: its slot is free and the next one there gets the same point."""
        self.tell(trial, "FAIL", lost=True)

    def recover(self) -> list[int]:
        """Give up the trials of drivers that are gone; returns their slots."""
        lost = [
            (slot, trial)
            for slot, trial in self.live().items()
            if trial.state.name == "RUNNING" and self._is_lost(trial)
        ]
        return [slot for slot, t in lost if self._end(t.number, t._trial_id, "FAIL", None, {"lost": True})]

    def _is_lost(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get("owner")
        if owner == self.me:
            return False
        alive = is_alive(owner) if owner is not None else None
        if alive is not None:
            return not alive
        # of another machine, whose clock may differ: lost if no sign of life comes while we watch
        sign = (owner, trial.user_attrs.get("heartbeat"))
        before = self._seen.get(trial.number)
        if before is None or before[0] != sign:
            self._seen[trial.number] = (sign, time.monotonic())
            return False
        return time.monotonic() - before[1] > PATIENCE
