"""The discriminator's terms, and whose weights they reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from common.errors import UserError
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.objectives.base import Real, StudentSample
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.sid_lsg import SiDLSG
from tests.objectives.analytic import (
    SHAPE,
    VALUES,
    alpha_sigma,
    facts,
    real_pictures,
    step_random,
    student_gradient,
)
from tests.tiny_distillation import PROMPTS, distillation, reached


def mean_head(discriminator: Discriminator, schedule: NoiseSchedule, slope: float = 2.0) -> Discriminator:
    """Whose logit is slope · mean(features), so slope · mean(x_t) with Gaussian scores."""
    discriminator.build(facts(schedule))
    scale = torch.nn.Parameter(torch.tensor(slope))
    for head in discriminator.heads:
        head.layers = None
        head.scale = scale
        head.forward = lambda features: scale * features.mean((1, 2, 3))
    return discriminator


@pytest.mark.parametrize(("loss", "heads"), [("softplus", 1), ("softplus", 0), ("hinge", 2)])
def test_terms_and_gradient(
    loss: str, heads: int, make_scores: Any, text: Any, schedule: NoiseSchedule
) -> None:
    """The student is drawn to what is called real, by a gradient through the features; r1 beside it."""
    slope = 2.0 if heads else 1.0
    discriminator = Discriminator(
        ["x"], loss=loss, heads=heads, student_weight=0.5, weight=0.25, r1=3.0, r1_noise=0.2
    )
    mean_head(discriminator, schedule)
    scores, condition, captions = make_scores(), text(VALUES), VALUES.flip(0)
    real = real_pictures(text(captions))
    x0 = torch.randn(SHAPE, requires_grad=True)
    sample = StudentSample(x0, condition, real=real)
    term = discriminator.student_term(sample, scores, step_random())
    (gradient,) = torch.autograd.grad(term, x0)
    (call,) = scores.calls
    assert call.condition is condition
    alpha, _ = alpha_sigma(schedule, call.t)
    x_t = call.x_t.detach()
    logits = slope * x_t.mean((1, 2, 3))
    if heads:
        change = torch.ones(4) if loss == "hinge" else (-logits).sigmoid()
        expected = -0.5 * slope * alpha * change[:, None, None, None] / x0[0].numel() / 4
        torch.testing.assert_close(gradient, expected.expand(SHAPE), rtol=1e-4, atol=1e-7)
        value = -logits.mean() if loss == "hinge" else F.softplus(-logits).mean()
    else:  # a logit for each place
        value = F.softplus(-x_t.mean(1)).mean()
        assert (gradient < 0).all()
    torch.testing.assert_close(term.detach(), 0.5 * value)

    own = discriminator.own_terms(sample, scores, step_random())
    assert torch.equal(scores.calls[-1].condition.tensors["text"], torch.cat([VALUES, captions, captions]))
    fake, true, shaken = scores.calls[-1].x_t.split(4)
    per_place = (lambda x: x.mean(1)) if not heads else (lambda x: slope * x.mean((1, 2, 3)))
    a, b, c = (per_place(x) for x in (fake.detach(), true, shaken))
    hinge, soft = (lambda x: (1 + x).clamp(min=0)), F.softplus
    f = hinge if loss == "hinge" else soft
    torch.testing.assert_close(own["detection"].detach(), 0.25 * (f(a).mean() + f(-b).mean()))
    torch.testing.assert_close(own["r1"].detach(), 0.25 * 3.0 * (b - c).square().mean())
    # the shaken pictures are the real ones with noise of that deviation, at the same noise and t
    t = scores.calls[-1].t
    assert torch.equal(t[4:8], t[8:])
    shift = 0.2 * real.random.normal("r1", SHAPE[1:])
    torch.testing.assert_close(shaken, true + alpha_sigma(schedule, t[4:8])[0] * shift)


@pytest.mark.parametrize("role", ["teacher", "fake_score"])
def test_features_come_from_the_named_role(
    role: Any, make_scores: Any, text: Any, schedule: NoiseSchedule
) -> None:
    objective = DMD2(1.0, discriminator=Discriminator(["x"], role))
    objective.build(facts(schedule))
    scores = make_scores()
    sample = StudentSample(torch.randn(SHAPE), text(VALUES), real=real_pictures(text(VALUES)))
    terms = objective.loss("fake_score", sample, scores, step_random())
    assert set(terms.losses) == {"denoising", "detection"}
    assert [call.role for call in scores.calls] == ["fake_score", role]
    assert set(objective.parameters_of("fake_score")) == set(objective.discriminator.parameters())
    assert not list(objective.parameters_of("student"))
    scores.calls.clear()
    student_gradient(objective, text(VALUES), scores, "adversarial")
    assert [call.role for call in scores.calls] == ["teacher", "fake_score", role]


@pytest.mark.parametrize(
    ("method", "heads", "role", "trained"),
    [
        (DMD2, 1, "fake_score", {"objective", "scores"}),
        (DMD2, 1, "teacher", {"objective"}),
        (SiDLSG, 0, "fake_score", {"scores"}),
    ],
)
def test_whose_weights_its_terms_reach(
    method: Callable[..., Any], heads: int, role: Any, trained: set[str], tiny_sd: Path
) -> None:
    """In a real network: its own terms don't reach the student's sample, and the student's term does."""
    discriminator = Discriminator(["mid_block"], role, heads=heads, r1=1.0)
    module = distillation(tiny_sd, method(discriminator=discriminator))
    module.configure_model()
    condition = module.generator.prompt_encoder.encode(PROMPTS[:2])
    x0, latents = torch.randn(2, 2, 4, 8, 8)
    real = Real(latents, condition, step_random(2))
    sample = StudentSample(x0.requires_grad_(), condition, real=real)
    losses = module.objective.loss("fake_score", sample, module.networks, step_random(2)).losses
    for name in ("detection", "r1"):
        module.zero_grad()
        losses[name].backward(retain_graph=True)
        assert reached(module) == trained, name
    assert x0.grad is None
    fooled = module.objective.loss("student", sample, module.networks, step_random(2)).losses["adversarial"]
    (gradient,) = torch.autograd.grad(fooled, x0)
    assert gradient.flatten(1).any(1).all()


def test_the_log_ratio_is_the_mean_of_the_heads(make_scores: Any, text: Any, schedule: NoiseSchedule) -> None:
    """Positive where the logits say real; without a gradient."""
    discriminator, x_t = mean_head(Discriminator(["x"], heads=2), schedule), torch.randn(SHAPE)
    found = discriminator.log_ratio(x_t, torch.arange(4), text(VALUES), make_scores())
    torch.testing.assert_close(found, 2.0 * x_t.mean((1, 2, 3)))
    assert not found.requires_grad


def test_heads_begin_anew_by_the_step(schedule: NoiseSchedule) -> None:
    """The same heads for all processes and passes of a step, a share of them, others at other steps."""
    discriminator = Discriminator(["x"], heads=40, refresh=0.25)
    discriminator.build(facts(schedule))

    def weights() -> torch.Tensor:
        return torch.stack([head.layers[0].weight.flatten() for head in discriminator.heads]).clone()

    before = weights()
    discriminator._refresh(StepRandom(0, 3, torch.arange(4)))
    after = weights()
    changed = (before != after).any(1)
    assert 3 <= int(changed.sum()) <= 18
    assert len(after[changed].unique(dim=0)) == changed.sum(), "each by weights of its own"
    discriminator._refresh(StepRandom(0, 3, torch.arange(4, 6)))
    assert torch.equal(weights(), after)
    discriminator._refresh(StepRandom(0, 4, torch.arange(4)))
    assert not torch.equal(weights(), after)


def test_what_cannot_be(tiny_sd: Path, make_scores: Any, text: Any, schedule: NoiseSchedule) -> None:
    for settings, message in (
        ({"layers": []}, "at least one layer"),
        ({"layers": ["a"], "refresh": 2.0}, "refresh a probability"),
        ({"layers": ["a"], "heads": 0, "role": "teacher"}, "nothing is trained on the teacher's features"),
    ):
        with pytest.raises(ValueError, match=message):
            Discriminator(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no layer 'midblock'; near it are mid_block"):
        distillation(tiny_sd, DMD2(discriminator=Discriminator(["midblock"]))).configure_model()
    objective = DMD2(discriminator=Discriminator(["x"]))
    objective.build(facts(schedule))
    with pytest.raises(ValueError, match="learns from real pictures, and the samples have none"):
        objective.loss(
            "fake_score", StudentSample(torch.zeros(SHAPE), text(VALUES)), make_scores(), step_random()
        )
