"""Uni-Instruct's loss against closed forms on Gaussian data; the reverse KL as SiD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.divergences import DIVERGENCES
from lightning_modules.objectives.sid_lsg import SiDLSG
from lightning_modules.objectives.uni_instruct import UniInstruct
from tests.objectives.analytic import (
    FAKE,
    REAL,
    VALUES,
    alpha_sigma,
    built,
    log_ratio,
    posterior_mean,
    student_gradient,
)


def exact(divergence: str, schedule: NoiseSchedule, **settings: Any) -> Any:
    """With the Gaussians' own ratio."""
    objective = UniInstruct(Discriminator(["x"]), divergence, ratio_range=(0.5, 2.0), **settings)
    objective.discriminator.log_ratio = lambda x_t, t, *_: log_ratio(schedule, x_t, t)
    return built(objective, schedule)


def test_the_reverse_kl_is_sid(make_scores: Any, text: Any, schedule: NoiseSchedule) -> None:
    scores = make_scores(real=REAL, fake=FAKE)
    ours = student_gradient(exact("reverse_kl", schedule), text(VALUES), scores, "sid")
    other = student_gradient(SiDLSG(), text(VALUES), scores)
    for a, b in zip(ours, other):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "pearson"])
def test_student_gradient_equals_the_analytic_one(
    name: str, make_scores: Any, text: Any, schedule: NoiseSchedule
) -> None:
    """Per sample h(r) ∇SiD − ½ r² h'' SNR ‖D‖² D / ω / B, r that of the noised Gaussians in its range."""
    scores, plain = make_scores(real=REAL, fake=FAKE), {"teacher_guidance": 1.0, "fake_guidance": 1.0}
    x0, _, gradient = student_gradient(exact(name, schedule, **plain), text(VALUES), scores, "sid")
    _, _, sid = student_gradient(SiDLSG(**plain), text(VALUES), scores)
    call = scores.calls[0]
    x_t, (alpha, sigma) = call.x_t.detach(), alpha_sigma(schedule, call.t)
    real, fake = (posterior_mean(schedule, x_t, call.t, data) for data in (REAL, FAKE))
    ratio = log_ratio(schedule, x_t, call.t).exp()[:, None, None, None]
    r = ratio.clamp(0.5, 2.0)
    assert not r.equal(ratio)
    h, second = {
        "forward_kl": (r, 0 * r),
        "jensen_shannon": (r / (1 + r), -2 / (1 + r) ** 3),
        "pearson": (r**2, 2 + 0 * r),
    }[name]
    d, omega = real - fake, (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    squares = d.square().sum((1, 2, 3), keepdim=True)
    direct = -0.5 * r**2 * second * (alpha / sigma) ** 2 * squares * d / omega / len(x0)
    torch.testing.assert_close(gradient, h * sid + direct, rtol=5e-3, atol=1e-3)
    assert name == "forward_kl" or direct.abs().max() > 1e-2


@dataclass
class Gaussian:
    """Noised N(m, s²) in one dimension: moments [m, s]."""

    moments: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor

    def log(self, x_t: torch.Tensor) -> torch.Tensor:
        m, s = self.moments
        variance = self.alpha**2 * s**2 + self.sigma**2
        return -((x_t - self.alpha * m) ** 2) / (2 * variance) - variance.log() / 2

    def score(self, x_t: torch.Tensor) -> torch.Tensor:
        m, s = self.moments
        return -(x_t - self.alpha * m) / (self.alpha**2 * s**2 + self.sigma**2)

    def x0(self, x_t: torch.Tensor) -> torch.Tensor:
        return (x_t + self.sigma**2 * self.score(x_t)) / self.alpha


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "pearson"])
def test_what_the_exact_gradient_has_more(name: str, schedule: NoiseSchedule) -> None:
    """In one dimension at one t, by quadrature over start noise and noise: L, and the two parts left out.

    x̂ = m + s z is differentiated by m and s; D_f needs no formula of ours. Both sides without ω and times
    2 α²/σ⁴, by which L is divided.
    """
    t, weights = torch.tensor([400]), DIVERGENCES[name]
    alpha, sigma = (value.double() for value in schedule.alpha_sigma(t))
    nodes = torch.linspace(-8, 8, 401, dtype=torch.float64)
    z, noise = torch.meshgrid(nodes, nodes, indexing="ij")
    density = torch.exp(-(z**2 + noise**2) / 2) * (nodes[1] - nodes[0]) ** 2 / (2 * torch.pi)
    real = Gaussian(torch.tensor([0.0, 1.0], dtype=torch.float64), alpha, sigma)
    moments = torch.tensor([0.6, 1.3], dtype=torch.float64, requires_grad=True)
    x0 = moments[0] + moments[1] * z
    x_t = alpha * x0 + sigma * noise

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (density * values).sum()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, moments, retain_graph=True)[0]

    def h(r: torch.Tensor) -> torch.Tensor:
        return weights[0](r)

    live = Gaussian(moments, alpha, sigma)
    exact = mean(h((real.log(x_t) - live.log(x_t)).exp()) * (live.score(x_t) - real.score(x_t)) ** 2)
    fake = Gaussian(moments.detach(), alpha, sigma)
    r, difference = (real.log(x_t) - fake.log(x_t)).exp(), real.x0(x_t) - fake.x0(x_t)
    implicit, direct = (weight(r).detach() for weight in weights)
    ours = implicit * difference * (fake.x0(x_t) - x0)
    ours = ours + (0.5 * direct * (alpha / sigma) ** 2 * difference**3).detach() * x0
    own = h(r) * (difference * (fake.x0(x_t) - x0)).detach()
    slope = torch.autograd.grad(h(u := r.detach().requires_grad_()).sum(), u, allow_unused=True)[0]
    rest = 0.5 * (implicit - r.detach() * (0 if slope is None else slope)) * difference**2
    factor = 2 * alpha**2 / sigma**4
    parts = [factor * gradient(mean(part)) for part in (ours, own, rest)]
    torch.testing.assert_close(sum(parts[1:], parts[0]), gradient(exact), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(parts[0], gradient(exact), rtol=1e-2)
