"""SiD-LSG's two losses against closed forms on Gaussian data, and a short run of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.guided import guided_prediction
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.diffusion.steps import Steps
from lightning_modules.objectives.base import StudentSample, TeacherFacts, Turn
from lightning_modules.objectives.pieces import noised
from lightning_modules.objectives.sid_lsg import SiDLSG
from tests.test_distributed import sgd
from tests.test_turns import check_processes, check_resume
from tests.tiny_distillation import PROMPTS, Hooks, distillation, fit, snapshot, watch_batches, watch_updates

Text = Callable[..., Condition]
SHAPE = (4, 2, 4, 4)  # B equal to height and width
VALUES = torch.tensor([-1.0, 0.0, 1.0, 2.0])


def step_random(batch_size: int = 4, step: int = 0) -> StepRandom:
    return StepRandom(0, step, torch.arange(batch_size))


def x0_line(schedule: NoiseSchedule, t: Tensor, mean: Tensor, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """y(x_t) = A x_t + B, the posterior mean of N(mean, std²), and A α: all [B, 1, 1, 1]."""
    alpha, sigma = (c[:, None, None, None] for c in schedule.alpha_sigma(t))
    variance = alpha**2 * std**2 + sigma**2
    slope = alpha * std**2 / variance
    return slope, mean[:, None, None, None] * sigma**2 / variance, slope * alpha


@pytest.mark.parametrize("a", [1.0, 1.2])
def test_student_gradient_equals_the_analytic_one(
    make_scores: Any, text: Text, schedule: NoiseSchedule, a: float
) -> None:
    """Through x̂, both predictions and not ω: with D = y_real − y_fake and E = y_real − x̂,

    ∂L/∂x̂ = [D' (E − a D) + D (E' − a D')] / (ω B), D' = α (A_real − A_fake), E' = α A_real − 1.
    """
    kappa, real_std, fake_std, null = 2.5, 0.5, 1.5, 0.25
    scores = make_scores(real=(1.0, real_std, 0.3), fake=(-0.5, fake_std, 0.1))
    x0 = torch.randn(SHAPE, requires_grad=True)
    objective = SiDLSG(3.0, fake_guidance=1.0, teacher_guidance=kappa, a=a)
    losses, numbers = objective.student_loss(
        StudentSample(x0, text(VALUES, null=null)), scores, step_random()
    )
    (loss,) = losses.values()
    (gradient,) = torch.autograd.grad(loss, x0)
    real, fake = scores.calls
    assert (real.role, fake.role) == ("teacher", "fake_score") and torch.equal(real.x_t, fake.x_t)
    # guidance moves the mean of the teacher's data: equal variances with and without text
    guided = null + kappa * (VALUES - null)
    real_slope, real_offset, real_change = x0_line(schedule, real.t, 1.0 + 0.3 * guided, real_std)
    fake_slope, fake_offset, fake_change = x0_line(schedule, fake.t, -0.5 + 0.1 * VALUES, fake_std)
    x_t, x = real.x_t.detach(), x0.detach()
    y_real, y_fake = real_slope * x_t + real_offset, fake_slope * x_t + fake_offset
    d, e = y_real - y_fake, y_real - x
    d_change, e_change = real_change - fake_change, real_change - 1
    omega = e.abs().mean((1, 2, 3), keepdim=True)
    expected = (d_change * (e - a * d) + d * (e_change - a * d_change)) / omega / len(x)
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1e-4)
    value = (d * (e - a * d) / omega).sum((1, 2, 3)).mean()
    torch.testing.assert_close(loss.detach(), value, rtol=1e-3, atol=1e-3)
    assert gradient.abs().max() > 0.1 and numbers["nonfinite_predictions"] == 0


def test_descent_moves_towards_the_teacher(make_scores: Any, text: Text) -> None:
    for mean, sign in ((2.0, -1), (-2.0, 1)):
        scores = make_scores(real=(mean, 0.5, 0.0), fake=(0.0, 0.5, 0.0))
        x0 = torch.zeros(SHAPE, requires_grad=True)
        (loss,) = (
            SiDLSG().student_loss(StudentSample(x0, text(VALUES)), scores, step_random()).losses.values()
        )
        assert (torch.autograd.grad(loss, x0)[0].sign() == sign).all()


def test_a_is_the_weight_of_the_squared_difference(make_scores: Any, text: Text) -> None:
    """L(a) − L(1) = (1 − a) Σ D² / ω."""
    scores = make_scores(real=(1.0, 0.5, 0.3), fake=(-0.5, 1.5, 0.1))
    sample = StudentSample(torch.randn(SHAPE), text(VALUES))
    values = [SiDLSG(a=a).student_loss(sample, scores, step_random()).losses["sid"] for a in (1.0, 1.2)]
    real, fake = (call.prediction.x0 for call in scores.calls[:2])
    omega = (sample.x0 - real).abs().mean((1, 2, 3))
    expected = -0.2 * ((real - fake).square().sum((1, 2, 3)) / omega).mean()
    torch.testing.assert_close(values[1] - values[0], expected, rtol=1e-3, atol=1e-3)


def test_zero_cfg_is_a_fake_score_without_text(make_scores: Any, text: Text) -> None:
    """Both losses are those of a fake score that is asked with the empty text alone."""
    values, x0 = torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.randn(4, 2, 4, 4)
    zero = SiDLSG(0.0, fake_guidance=0.0, teacher_guidance=1.0, prompt_dropout=0.0)
    plain = SiDLSG(1.0, fake_guidance=1.0, teacher_guidance=1.0)
    for role in ("student", "fake_score"):
        losses = []
        for objective, shift in ((zero, 0.7), (plain, 0.0)):  # a shift by the text of zero: there is none
            scores = make_scores(real=(1.0, 0.5, 0.0), fake=(-0.5, 1.5, shift))
            sample = StudentSample(x0, text(values))
            losses += objective.loss(role, sample, scores, StepRandom(0, 0, torch.arange(4))).losses.values()
        torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_fake_score_loss(make_scores: Any, text: Text, kind: str, schedule: NoiseSchedule) -> None:
    """At κ1, by the noise or by v with weight SNR / (SNR + 1), summed over a sample's values."""
    schedule = NoiseSchedule(schedule.alphas_cumprod, kind)
    scores = make_scores(fake=(0.3, 1.4, 0.5))
    scores.schedule = schedule
    x0 = torch.randn(SHAPE)
    objective = SiDLSG(train_fake_guidance=2.0, prompt_dropout=0.0)
    (loss,) = objective.fake_score_loss(
        StudentSample(x0, text(VALUES)), scores, step_random()
    ).losses.values()
    (call,) = scores.calls
    assert call.role == "fake_score" and call.guidance_scale == 2.0
    alpha, sigma = (c[:, None, None, None] for c in schedule.alpha_sigma(call.t))
    noise = (call.x_t - alpha * x0) / sigma
    output = guided_prediction(scores.fake, schedule, call.x_t, call.t, text(VALUES), 2.0).output
    if kind == "epsilon":
        error = (output - noise).square()
    else:
        snr = alpha**2 / sigma**2
        error = snr / (snr + 1) * (output - (alpha * noise - sigma * x0)).square()
    torch.testing.assert_close(loss, error.sum((1, 2, 3)).mean(), rtol=1e-3, atol=1e-3)
    loss.backward()
    assert all(w.grad is None for w in scores.real.parameters())
    assert scores.fake.mean.grad.abs() > 0


def test_timesteps_and_dropout(make_scores: Any, text: Text) -> None:
    scores, size = make_scores(), 20_000
    sample = StudentSample(torch.zeros(size, 1, 1, 1), text([1.0] * size, null=-7.0))
    SiDLSG().student_loss(sample, scores, step_random(size))
    told = SiDLSG().fake_score_loss(sample, scores, step_random(size)).numbers["dropped_prompts"]
    for call in scores.calls:
        assert (call.t.min(), call.t.max()) == (20, 979)
    dropped = scores.calls[-1].condition.tensors["text"] == -7
    assert abs(dropped.float().mean() - 0.1) < 0.012 and told == dropped.float().mean()
    SiDLSG(1.0, 1.0).fake_score_loss(sample, scores, step_random(size))
    assert (scores.calls[-1].condition.tensors["text"] == 1).all(), "no fake score without text is asked for"
    kappas = ((1.0, 1.5), (1.5, 1.0), (1.0, 1.0))  # in its own training, and in the student's
    assert [SiDLSG(*scales).prompt_dropout for scales in kappas] == [0.1, 0.1, 0.0]


def test_what_does_not_fit(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match="prompt_dropout is a probability"):
        SiDLSG(prompt_dropout=-0.1)
    facts = TeacherFacts(schedule, (4, 8, 8), Steps((999,)), lambda name: ())
    with pytest.raises(ValueError, match="max_timestep is 1001.*only 1000"):
        SiDLSG(max_timestep=1001).build(facts)


def test_the_fake_score_comes_first_on_prompts_of_its_own(tiny_sd: Path, tmp_path: Path) -> None:
    """Two batches a step, and each role's gradient reaches its own weights alone."""
    module = distillation(tiny_sd, SiDLSG())
    turns: list[str] = []
    seen: list[list[str]] = []
    judged = module.objective.loss

    def loss(role: str, sample: StudentSample, *rest: Any) -> Any:
        seen.append(sample.condition.tensors["encoder_hidden_states"].flatten().tolist())
        return judged(role, sample, *rest)

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        turns.append(role)
        names = {name.partition(".")[0] for name, p in module.named_parameters() if p.grad is not None}
        assert names == {"student" if role == "student" else "scores"}
        return update()

    module.objective.loss = loss  # type: ignore[method-assign]
    batches = watch_batches(module)
    watch_updates(module, watcher)
    before: dict[str, Tensor] = {}
    run = fit(module, tmp_path, 2, Hooks(on_start=lambda m: before.update(snapshot(m))))
    assert turns == ["fake_score", "student"] * 2 and run.global_step == 2
    assert [Turn("fake_score", 1), Turn("student", 0)] == module.objective.turns(0)
    assert [len(batch) for batch in batches] == [8, 8] and batches[0] + batches[1] != PROMPTS
    encode = module.generator.prompt_encoder.encode
    for step, batch in enumerate(batches):  # the second half is batch 1
        for place, half in ((2 * step, batch[4:]), (2 * step + 1, batch[:4])):
            assert seen[place] == encode(half).tensors["encoder_hidden_states"].flatten().tolist()
    assert any(not torch.equal(before[n], p) for n, p in snapshot(module).items() if n.startswith("student"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_through_both_scores_of_real_networks(tiny_sd: Path, checkpointing: bool) -> None:
    """One set of base weights for both, adapters switched in between: the derivative along a direction."""
    module = distillation(tiny_sd, SiDLSG(teacher_guidance=2.0), gradient_checkpointing=checkpointing)
    module.configure_model()
    module.double()
    for name, parameter in module.scores.named_parameters():
        if "lora_B" in name:  # so that the fake score is another network than the teacher
            torch.nn.init.normal_(parameter, std=0.2)
    condition = module.generator.prompt_encoder.encode(PROMPTS[:2])
    x0 = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    random = StepRandom(0, 0, torch.arange(2))

    def product(x: Tensor, omega: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """L with ω kept as it is."""
        x, x_t, t, _ = noised(x, module.networks, random, "student", module.objective.timesteps)
        real = module.networks.teacher(x_t, t, condition, 2.0).x0
        fake = module.networks.fake_score(x_t, t, condition, 1.5).x0
        omega = (x - real).abs().mean((1, 2, 3)) if omega is None else omega
        return (((real - fake) * (fake - x)).sum((1, 2, 3)) / omega).mean(), omega

    loss = module.objective.loss("student", StudentSample(x0, condition), module.networks, random).losses[
        "sid"
    ]
    (gradient,) = torch.autograd.grad(loss, x0)
    with torch.no_grad():
        direction = torch.randn(x0.shape, dtype=torch.float64)
        _, omega = product(x0)
        ahead, behind = (product(x0 + h * direction, omega)[0] for h in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3


def test_resume_is_the_uninterrupted_run(tiny_sd: Path, tmp_path: Path) -> None:
    check_resume(tiny_sd, tmp_path, SiDLSG)


@pytest.mark.parametrize("strategy", ["ddp", "shards"])
def test_two_processes_are_one(strategy: str, smaller_sd: Path, tmp_path: Path) -> None:
    slow = {role: sgd(1e-4) for role in ("student", "fake_score")}  # sums over a sample's values are large
    guided = functools.partial(SiDLSG, teacher_guidance=4.0)  # far from a difference of equal networks
    check_processes(smaller_sd, tmp_path, strategy, guided, **slow)
