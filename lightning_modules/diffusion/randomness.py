"""Random numbers that depend on (seed, student step, name, index of the sample in the global batch) only.

So they are the same for 1 or 8 processes and any split into micro-batches, and a resumed run needs no stored
state. Everything is drawn on the CPU and then moved: the values do not depend on the device either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.diffusion.transfer import to_device


def _hash(*key: int | str) -> int:
    """64 well-mixed bits of ``key``."""
    text = "\0".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seeded_noise(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu", draw: int = 0
) -> Tensor:
    """Unit normal noise [B, *shape], float32: ``torch.randn`` of a CPU generator seeded with ``seeds[i]``.

    The same seed gives the same noise whatever batch it is in, and stock diffusers makes the same one; and
    then those of further ``draw``s between its steps.
    """
    noise = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(noise, seeds, strict=True):
        generator.manual_seed(int(seed))
        for _ in range(draw + 1):
            torch.randn(tuple(shape), generator=generator, out=row)
    return to_device(noise, device)


class StepRandom:
    """The random numbers of one student step, for the samples that this process (or micro-batch) holds.

    Each draw has a name: equal names give equal numbers, different names independent ones. The CPU generator
    keeps 32 bits of a seed, so two given streams of normals coincide with probability 2⁻³².

    Args:
        seed: of the run.
        step: number of student updates done so far.
        indices: positions in the global batch of the samples at hand, integers [B].
        device: where the numbers are wanted.
        batch: which of the step's batches; each has numbers of its own.

    Raises:
        ValueError: if ``indices`` is not a vector of integers.
    """

    def __init__(
        self, seed: int, step: int, indices: Tensor, device: torch.device | str = "cpu", batch: int = 0
    ) -> None:
        if indices.ndim != 1 or indices.is_floating_point():
            raise ValueError(
                f"indices must be integers [B], got {indices.dtype} of shape {tuple(indices.shape)}"
            )
        self.seed = seed
        self.step = step
        self.indices: list[int] = indices.tolist()
        self.device = torch.device(device)
        # batch 0 goes without its number: its random numbers are those of runs that have no other
        self._place: tuple[int | str, ...] = (seed, step, *(("batch", batch) if batch else ()))

    @property
    def batch_size(self) -> int:
        """B, the number of samples at hand."""
        return len(self.indices)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Unit normal numbers [B, *shape], float32."""
        return seeded_noise([self._key(name, index) for index in self.indices], shape, self.device)

    def uniform(self, name: str) -> Tensor:
        """One number in [0, 1) per sample, [B], float32 (24 random bits: rounding never reaches 1)."""
        bits = [self._key(name, index) >> 40 for index in self.indices]
        return to_device((torch.tensor(bits, dtype=torch.float64) / 2**24).float(), self.device)

    def shared_uniform(self, name: str) -> float:
        """One number in [0, 1) for the whole global batch: equal on every process."""
        return (_hash("shared", *self._place, name) >> 11) / 2**53

    def _key(self, name: str, index: int) -> int:
        return _hash("sample", *self._place, name, index)
