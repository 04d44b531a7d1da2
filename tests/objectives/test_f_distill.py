"""f-distill's weights, and the reverse KL as DMD2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.divergences import DIVERGENCES
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.f_distill import FDistill
from lightning_modules.objectives.pieces import normalised
from tests.objectives.analytic import FAKE, REAL, VALUES, built, log_ratio, student_gradient

# f of D_f(p‖q) = ∫ q f(p/q), and the factor that the weights leave out
GENERATORS: dict[str, tuple[Any, float]] = {
    "reverse_kl": (lambda r: -r.log(), 1),
    "forward_kl": (lambda r: r * r.log(), 1),
    "jeffreys": (lambda r: (r - 1) * r.log(), 1),
    "jensen_shannon": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), 1),
    "softened_reverse_kl": (lambda r: (r + 1) * ((r + 1) / (2 * r)).log(), 1),
    "squared_hellinger": (lambda r: (r.sqrt() - 1) ** 2, 0.5),
    "neyman": (lambda r: (r - 1) ** 2 / r, 2),
    "pearson": (lambda r: (r - 1) ** 2, 2),
}


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_weights_are_those_of_the_divergence(name: str) -> None:
    """h = r² f'' and −r² h'', differentiated by autograd."""
    f, factor = GENERATORS[name]

    def derivative(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value.sum(), r, create_graph=True)[0] if value.requires_grad else 0 * r

    r = torch.linspace(0.1, 5, 50, dtype=torch.float64, requires_grad=True)
    weight, direct = DIVERGENCES[name]
    torch.testing.assert_close(factor * weight(r), r**2 * derivative(derivative(f(r))))
    torch.testing.assert_close(direct(r), -(r**2) * derivative(derivative(weight(r))))


def with_exact_ratio(objective: Any, schedule: NoiseSchedule) -> Any:
    """The discriminator is the Gaussians' own."""
    objective.discriminator.log_ratio = lambda x_t, t, *_: log_ratio(schedule, x_t, t)
    return built(objective, schedule)


def test_the_reverse_kl_is_dmd2(make_scores: Any, text: Any, schedule: NoiseSchedule) -> None:
    scores = make_scores(real=REAL, fake=FAKE)
    objective = with_exact_ratio(FDistill(Discriminator(["x"]), "reverse_kl", guidance_scale=2.0), schedule)
    ours = student_gradient(objective, text(VALUES), scores, "matching")
    other = student_gradient(DMD2(2.0), text(VALUES), scores)
    assert all(torch.equal(a, b) for a, b in zip(ours, other))


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "neyman"])
def test_the_gradient_of_each_sample_is_weighted(
    name: str, make_scores: Any, text: Any, schedule: NoiseSchedule
) -> None:
    """By h(r) over its mean, r by its mean among samples of the same tenth of the schedule."""
    scores = make_scores(real=REAL, fake=FAKE)
    objective = with_exact_ratio(FDistill(Discriminator(["x"]), name, ratio_range=(0.5, 3.0)), schedule)
    _, _, ours = student_gradient(objective, text(VALUES), scores, "matching")
    _, _, plain = student_gradient(DMD2(), text(VALUES), scores)
    call = scores.calls[-1]
    ratio = log_ratio(schedule, call.x_t.detach(), call.t).exp().clamp(0.5, 3.0)
    tenth = call.t // 100
    r = torch.stack([ratio[i] / ratio[tenth == tenth[i]].mean() for i in range(4)])
    h = {"forward_kl": r, "jensen_shannon": r / (1 + r), "neyman": 1 / r}[name]
    torch.testing.assert_close(ours, (h / h.mean())[:, None, None, None] * plain, rtol=1e-4, atol=1e-7)


def test_means_are_those_of_all_processes(schedule: NoiseSchedule) -> None:
    """Another process has one sample, with r = 5, in the first tenth and h = 6."""
    objective, other = built(FDistill(Discriminator(["x"])), schedule), torch.zeros(2, 10)
    other[:, 0] = torch.tensor([5.0, 1.0])
    objective.mean = lambda sums: (sums + other) / 2
    balanced = objective._balanced(torch.tensor([1.0, 3.0]), torch.tensor([50, 950]))
    torch.testing.assert_close(balanced, torch.tensor([1 / 3, 1.0]))
    weights = normalised(torch.tensor([1.0, 3.0]), lambda mean: (mean + 6) / 2)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75]))


def test_an_unknown_divergence() -> None:
    with pytest.raises(ValueError, match="unknown divergence 'kl': choose one of reverse_kl"):
        FDistill(Discriminator(["x"]), "kl")
