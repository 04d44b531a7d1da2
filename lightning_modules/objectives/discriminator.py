"""A discriminator: heads on named features of the teacher or the fake score, at noised samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.diffusion.broadcast import at_least_float32
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.timesteps import UniformTimesteps
from lightning_modules.objectives.base import Networks, StudentSample, TeacherFacts
from lightning_modules.objectives.pieces import noised

NEEDS_REAL = "a discriminator learns from real pictures, and the samples have none"


class Discriminator(nn.Module):
    """Tells noised student samples from noised real latents; x_t = α_t x0 + σ_t ε, t over the whole schedule.

    Features of the fake score (DMD2, SiDA) are trained with the heads, those of the teacher (f-distill) are
    not. With l = softplus, or l(x) = max(0, 1 + x) in the own turn and l(x) = x in the student's (hinge)::

        student:  student_weight · mean l(−D(x_t))
        own:      weight · [mean l(D(x_t)) + mean l(−D(real_t)) + r1 · mean (D(real_t) − D(real'_t))²]

    where real' = real + r1_noise · n at the same ε and t: the approximate R1 penalty (arXiv 2501.08316).

    Args:
        layers: names of layers of the network, e.g. mid_block.
        role: whose features: fake_score or teacher.
        student_weight: of the student's term.
        weight: of the own term.
        loss: softplus or hinge.
        heads: heads on each layer; 0: none, the mean over a layer's channels is the logit of each place
            (SiDA, arXiv 2410.14919).
        refresh: probability of each head to begin anew in a turn (NitroFusion, arXiv 2412.02030: 0.01); its
            optimizer's moments stay.
        r1: weight of the approximate R1 penalty.
        r1_noise: deviation of its noise.

    Raises:
        ValueError: a number is out of range, or nothing could be trained.
    """

    def __init__(
        self,
        layers: list[str],
        role: Literal["fake_score", "teacher"] = "fake_score",
        student_weight: float = 1e-3,
        weight: float = 1e-2,
        loss: Literal["softplus", "hinge"] = "softplus",
        heads: int = 1,
        refresh: float = 0.0,
        r1: float = 0.0,
        r1_noise: float = 0.1,
    ) -> None:
        super().__init__()
        if not layers or heads < 0 or not 0 <= refresh <= 1:
            raise ValueError(
                f"layers={layers}, heads={heads}, refresh={refresh}: at least one layer, heads not negative, "
                "refresh a probability"
            )
        if min(student_weight, weight, r1, r1_noise) < 0 or loss not in ("softplus", "hinge"):
            raise ValueError(
                f"student_weight={student_weight}, weight={weight}, r1={r1}, r1_noise={r1_noise}, "
                f"loss={loss}: weights and noise not negative, the loss softplus or hinge"
            )
        if not heads and role == "teacher":
            raise ValueError("without heads nothing is trained on the teacher's features: set heads to 1")
        self.layers, self.role, self.hinge, self.count = layers, role, loss == "hinge", heads
        self.student_weight, self.weight = student_weight, weight
        self.refresh, self.r1, self.r1_noise = refresh, r1, r1_noise
        self.heads = nn.ModuleList()

    def build(self, facts: TeacherFacts) -> None:
        """Make the heads; raises ValueError if the network has no such layer."""
        self.timesteps = UniformTimesteps(0, facts.schedule.num_timesteps)
        shapes = [facts.feature_shape(name) for name in self.layers]
        self.heads = nn.ModuleList(Head(shape) for shape in shapes for _ in range(self.count))

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition, networks: Networks) -> Tensor:
        """D(x_t, t) of each head (without heads: of each place), [B, H]; positive means real."""
        network = networks.teacher if self.role == "teacher" else networks.fake_score
        features = network(x_t, t, condition, features=self.layers).features
        if not self.count:
            maps = [_as_map(features[name]).mean(1).flatten(1) for name in self.layers]
            return at_least_float32(torch.cat(maps, 1))
        names = [name for name in self.layers for _ in range(self.count)]
        logits = [head(features[name]) for name, head in zip(names, self.heads)]
        return at_least_float32(torch.stack(logits, 1))

    def student_term(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Tensor:
        """What the student minimises: its gradient goes through the network into ``sample.x0``."""
        _, x_t, t, _ = noised(sample.x0, networks, random, "adversarial", self.timesteps)
        logits = self.logits(x_t, t, sample.condition, networks)
        return self.student_weight * (-logits if self.hinge else F.softplus(-logits)).mean()

    def own_terms(self, sample: StudentSample, networks: Networks, random: StepRandom) -> dict[str, Tensor]:
        """``{"detection": …}``, and ``"r1"`` if it has a weight."""
        if sample.real is None:
            raise ValueError(NEEDS_REAL)
        self._refresh(random)
        real, own = sample.real, sample.real.random
        fake = noised(sample.x0.detach(), networks, random, "detection", self.timesteps)
        true = noised(real.x0, networks, own, "detection_real", self.timesteps)
        x_t, t, condition = [fake.x_t, true.x_t], [fake.t, true.t], sample.condition.concat(real.condition)
        if self.r1:
            shaken = true.x0 + self.r1_noise * own.normal("r1", true.x0.shape[1:]).to(true.x0)
            x_t.append(networks.schedule.add_noise(shaken, true.noise, true.t))
            t, condition = [*t, true.t], condition.concat(real.condition)
        logits = self.logits(torch.cat(x_t), torch.cat(t), condition, networks)
        on_fake, on_real, *on_shaken = logits.split([len(part) for part in x_t])
        loss = (lambda x: F.relu(1 + x)) if self.hinge else F.softplus
        terms = {"detection": self.weight * (loss(on_fake).mean() + loss(-on_real).mean())}
        if on_shaken:
            terms["r1"] = self.weight * self.r1 * (on_real - on_shaken[0]).square().mean()
        return terms

    def log_ratio(self, x_t: Tensor, t: Tensor, condition: Condition, networks: Networks) -> Tensor:
        """log p_real(x_t) / p_fake(x_t) [B]: where softplus is least, the logit is that; without gradient."""
        with torch.no_grad():
            return self.logits(x_t, t, condition, networks).mean(1)

    @torch.no_grad()
    def _refresh(self, random: StepRandom) -> None:
        """Begin some heads anew, by numbers of the step: the same on all processes and in all passes."""
        for number, head in enumerate(self.heads if self.refresh else ()):
            if random.shared_uniform(f"refresh_{number}") < self.refresh:
                seed = int(random.shared_uniform(f"refresh_seed_{number}") * 2**53)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    fresh = Head(head.shape)  # type: ignore[arg-type]
                for old, new in zip(head.parameters(), fresh.parameters()):
                    old.copy_(new)


class Head(nn.Module):
    """Features of a layer -> one logit [B].

    Args:
        shape: of one sample's features: [C, H, W], or tokens [N, C].
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        is_map = len(shape) == 3
        channels = shape[0] if is_map else shape[-1]
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3 if is_map else 1, padding="same"),
            nn.GroupNorm(math.gcd(32, channels), channels),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Mean over the places."""
        logits: Tensor = self.layers(_as_map(features))
        return logits.mean((1, 2, 3))


def _as_map(features: Tensor) -> Tensor:
    """[B, C, H, W]; tokens [B, N, C] become [B, C, N, 1]."""
    return features if features.ndim == 4 else features.mT[..., None]
