"""The noise schedule: constants, noising, precision, and broadcasting of per-sample timesteps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from common.errors import UserError
from lightning_modules.diffusion.broadcast import expand_like
from lightning_modules.diffusion.schedule import NoiseSchedule, RectifiedFlow
from lightning_modules.diffusion.weighting import alpha_squared, sigma_squared
from lightning_modules.networks.backbones.flux import Flux
from lightning_modules.networks.loading import noise_schedule


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def scheduler() -> Any:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture
def schedule(scheduler: Any) -> NoiseSchedule:
    return NoiseSchedule(scheduler.alphas_cumprod)


def test_constants_of_stable_diffusion(schedule: NoiseSchedule) -> None:
    assert schedule.num_timesteps == 1000
    alpha, sigma = schedule.alpha_sigma(torch.tensor([999, 625, 399]))
    torch.testing.assert_close(alpha**2, torch.tensor([0.00466, 0.138, 0.426]), rtol=0, atol=5e-4)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3))
    assert alpha.dtype == sigma.dtype == torch.float32


def test_weights(schedule: NoiseSchedule) -> None:
    alpha, sigma = schedule.alpha_sigma(torch.tensor([20, 500, 979]))
    acp = schedule.alphas_cumprod[[20, 500, 979]].float()
    torch.testing.assert_close(alpha_squared(alpha, sigma), acp)
    torch.testing.assert_close(sigma_squared(alpha, sigma), 1 - acp)


@pytest.mark.parametrize("shape", [(4, 3, 4, 4), (3, 2, 5, 4), (4, 4), (5,)])
def test_noising_equals_diffusers(schedule: NoiseSchedule, scheduler: Any, shape: tuple[int, ...]) -> None:
    x0, noise = torch.randn(2, *shape)
    t = torch.randint(0, 1000, shape[:1])
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t))


def test_per_sample_values_follow_the_batch_axis_when_it_equals_the_width(schedule: NoiseSchedule) -> None:
    t = torch.tensor([0, 300, 600, 999])
    ones = torch.ones(4, 4, 4, 4)
    alpha, _ = schedule.alpha_sigma(t)
    x_t = schedule.add_noise(ones, torch.zeros_like(ones), t)
    for i in range(4):
        assert (x_t[i] == alpha[i]).all()
    read = schedule.read(torch.zeros_like(ones), x_t, t).x0
    torch.testing.assert_close(read, ones)


def test_expand_like_refuses_what_plain_broadcasting_would_accept() -> None:
    assert expand_like(torch.arange(4), torch.zeros(4, 3, 4, 4)).shape == (4, 1, 1, 1)
    for wrong in (torch.tensor(1.0), torch.ones(1), torch.ones(5), torch.ones(4, 1)):
        with pytest.raises(ValueError, match="one value per sample"):
            expand_like(wrong, torch.zeros(4, 3, 5, 5))


def test_casting_the_module_leaves_the_constants_alone(schedule: NoiseSchedule) -> None:
    before = schedule.alpha.clone()
    parent = nn.ModuleList([schedule]).bfloat16().half()
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float32
    assert torch.equal(schedule.alpha, before)
    assert parent.state_dict() == {}


def test_constants_follow_the_device(schedule: NoiseSchedule) -> None:
    # The meta device stands for an accelerator: the buffers move with a parent module, and come back filled.
    before = schedule.alpha.clone()
    nn.ModuleList([schedule]).to("meta")
    assert schedule.alpha.is_meta and schedule.sigma.is_meta
    schedule.to_empty(device="cpu")
    assert torch.equal(schedule.alpha, before)


def test_half_precision_samples_are_noised_in_float32(schedule: NoiseSchedule) -> None:
    x0 = torch.randn(2, 3).bfloat16()
    t = torch.tensor([10, 900])
    x_t = schedule.add_noise(x0, torch.ones(2, 3).bfloat16(), t)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, schedule.add_noise(x0.float(), torch.ones(2, 3), t))


def test_gradient_of_noising(schedule: NoiseSchedule) -> None:
    x0 = torch.zeros(2, 3, requires_grad=True)
    t = torch.tensor([100, 900])
    schedule.add_noise(x0, torch.randn(2, 3), t).sum().backward()
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, schedule.alpha_sigma(t)[0][:, None].expand(2, 3))


@pytest.mark.parametrize(
    ("table", "kind", "message"),
    [
        (torch.tensor([0.9, 0.5]), "eps", "unknown prediction type 'eps'"),
        (torch.tensor([0.5, 0.9]), "epsilon", "not increase"),
        (torch.tensor([1.5, 0.9]), "epsilon", "lie in"),
        (torch.tensor([float("nan")]), "epsilon", "lie in"),
        (torch.zeros(0), "epsilon", "one number per timestep"),
    ],
)
def test_what_is_no_schedule_is_refused(table: torch.Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(table, kind)


def test_timesteps_and_noise_of_the_wrong_form_are_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="integers"):
        schedule.alpha_sigma(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="integers"):
        schedule.alpha_sigma(torch.tensor(1))
    with pytest.raises(ValueError, match="the noise"):
        schedule.add_noise(torch.zeros(2, 3), torch.zeros(1, 3), torch.tensor([1, 2]))


# --- rectified flow ---------------------------------------------------------------------------------------


def test_flow_is_diffusers_own() -> None:
    """All 1,000 σ, the noising and the times that networks are told, of a static shift."""
    flow: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = noise_schedule(flow)
    t, everything = torch.tensor([0, 10, 500, 999]), torch.arange(1000)
    alpha, sigma = schedule.alpha_sigma(everything)
    torch.testing.assert_close(sigma.flip(0), flow.sigmas)
    torch.testing.assert_close(schedule.network_time(everything).flip(0), flow.timesteps)
    torch.testing.assert_close(alpha + sigma, torch.ones(1000))
    assert (alpha[999], sigma[999], schedule.num_timesteps) == (0, 1, 1000)
    x0, noise = torch.randn(2, 4, 2, 3, 4)
    expected = flow.scale_noise(x0, flow.timesteps[999 - t], noise)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), expected, rtol=1e-5, atol=1e-6)
    read = schedule.read(noise - x0, schedule.add_noise(x0, noise, t), t)
    torch.testing.assert_close(read.x0, x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.epsilon, noise, rtol=1e-5, atol=1e-5)


def test_a_shift_by_resolution_is_that_of_the_pipelines() -> None:
    flow: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    mu = calculate_shift(1024)
    flow.set_timesteps(sigmas=[1.0, 0.5, 0.25], mu=mu)
    schedule = noise_schedule(flow, 1024, Flux())
    torch.testing.assert_close(schedule.alpha_sigma(torch.tensor([999.0, 499, 249]))[1], flow.sigmas[:3])
    with pytest.raises(UserError, match="depends on the resolution"):
        noise_schedule(flow)
    solver: Any = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    assert torch.equal(noise_schedule(solver).sigma, RectifiedFlow(shift=3.0).sigma)


def test_a_terminal_sigma_stretches_the_range() -> None:
    flow: Any = FlowMatchEulerDiscreteScheduler(shift=2.0, shift_terminal=0.02)
    flow.set_timesteps(sigmas=[(t + 1) / 1000 for t in (999, 400, 0)])
    schedule: Any = noise_schedule(flow)
    t = torch.tensor([999, 400, 0])
    torch.testing.assert_close(schedule.alpha_sigma(t)[1], flow.sigmas[:3])
    torch.testing.assert_close(schedule.timestep(flow.sigmas[:3]), t.float(), rtol=1e-5, atol=1e-3)


def test_flow_takes_real_timesteps_and_inverts_them() -> None:
    schedule = RectifiedFlow(shift=2.5)
    t = torch.tensor([-1.0, 0.25, 700.5, 999])
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(schedule.timestep(sigma), t, rtol=1e-5, atol=1e-3)
    assert (sigma[0], alpha[0]) == (0, 1) and (sigma.diff() > 0).all()
    assert RectifiedFlow(shift=2.5).bfloat16().sigma.dtype == torch.float32
    for wrong in ({"shift": 0.0}, {"num_timesteps": 0}, {"terminal": 1.0}):
        with pytest.raises(ValueError, match="no flow schedule"):
            RectifiedFlow(**wrong)  # type: ignore[arg-type]
