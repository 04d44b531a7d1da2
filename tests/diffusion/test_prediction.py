"""Conversions between ε, x0, v, flow and score: round trips, closed forms, and diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from lightning_modules.diffusion.prediction import PREDICTION_TYPES, Prediction
from lightning_modules.diffusion.schedule import NoiseSchedule

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

OUTPUT_OF: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, alpha, sigma: noise,
    "sample": lambda x0, noise, alpha, sigma: x0,
    "v_prediction": lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
    "flow": lambda x0, noise, alpha, sigma: noise - x0,
}


def ddim(prediction_type: str = "epsilon") -> Any:
    return DDIMScheduler(
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        **STABLE_DIFFUSION,
    )


def noised(dtype: torch.dtype = torch.float64) -> tuple[NoiseSchedule, Tensor, Tensor, Tensor, Tensor]:
    """(schedule, x0, noise, t, x_t); B equals height and width: misaligned broadcasting cannot hide."""
    generator = torch.Generator().manual_seed(0)
    schedule = NoiseSchedule(ddim().alphas_cumprod)
    x0, noise = torch.randn(2, 4, 3, 4, 4, generator=generator, dtype=dtype)
    t = torch.tensor([0, 250, 625, 999])
    return schedule, x0, noise, t, schedule.add_noise(x0, noise, t)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_reading_recovers_the_truth(kind: str) -> None:
    schedule, x0, noise, t, x_t = noised()
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in schedule.alpha_sigma(t))
    output = OUTPUT_OF[kind](x0, noise, alpha, sigma)
    prediction = Prediction(output, kind, x_t, *schedule.alpha_sigma(t))
    # Constants are float32, inputs float64: what is left is 1 / α_999 = 14.6 times their rounding.
    for name, truth in {
        "x0": x0,
        "epsilon": noise,
        "v": alpha * noise - sigma * x0,
        "flow": noise - x0,
        "score": -noise / sigma,
    }.items():
        torch.testing.assert_close(getattr(prediction, name), truth, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("first", PREDICTION_TYPES)
@pytest.mark.parametrize("second", PREDICTION_TYPES)
def test_round_trips(first: str, second: str) -> None:
    schedule, _, _, t, x_t = noised()
    constants = schedule.alpha_sigma(t)
    output = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=x_t.dtype)
    reading = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow": "flow"}
    there = getattr(Prediction(output, first, x_t, *constants), reading[second])
    back = getattr(Prediction(there, second, x_t, *constants), reading[first])
    # x0 → ε at t = 0 divides by σ_0 = 0.03, ε → x0 at 999 by α = 0.07; constants are float32.
    torch.testing.assert_close(back, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
def test_x0_equals_diffusers(kind: str, scheduler_class: type) -> None:
    scheduler = scheduler_class(
        prediction_type=kind, clip_sample=False, timestep_spacing="trailing", **STABLE_DIFFUSION
    )
    scheduler.set_timesteps(1000)
    schedule, _, _, ts, x_t = noised(torch.float32)
    output = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    ours = NoiseSchedule(scheduler.alphas_cumprod, kind).read(output, x_t, ts).x0
    for i, t in enumerate(ts.tolist()):
        theirs = scheduler.step(output[i], t, x_t[i]).pred_original_sample
        torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_deterministic_ddim_step_from_our_readings(kind: str) -> None:
    # DDIM (arXiv 2010.02502, eq. 12 with η = 0): x_s = α_s x0 + σ_s ε. Checks ε beside x0.
    scheduler = ddim(kind)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    schedule = NoiseSchedule(scheduler.alphas_cumprod, kind)
    x_t, output = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    prediction = schedule.read(output, x_t, torch.tensor([749]))
    ours = schedule.add_noise(prediction.x0, prediction.epsilon, torch.tensor([499]))
    torch.testing.assert_close(ours, scheduler.step(output, 749, x_t).prev_sample, rtol=1e-4, atol=1e-4)


def test_v_equals_diffusers() -> None:
    schedule, x0, noise, t, x_t = noised(torch.float32)
    scheduler: Any = DDPMScheduler(**STABLE_DIFFUSION)
    prediction = Prediction(noise, "epsilon", x_t, *schedule.alpha_sigma(t))
    theirs = scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(prediction.v, theirs, rtol=1e-4, atol=1e-4)


def test_half_precision_outputs_are_read_in_float32() -> None:
    schedule, x0, noise, t, x_t = noised(torch.float32)
    prediction = schedule.read(noise.bfloat16(), x_t, t)
    assert prediction.epsilon.dtype == prediction.x0.dtype == prediction.v.dtype == torch.float32
    expected = schedule.read(noise.bfloat16().float(), x_t, t).x0
    torch.testing.assert_close(prediction.x0, expected, rtol=0, atol=0)


def test_one_unknown_kind_and_one_wrong_shape_are_refused() -> None:
    x, c = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="unknown prediction type 'velocity'.*v_prediction"):
        Prediction(x, "velocity", x, c, c)
    with pytest.raises(ValueError, match=r"\(2, 1\).*\(2, 3\)"):
        Prediction(x[:, :1], "epsilon", x, c, c)
