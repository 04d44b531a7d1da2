"""Random numbers per (seed, step, name, sample): reproducible, split-independent, distinct, well spread."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion.randomness import StepRandom, seeded_noise
from lightning_modules.diffusion.timesteps import UniformTimesteps


def random_of(indices: Tensor, seed: int = 0, step: int = 0) -> StepRandom:
    return StepRandom(seed, step, indices)


def test_the_same_whatever_the_batch_split_and_order() -> None:
    whole = random_of(torch.arange(8))
    for positions in ([0, 1, 2, 3], [4, 5, 6, 7], [1, 3, 5, 7], [7], [5, 2]):
        part = torch.tensor(positions)
        share = random_of(part)
        assert torch.equal(share.normal("noise", (2, 3)), whole.normal("noise", (2, 3))[part])
        assert torch.equal(share.uniform("t"), whole.uniform("t")[part])
        assert share.shared_uniform("drop") == whole.shared_uniform("drop")


def test_the_same_whatever_was_drawn_before() -> None:
    first, second = random_of(torch.arange(4)), random_of(torch.arange(4))
    first.normal("other", (5,))
    first.uniform("noise")
    torch.manual_seed(3)
    assert torch.equal(first.normal("noise", (4,)), second.normal("noise", (4,)))
    assert torch.equal(first.normal("noise", (4,)), first.normal("noise", (4,)))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    random_of(torch.arange(4)).normal("noise", (4,))
    seeded_noise([1, 2], (3,))
    assert torch.equal(torch.get_rng_state(), before)


def test_distinct_by_name_sample_step_and_seed() -> None:
    draws = [
        StepRandom(seed, step, torch.arange(5)).normal(name, (16,))
        for seed in (0, 1)
        for step in (0, 1, 10)
        for name in ("a", "b")
    ]
    rows = torch.cat(draws)
    assert len(rows) == 60
    assert rows.unique(dim=0).shape == rows.shape
    steps = [random_of(torch.arange(3), seed, step) for seed in (0, 1) for step in (0, 1)]
    assert torch.cat([step.uniform(name) for step in steps for name in "ab"]).unique().numel() == 24
    assert len({step.shared_uniform(name) for step in steps for name in "ab"}) == 8


def test_neighbouring_keys_do_not_run_together() -> None:
    # (seed 1, step 11) and (seed 11, step 1) would be one key if the parts were simply strung together.
    one, other = StepRandom(1, 11, torch.tensor([0])), StepRandom(11, 1, torch.tensor([0]))
    assert not torch.equal(one.normal("a", (4,)), other.normal("a", (4,)))
    assert not torch.equal(one.uniform("a"), other.uniform("a"))
    assert one.shared_uniform("a") != other.shared_uniform("a")


def test_normals_are_unit_normal_and_uncorrelated() -> None:
    n, width = 2000, 16
    x = random_of(torch.arange(n)).normal("noise", (width,))
    y = random_of(torch.arange(n)).normal("other", (width,))
    z = random_of(torch.arange(n), step=1).normal("noise", (width,))
    error = 5 / math.sqrt(n * width)  # five standard errors of a mean
    assert x.dtype == torch.float32 and x.shape == (n, width)
    assert abs(x.mean()) < error
    assert abs(x.square().mean() - 1) < error * math.sqrt(2)
    assert abs(x.pow(4).mean() - 3) < error * math.sqrt(96)
    for other in (y, z, x.roll(1, 0), x.roll(1, 1)):  # names, steps, samples, elements
        assert abs((x * other).mean()) < error


def test_uniforms_are_uniform_over_samples_and_steps() -> None:
    over_samples = random_of(torch.arange(20_000)).uniform("t")
    over_steps = torch.cat([random_of(torch.tensor([3]), step=s).uniform("t") for s in range(5000)])
    shared = torch.tensor([random_of(torch.tensor([3]), step=s).shared_uniform("drop") for s in range(5000)])
    for u in (over_samples, over_steps, shared):
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(u))
        counts = torch.histc(u.float(), 10, 0, 1)
        expected = len(u) / 10
        assert ((counts - expected).square() / expected).sum() < 33.7  # χ²₉, p = 1e-4


def test_seeded_noise_is_torch_randn_of_each_seed() -> None:
    seeds = [0, 7, 2**31, 7]
    noise = seeded_noise(seeds, (3, 4, 4))
    for row, seed in zip(noise, seeds, strict=True):
        assert torch.equal(row, torch.randn((3, 4, 4), generator=torch.Generator().manual_seed(seed)))
        # diffusers draws [1, C, H, W] per image.
        stock = torch.randn((1, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(row, stock[0])
    assert torch.equal(noise[1], noise[3])
    assert seeded_noise([], (2,)).shape == (0, 2)


def test_shapes_small_and_empty() -> None:
    # torch.randn takes another path below 16 elements: it must give the same too.
    for shape in ((), (1,), (15,), (16,), (17,)):
        row = seeded_noise([5], shape)[0]
        assert torch.equal(row, torch.randn(shape, generator=torch.Generator().manual_seed(5)))


def test_indices_of_the_wrong_form_are_refused() -> None:
    for wrong in (torch.tensor(1), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="integers"):
            StepRandom(0, 0, wrong)


def test_timesteps_cover_their_range_evenly() -> None:
    u = torch.arange(96_000) / 96_000
    t = UniformTimesteps(20, 980).draw(u)
    assert t.dtype == torch.int64
    assert (t.min(), t.max()) == (20, 979)
    counts = t.bincount(minlength=980)[20:]
    assert abs(counts - 100).max() <= 1
    assert UniformTimesteps(3, 4).draw(u).unique().tolist() == [3]


def test_rounding_never_reaches_the_upper_end() -> None:
    largest = torch.tensor([1 - 2**-24])
    assert largest < 1
    for span in range(1, 2049):
        assert UniformTimesteps(20, 20 + span).draw(largest).item() == 19 + span


@pytest.mark.parametrize(("low", "high"), [(5, 5), (6, 5), (-1, 5)])
def test_empty_ranges_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="0 <= low < high"):
        UniformTimesteps(low, high)
