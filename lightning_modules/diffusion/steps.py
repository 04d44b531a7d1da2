"""The steps of a student: at which timesteps it is called, and what it is given there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import UserError
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.schedule import NoiseSchedule

StepNoise = Literal["fresh", "fixed", "none"]


@dataclass(frozen=True)
class Steps:
    """K timesteps from the first one down, and the noise between them.

    Step k sees x_k and says x̂. The next one is given x_{k+1} = α x̂ + σ n at its own timestep, where n is

    - ``fresh``: new noise (consistency models, arXiv 2303.01469, algorithm 1; DMD2);
    - ``fixed``: the noise that the first step was given;
    - ``none``: the noise that the student itself sees in x_k (DDIM, arXiv 2010.02502, equation 12, η = 0).

    Args:
        timesteps: descending.
        noise: between the steps.
        counts: of a student that takes the number of its steps as a condition, those that it knows,
            ascending, the last one all of the steps; () for all other students.

    Raises:
        UserError: the timesteps don't descend, or several end below 1; the counts are others.
    """

    timesteps: tuple[int, ...]
    noise: StepNoise = "fresh"
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the timesteps."""
        times = self.timesteps
        if not times or any(a <= b for a, b in zip(times, times[1:])) or (len(times) > 1 and times[-1] < 1):
            raise UserError(
                f"timesteps {list(times)}: give the student's from the first one down, each above 0, "
                "e.g. [999, 749, 499, 249]"
            )
        if self.noise not in ("fresh", "fixed", "none"):
            raise UserError(f"step_noise is {self.noise!r}: it is fresh, fixed or none")
        known = (0, *self.counts)
        if self.counts and (known[-1] != len(times) or any(a >= b for a, b in zip(known, known[1:]))):
            raise UserError(
                f"step_counts {list(self.counts)}: give the numbers of steps from the smallest up to all "
                f"{len(times)} of timesteps, e.g. [1, 2, 4]"
            )

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def start(self) -> int:
        """T, where the first step is taken."""
        return self.timesteps[0]

    def fewer(self, count: int) -> Steps:
        """`count` of the steps, evenly among them, from the first one.

        Raises:
            UserError: there are not so many, or the student does not know this number.
        """
        if self.counts and count not in self.counts:
            raise UserError(
                f"the student was trained for {', '.join(map(str, self.counts))} steps, not for {count}: "
                "give one of these"
            )
        if not 1 <= count <= len(self):
            raise UserError(
                f"the student was trained for the timesteps {list(self.timesteps)}: give from 1 to "
                f"{len(self)} steps, not {count}"
            )
        return Steps(tuple(self.timesteps[i * len(self) // count] for i in range(count)), self.noise)

    def by_count(self) -> dict[int, Steps]:
        """The steps for each number that may be drawn, by `StudentSample.told`; 0 is all of them."""
        return {0: self} | {count: self.fewer(count) for count in self.counts}

    def at(self, k: int, x: Tensor) -> Tensor:
        """Timestep k for each sample of x, [B], int64."""
        return torch.full((len(x),), self.timesteps[k], dtype=torch.long, device=x.device)

    def next_input(
        self,
        k: int,
        said: Prediction,
        schedule: NoiseSchedule,
        start: Tensor,
        fresh: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """x_{k+1} [B, …], from what the student said at step k.

        Args:
            k: from 0; not the last step.
            said: its prediction at x_k.
            schedule: the student's.
            start: what step 0 was given, [B, …].
            fresh: step -> new noise [B, …] for its input.

        Raises:
            ValueError: new noise is needed, and there is none.
        """
        if self.noise == "none":
            noise = said.epsilon
        elif self.noise == "fixed":
            noise = start
        elif fresh is None:
            raise ValueError("there is new noise between the steps: give `fresh`")
        else:
            noise = fresh(k + 1)
        return schedule.add_noise(said.x0, noise.to(said.x0), self.at(k + 1, start))


def step_facts(steps: Steps) -> dict[str, Any]:
    """The steps as plain data; see `steps_of`."""
    several = {"timesteps": list(steps.timesteps), "step_noise": steps.noise} if len(steps) > 1 else {}
    known = {"step_counts": list(steps.counts)} if steps.counts else {}
    return {"start_timestep": steps.start, **several, **known}


def steps_of(facts: Mapping[str, Any]) -> Steps:
    """The steps that `step_facts` has written down."""
    times, noise = facts.get("timesteps") or int(facts["start_timestep"]), facts.get("step_noise", "fresh")
    return as_steps(times, noise, facts.get("step_counts") or ())


def as_steps(
    timesteps: int | Sequence[int] | Steps, noise: StepNoise = "fresh", counts: Sequence[int] = ()
) -> Steps:
    """Steps as they are; one step at a timestep; or several."""
    if isinstance(timesteps, Steps):
        return timesteps
    return Steps((timesteps,) if isinstance(timesteps, int) else tuple(timesteps), noise, tuple(counts))
