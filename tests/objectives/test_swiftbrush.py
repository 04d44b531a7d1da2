"""SwiftBrush's two losses against closed forms: sign, size, weights, timesteps, guidance, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule, RectifiedFlow
from lightning_modules.guidance.scales import UniformGuidance
from lightning_modules.objectives.base import StudentSample
from lightning_modules.objectives.swiftbrush import SwiftBrush
from tests.objectives.conftest import GaussianNetwork, GaussianScores

Text = Callable[..., Condition]
SHAPE = (4, 2, 4, 4)  # B equal to height and width


def step_random(batch_size: int = 4, step: int = 0) -> StepRandom:
    return StepRandom(0, step, torch.arange(batch_size))


def student_gradient(
    objective: SwiftBrush, scores: Any, condition: Condition, x0: Tensor, step: int = 0
) -> Tensor:
    """∂L/∂x0 by autograd."""
    x0 = x0.clone().requires_grad_()
    terms = objective.student_loss(StudentSample(x0, condition), scores, step_random(len(x0), step))
    (gradient,) = torch.autograd.grad(sum(terms.losses.values(), torch.tensor(0.0)), x0)
    return gradient


def test_student_gradient_equals_the_analytic_one(
    make_scores: Any, text: Text, schedule: NoiseSchedule
) -> None:
    # Equal variances: ε_real − ε_fake = −σ α (m_real − m_fake) / (α² s² + σ²) whatever the noise; guided,
    # m^κ = m_∅ + κ (m_y − m_∅) in both. Hence g in closed form from t alone.
    kappa, std = 4.5, 0.5
    scores = make_scores(real=(1.0, std, 0.3), fake=(-0.5, std, 0.1))
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    gradient = student_gradient(SwiftBrush(kappa), scores, text(values, null=0.25), torch.randn(SHAPE))
    alpha, sigma = schedule.alpha_sigma(scores.calls[0].t)
    guided_text = 0.25 + kappa * (values - 0.25)
    real_mean, fake_mean = 1.0 + 0.3 * guided_text, -0.5 + 0.1 * guided_text
    g = sigma**2 * (-sigma * alpha * (real_mean - fake_mean) / (alpha**2 * std**2 + sigma**2))
    expected = g[:, None, None, None].expand(SHAPE) / math.prod(SHAPE)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_descent_moves_towards_the_teacher(make_scores: Any, text: Text) -> None:
    condition = text([0.0] * 4)
    above = make_scores(real=(2.0, 0.5, 0.0), fake=(0.0, 0.5, 0.0))
    below = make_scores(real=(-2.0, 0.5, 0.0), fake=(0.0, 0.5, 0.0))
    assert (student_gradient(SwiftBrush(), above, condition, torch.randn(SHAPE)) < 0).all()
    assert (student_gradient(SwiftBrush(), below, condition, torch.randn(SHAPE)) > 0).all()


def test_student_gradient_at_the_scores_it_asked_for(
    make_scores: Any, text: Text, schedule: NoiseSchedule
) -> None:
    # Different variances: g depends on x_t. g = α σ (x0_fake − x0_real), the same in terms of x0.
    scores = make_scores(real=(1.0, 0.3, 1.0), fake=(-0.5, 2.0, -1.0))
    x0 = torch.randn(SHAPE)
    gradient = student_gradient(SwiftBrush(2.0), scores, text([1.0, 2.0, 3.0, 4.0]), x0)
    teacher, fake = scores.calls
    assert (teacher.role, fake.role) == ("teacher", "fake_score")
    alpha, sigma = (c[:, None, None, None] for c in schedule.alpha_sigma(teacher.t))
    g = alpha * sigma * (fake.prediction.x0 - teacher.prediction.x0)
    torch.testing.assert_close(gradient, g / x0.numel(), rtol=1e-3, atol=1e-6)


def test_loss_value_and_diagnostics(make_scores: Any, text: Text) -> None:
    scores = make_scores()
    objective = SwiftBrush(3.0)
    x0 = torch.randn(SHAPE, requires_grad=True)
    losses, numbers = objective.student_loss(StudentSample(x0, text([0.0] * 4)), scores, step_random())
    (loss,) = losses.values()
    (gradient,) = torch.autograd.grad(loss, x0)
    g = gradient * x0.numel()
    torch.testing.assert_close(loss.detach(), g.square().mean() / 2)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert numbers["guidance_scale/teacher"] == 3.0
    assert numbers["guidance_scale/fake_score"] == 3.0
    assert numbers["nonfinite_score_gradients"] == 0
    torch.testing.assert_close(numbers["score_gradient_rms"], g.square().mean().sqrt())


def test_both_scores_are_read_at_the_same_point_with_the_same_guidance(make_scores: Any, text: Text) -> None:
    scores = make_scores()
    condition = text([0.0] * 4)
    for objective in (
        SwiftBrush(4.5),
        SwiftBrush(UniformGuidance(1, 5)),
        SwiftBrush(UniformGuidance(1, 5, True)),
    ):
        scores.calls.clear()
        student_gradient(objective, scores, condition, torch.randn(SHAPE))
        teacher, fake = scores.calls
        assert torch.equal(teacher.x_t, fake.x_t) and torch.equal(teacher.t, fake.t)
        assert torch.equal(torch.as_tensor(teacher.guidance_scale), torch.as_tensor(fake.guidance_scale))
        assert teacher.condition is fake.condition is condition
        assert teacher.negative is fake.negative is None
    assert fake.guidance_scale.shape == (4,)


def test_no_gradient_reaches_the_score_models_in_the_student_turn(make_scores: Any, text: Text) -> None:
    scores = make_scores()
    x0 = torch.randn(SHAPE, requires_grad=True)
    (loss,) = (
        SwiftBrush().student_loss(StudentSample(x0, text([0.0] * 4)), scores, step_random()).losses.values()
    )
    loss.backward()
    assert x0.grad is not None and x0.grad.abs().sum() > 0
    weights = [*scores.real.parameters(), *scores.fake.parameters()]
    assert weights and all(w.requires_grad and w.grad is None for w in weights)
    # Nor is a graph kept for one: that would hold the activations of both networks.
    assert not any(call.prediction.output.requires_grad for call in scores.calls)


def test_noised_samples_carry_the_schedule(make_scores: Any, text: Text, schedule: NoiseSchedule) -> None:
    scores = make_scores()
    x0 = torch.randn(200, 2, 8, 8)
    sample, random = StudentSample(x0, text([0.0] * 200)), step_random(200)
    SwiftBrush().student_loss(sample, scores, random)
    SwiftBrush().fake_score_loss(sample, scores, random)
    noises = []
    for call in (scores.calls[0], scores.calls[2]):
        alpha, sigma = (c[:, None, None, None] for c in schedule.alpha_sigma(call.t))
        noise = (call.x_t - alpha * x0) / sigma
        assert abs(noise.mean()) < 5 / math.sqrt(noise.numel())
        assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / noise.numel())
        noises.append(noise)
    # New noise and new timesteps in the fake score's turn.
    assert abs((noises[0] * noises[1]).mean()) < 5 / math.sqrt(noises[0].numel())
    timesteps = torch.stack([scores.calls[0].t, scores.calls[2].t]).double()
    assert abs(timesteps.corrcoef()[0, 1]) < 5 / math.sqrt(200)


def test_timestep_ranges(make_scores: Any, text: Text) -> None:
    scores = make_scores()
    batch_size = 20_000
    sample = StudentSample(torch.zeros(batch_size, 1, 1, 1), text([0.0] * batch_size))
    SwiftBrush().student_loss(sample, scores, step_random(batch_size))
    SwiftBrush().fake_score_loss(sample, scores, step_random(batch_size))
    student, fake = scores.calls[0].t, scores.calls[2].t
    assert (student.min(), student.max()) == (20, 979)
    assert (fake.min(), fake.max()) == (0, 999)
    assert student.unique().numel() == 960 and fake.unique().numel() == 1000


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_fake_score_loss_is_the_weighted_noise_error(
    make_scores: Any, text: Text, schedule: NoiseSchedule, kind: str
) -> None:
    """Of whatever the network predicts: ε = α v + σ x_t = (x_t − α x0) / σ."""
    scores = make_scores()
    scores.schedule = NoiseSchedule(schedule.alphas_cumprod, kind)
    x0 = torch.randn(SHAPE)
    objective = SwiftBrush(prompt_dropout=0.0)
    (loss,) = objective.fake_score_loss(
        StudentSample(x0, text([0.0] * 4)), scores, step_random()
    ).losses.values()
    (call,) = scores.calls
    assert call.role == "fake_score" and call.guidance_scale == 1.0
    alpha, sigma = (c[:, None, None, None] for c in schedule.alpha_sigma(call.t))
    noise = (call.x_t - alpha * x0) / sigma
    output = call.prediction.output
    said = {
        "epsilon": output,
        "v_prediction": alpha * output + sigma * call.x_t,
        "sample": (call.x_t - alpha * output) / sigma,
    }[kind]
    expected = nn.functional.mse_loss(alpha * said, alpha * noise)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(w.grad is None for w in scores.real.parameters())
    assert scores.fake.mean.grad.abs() > 0 and scores.fake.log_std.grad.abs() > 0


def test_fake_score_loss_never_reaches_the_student(make_scores: Any, text: Text) -> None:
    x0 = torch.randn(SHAPE, requires_grad=True)
    (loss,) = (
        SwiftBrush()
        .fake_score_loss(StudentSample(x0, text([0.0] * 4)), make_scores(), step_random())
        .losses.values()
    )
    loss.backward()
    assert x0.grad is None


def dropped_rows(
    objective: SwiftBrush, scores: Any, condition: Condition, step: int, indices: Tensor
) -> Tensor:
    """Which samples of a fake-score turn were trained without text, boolean [B]."""
    scores.calls.clear()
    sample = StudentSample(torch.zeros(len(indices), 1, 1, 1), condition)
    told = objective.fake_score_loss(sample, scores, StepRandom(0, step, indices)).numbers["dropped_prompts"]
    rows = scores.calls[0].condition.tensors["text"] == -7
    torch.testing.assert_close(torch.as_tensor(told), rows.float().mean())
    return rows


def test_dropout_is_one_decision_for_the_global_batch(make_scores: Any, text: Text) -> None:
    scores, objective = make_scores(), SwiftBrush()
    decisions = []
    for step in range(1500):
        first = dropped_rows(objective, scores, text([1.0] * 2, null=-7.0), step, torch.tensor([0, 1]))
        second = dropped_rows(objective, scores, text([1.0] * 3, null=-7.0), step, torch.tensor([2, 3, 4]))
        together = torch.cat([first, second])
        assert together.all() or not together.any()
        decisions.append(bool(together[0]))
    rate = sum(decisions) / len(decisions)
    assert abs(rate - 0.1) < 5 * math.sqrt(0.09 / len(decisions))


def test_dropout_per_sample(make_scores: Any, text: Text) -> None:
    scores, n = make_scores(), 4000
    objective = SwiftBrush(dropout_per_sample=True)
    condition = text([1.0] * n, null=-7.0)
    dropped = dropped_rows(objective, scores, condition, 0, torch.arange(n))
    assert abs(dropped.float().mean() - 0.1) < 5 * math.sqrt(0.09 / n)
    part = dropped_rows(objective, scores, condition[:1000], 0, torch.arange(1000, 2000))
    assert torch.equal(part, dropped[1000:2000])
    assert not torch.equal(dropped, dropped_rows(objective, scores, condition, 1, torch.arange(n)))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("probability", "all_dropped"), [(0.0, False), (1.0, True)])
def test_dropout_at_its_ends(
    make_scores: Any, text: Text, per_sample: bool, probability: float, all_dropped: bool
) -> None:
    objective = SwiftBrush(prompt_dropout=probability, dropout_per_sample=per_sample)
    for step in range(20):
        rows = dropped_rows(objective, make_scores(), text([1.0] * 8, null=-7.0), step, torch.arange(8))
        assert rows.tolist() == [all_dropped] * 8


def test_losses_do_not_depend_on_the_split_into_micro_batches(make_scores: Any, text: Text) -> None:
    scores = make_scores(real=(1.0, 0.3, 1.0), fake=(-0.5, 2.0, -1.0))
    objective = SwiftBrush(UniformGuidance(1, 5, per_sample=True), dropout_per_sample=True)
    x0 = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    condition = text(torch.randn(8))

    def losses(indices: Tensor) -> Tensor:
        sample, random = StudentSample(x0[indices], condition[indices]), StepRandom(0, 5, indices)
        student = objective.student_loss(sample, scores, random).losses["vsd"]
        return torch.stack([student, objective.fake_score_loss(sample, scores, random).losses["denoising"]])

    whole = losses(torch.arange(8))
    parts = (losses(torch.arange(6)) * 6 + losses(torch.arange(6, 8)) * 2) / 8
    assert whole.dtype == torch.float64
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=0)
    assert not torch.allclose(losses(torch.arange(6)), whole, rtol=1e-3)


def test_half_precision_samples_are_scored_in_float32(make_scores: Any, text: Text) -> None:
    scores = make_scores()
    x0 = torch.randn(SHAPE).bfloat16().requires_grad_()
    sample = StudentSample(x0, text([0.0] * 4))
    student = SwiftBrush().student_loss(sample, scores, step_random()).losses["vsd"]
    fake = SwiftBrush().fake_score_loss(sample, scores, step_random()).losses["denoising"]
    assert student.dtype == fake.dtype == torch.float32
    # The same as of the same numbers in float32: noise and noised samples were never rounded.
    sample = StudentSample(x0.detach().float(), sample.condition)
    assert torch.equal(student, SwiftBrush().student_loss(sample, scores, step_random()).losses["vsd"])
    assert torch.equal(fake, SwiftBrush().fake_score_loss(sample, scores, step_random()).losses["denoising"])
    student.backward()
    assert x0.grad is not None and x0.grad.abs().sum() > 0


class BrokenNetwork(nn.Module):
    """Returns one NaN and one infinity in an otherwise zero output."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = torch.zeros_like(x_t)
        output[0, 0, 0, 0] = math.nan
        output[1, 0, 0, 0] = math.inf
        return output


def test_non_finite_score_gradients_are_counted_and_not_hidden(make_scores: Any, text: Text) -> None:
    scores = make_scores()
    scores.real = BrokenNetwork()
    objective = SwiftBrush(1.0)
    losses, numbers = objective.student_loss(
        StudentSample(torch.zeros(SHAPE), text([0.0] * 4)), scores, step_random()
    )
    (loss,) = losses.values()
    assert numbers["nonfinite_score_gradients"] == 2
    assert not loss.isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_dropout": 1.5}, "prompt_dropout is a probability, got 1.5"),
        ({"min_timestep": 980}, "low < high"),
        ({"min_timestep": -1}, "low < high"),
        ({"guidance_scale": float("nan")}, "finite"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwiftBrush(**arguments)


def test_timesteps_past_the_schedule_are_refused(make_scores: Any, text: Text) -> None:
    sample = StudentSample(torch.zeros(SHAPE), text([0.0] * 4))
    with pytest.raises(ValueError, match="max_timestep is 1001.*only 1000"):
        SwiftBrush(max_timestep=1001).student_loss(sample, make_scores(), step_random())
    SwiftBrush(max_timestep=1000).student_loss(sample, make_scores(), step_random())


class FlowNetwork(GaussianNetwork):
    """The same data on rectified flow: v = ε − x0 at x_σ = (1 − σ) x0 + σ ε; it is told 1000 σ."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        sigma = (t / 1000)[:, None, None, None]
        mean = self.mean + self.shift * condition.tensors["text"][:, None, None, None]
        variance = (2 * self.log_std).exp()
        distance = (x_t - (1 - sigma) * mean) / ((1 - sigma) ** 2 * variance + sigma**2)
        return sigma * distance - (mean + (1 - sigma) * variance * distance)


def test_on_rectified_flow(text: Text) -> None:
    """g = σ² (ε_teacher − ε_fake) = σ α (x0_fake − x0_teacher); v's own error for the fake score."""
    schedule = RectifiedFlow(shift=3.0)
    real, fake = (FlowNetwork(schedule, *numbers) for numbers in ((1.0, 0.3, 1.0), (-0.5, 2.0, -1.0)))
    scores = GaussianScores(schedule, real, fake)
    condition, x0 = text([1.0, 2.0, 3.0, 4.0]), torch.randn(SHAPE)
    gradient = student_gradient(SwiftBrush(2.0), scores, condition, x0)
    teacher, other = scores.calls
    u = (teacher.t[:, None, None, None] + 1) / 1000
    sigma = 3 * u / (1 + 2 * u)
    g = sigma * (1 - sigma) * (other.prediction.x0 - teacher.prediction.x0)
    torch.testing.assert_close(gradient, g / x0.numel(), rtol=1e-3, atol=1e-6)
    # the best fake score predicts the velocity of the samples: its loss is lower than any other's
    samples = StudentSample(2 + 0.5 * torch.randn(512, 1, 4, 4), text(torch.zeros(512)))
    losses = []
    for mean, std in ((2.0, 0.5), (1.9, 0.5), (2.0, 0.6)):
        scores.fake = FlowNetwork(schedule, mean, std, 0.0)
        random = StepRandom(0, 0, torch.arange(512))
        losses.append(float(SwiftBrush().fake_score_loss(samples, scores, random).losses["denoising"]))
    call = scores.calls[-1]
    velocity = random.normal("fake_noise", (1, 4, 4)) - samples.x0
    assert losses[0] < min(losses[1:])
    assert losses[-1] == pytest.approx(float((call.prediction.output - velocity).square().mean()))


def test_swiftbrush_owns_no_networks() -> None:
    objective = SwiftBrush()
    assert not [*objective.parameters_of("student"), *objective.parameters_of("fake_score")]
    assert not list(objective.parameters()) and not objective.state_dict()
