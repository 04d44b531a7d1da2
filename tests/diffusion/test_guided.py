"""Guidance: values in the κ form, and how many passes they cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.guided import guided_prediction
from lightning_modules.diffusion.schedule import NoiseSchedule, RectifiedFlow

B = 4  # equal to height and width below


class Recorder:
    """A network whose output is the text's value, plus 0.01 t, plus x_t; it records its batch sizes."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition, /) -> Tensor:
        assert len(x_t) == len(t) == condition.batch_size
        self.batch_sizes.append(len(x_t))
        return x_t + (condition.tensors["text"] + 0.01 * t)[:, None, None, None]


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule(torch.linspace(0.99, 0.01, 100))


def condition_of(values: list[float], null: float) -> Condition:
    return Condition({"text": torch.tensor(values)}, {"text": torch.tensor([null])})


X_T = torch.randn(B, 2, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([1, 20, 50, 99])
TEXT = condition_of([1.0, 2.0, 3.0, 4.0], null=-5.0)


def expected(weight_of_text: Tensor, base: Tensor) -> Tensor:
    """The recorder's output when its text value is (1 − κ) base + κ y."""
    mixed = (1 - weight_of_text) * base + weight_of_text * torch.tensor([1.0, 2.0, 3.0, 4.0])
    return X_T + (mixed + 0.01 * T)[:, None, None, None]


@pytest.mark.parametrize("kappa", [1.0, 1])
def test_kappa_one_is_one_plain_pass(schedule: NoiseSchedule, kappa: float) -> None:
    network = Recorder()
    epsilon = guided_prediction(network, schedule, X_T, T, TEXT, kappa).epsilon
    assert network.batch_sizes == [B]
    torch.testing.assert_close(epsilon, expected(torch.ones(B), torch.zeros(B)))


@pytest.mark.parametrize("kappa", [4.5, 0.0, -2.0, 0.5])
def test_kappa_form_in_one_double_pass(schedule: NoiseSchedule, kappa: float) -> None:
    network = Recorder()
    epsilon = guided_prediction(network, schedule, X_T, T, TEXT, kappa).epsilon
    assert network.batch_sizes == [2 * B]
    torch.testing.assert_close(epsilon, expected(torch.full((B,), kappa), torch.full((B,), -5.0)))


def test_kappa_per_sample(schedule: NoiseSchedule) -> None:
    network = Recorder()
    kappa = torch.tensor([0.0, 1.0, 4.5, -1.0])
    epsilon = guided_prediction(network, schedule, X_T, T, TEXT, kappa).epsilon
    assert network.batch_sizes == [2 * B]
    torch.testing.assert_close(epsilon, expected(kappa, torch.full((B,), -5.0)))
    with pytest.raises(ValueError, match="one value per sample"):
        guided_prediction(network, schedule, X_T, T, TEXT, torch.tensor([4.5]))


@pytest.mark.parametrize("values", [[7.0], [7.0, 8.0, 9.0, 10.0]])
def test_negative_prompts_take_the_place_of_no_text(schedule: NoiseSchedule, values: list[float]) -> None:
    negative = condition_of(values, null=100.0)
    epsilon = guided_prediction(Recorder(), schedule, X_T, T, TEXT, 3.0, negative).epsilon
    base = torch.tensor(values).expand(B)
    torch.testing.assert_close(epsilon, expected(torch.full((B,), 3.0), base))


def test_no_text_and_a_negative_prompt_without_text_are_expressible(schedule: NoiseSchedule) -> None:
    plain = guided_prediction(Recorder(), schedule, X_T, T, TEXT.without_text()).epsilon
    torch.testing.assert_close(plain, expected(torch.zeros(B), torch.full((B,), -5.0)))
    # Text left out on both sides: guidance has nothing to extrapolate.
    both = guided_prediction(Recorder(), schedule, X_T, T, TEXT.without_text(), 4.5).epsilon
    torch.testing.assert_close(both, plain)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_guidance_of_raw_outputs_is_guidance_of_epsilon(kind: str) -> None:
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 100), kind)
    network = Recorder()
    with_text = guided_prediction(network, schedule, X_T, T, TEXT).epsilon
    without = guided_prediction(network, schedule, X_T, T, TEXT.without_text()).epsilon
    guided = guided_prediction(network, schedule, X_T, T, TEXT, 4.5)
    torch.testing.assert_close(guided.epsilon, without + 4.5 * (with_text - without), rtol=1e-4, atol=1e-3)


def test_gradients_flow_to_the_sample(schedule: NoiseSchedule) -> None:
    x_t = X_T.clone().requires_grad_()
    guided_prediction(Recorder(), schedule, x_t, T, TEXT, 4.5).epsilon.sum().backward()
    assert x_t.grad is not None
    # Both halves have slope 1: (1 − κ) + κ = 1.
    torch.testing.assert_close(x_t.grad, torch.ones_like(X_T))


def test_half_precision_outputs_are_combined_in_float32(schedule: NoiseSchedule) -> None:
    def network(x_t: Tensor, t: Tensor, condition: Condition, /) -> Tensor:
        return Recorder()(x_t, t, condition).bfloat16()

    with_text, without = (network(X_T, T, c).float() for c in (TEXT, TEXT.without_text()))
    epsilon = guided_prediction(network, schedule, X_T, T, TEXT, 4.5).epsilon
    torch.testing.assert_close(epsilon, without + 4.5 * (with_text - without), rtol=0, atol=0)


def test_a_condition_of_another_batch_size_is_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="3 prompts for a batch of 4"):
        guided_prediction(Recorder(), schedule, X_T, T, TEXT[:3])


def test_a_distilled_scale_is_an_input_of_one_pass() -> None:
    """κ, one number or one per sample, reaches the network, also 1; the network is told 1000 σ."""
    schedule, seen = RectifiedFlow(shift=2.0), []

    def network(x_t: Tensor, t: Tensor, condition: Condition, /) -> Tensor:
        seen.append((condition.tensors["scale"], t))
        return x_t * condition.tensors["scale"][:, None, None, None]

    for kappa in (1.0, 3.5, torch.tensor([1.0, 2.0, 3.0, 4.0])):
        flow = guided_prediction(network, schedule, X_T, T, TEXT, kappa, embedded="scale").flow
        expected = torch.as_tensor(kappa).expand(B)
        assert torch.equal(seen[-1][0], expected) and torch.equal(flow, X_T * expected[:, None, None, None])
    u = (T + 1) / 1000
    torch.testing.assert_close(seen[-1][1], 1000 * 2 * u / (1 + u))
    assert len(seen) == 3
    with pytest.raises(ValueError, match="takes no negative prompts"):
        guided_prediction(network, schedule, X_T, T, TEXT, 3.5, TEXT, embedded="scale")
