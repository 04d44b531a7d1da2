"""Gaussian data, for which every score is known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.guided import guided_prediction
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.schedule import NoiseSchedule
from tests.objectives.analytic import log_ratio


class GaussianNetwork(nn.Module):
    """The exact ε-network of data x0 ~ N(m + shift · text, s²): ε(x, t) = σ (x − α m) / (α² s² + σ²).

    From s(x_t) = −(x_t − α m) / (α² s² + σ²) and ε = −σ s. ``text`` is the condition, one number per sample.
    """

    def __init__(self, schedule: NoiseSchedule, mean: float, std: float, shift: float) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (c[:, None, None, None] for c in self.schedule.alpha_sigma(t))
        mean = self.mean + self.shift * condition.tensors["text"][:, None, None, None]
        variance = (2 * self.log_std).exp()
        return sigma * (x_t - alpha * mean) / (alpha**2 * variance + sigma**2)

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, deviation and shift by the text."""
        return self.mean, self.log_std.exp(), self.shift


@dataclass
class Call:
    """What one score function was asked."""

    role: str
    x_t: Tensor
    t: Tensor
    condition: Condition
    guidance_scale: float | Tensor
    negative: Condition | None
    prediction: Prediction


@dataclass
class GaussianScores:
    """Teacher and fake score of Gaussian data; records its calls.

    Features of the layer log_ratio are what a perfect discriminator says if the fake score is right,
    log p_real(x_t) / p_fake(x_t) of the whole sample, at each place; those of any other layer are x_t.
    """

    schedule: NoiseSchedule
    real: nn.Module
    fake: nn.Module
    calls: list[Call] = field(default_factory=list)

    def _read(
        self,
        role: str,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: float | Tensor,
        negative: Condition | None,
        features: Sequence[str] = (),
    ) -> Prediction:
        network = self.real if role == "teacher" else self.fake
        result = guided_prediction(network, self.schedule, x_t, t, condition, guidance_scale, negative)
        self.calls.append(Call(role, x_t, t, condition, guidance_scale, negative, result))
        found = dict.fromkeys(features, x_t)
        if "log_ratio" in found:
            data = self.real.data, self.fake.data
            mean = log_ratio(self.schedule, x_t, t, condition.tensors["text"], *data)
            found["log_ratio"] = (x_t[0].numel() * mean)[:, None, None, None].expand_as(x_t)
        return replace(result, features=found)

    def teacher(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        negative: Condition | None = None,
        features: Sequence[str] = (),
    ) -> Prediction:
        return self._read("teacher", x_t, t, condition, guidance_scale, negative, features)

    def fake_score(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        negative: Condition | None = None,
        features: Sequence[str] = (),
    ) -> Prediction:
        return self._read("fake_score", x_t, t, condition, guidance_scale, negative, features)


MakeScores = Callable[..., GaussianScores]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def schedule() -> NoiseSchedule:
    """Stable Diffusion's: scaled-linear β from 0.00085 to 0.012, 1,000 timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return NoiseSchedule((1 - betas).cumprod(0))


@pytest.fixture
def make_scores(schedule: NoiseSchedule) -> MakeScores:
    """make_scores(real=(mean, std, shift), fake=(mean, std, shift)) -> GaussianScores."""

    def make(
        real: tuple[float, float, float] = (1.0, 0.5, 0.0), fake: tuple[float, float, float] = (0.0, 1.0, 0.0)
    ) -> GaussianScores:
        return GaussianScores(schedule, GaussianNetwork(schedule, *real), GaussianNetwork(schedule, *fake))

    return make


@pytest.fixture
def text() -> Callable[..., Condition]:
    """text(values, null=0) -> a condition of one number per sample."""

    def make(values: list[float] | Tensor, null: float = 0.0) -> Condition:
        return Condition({"text": torch.as_tensor(values)}, {"text": torch.tensor([null])})

    return make
