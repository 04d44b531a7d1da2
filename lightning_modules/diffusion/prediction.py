"""What a diffusion network said about a noised sample, readable as ε, x0, v, flow or score.

All conversions follow from x_t = α_t x0 + σ_t ε and the definition of the network's output:

- ``epsilon``: the noise ε (DDPM, arXiv 2006.11239);
- ``sample``: the clean sample x0;
- ``v_prediction``: v = α_t ε − σ_t x0 (progressive distillation, arXiv 2202.00512, appendix D);
- ``flow``: u = ε − x0, the velocity of rectified flow (arXiv 2209.03003) with noise at t = 1.

They are solved for general (α, σ), so none of them assumes α² + σ² = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_modules.diffusion.broadcast import at_least_float32, expand_like

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")


def check_prediction_type(kind: str) -> None:
    """Raise ``ValueError`` unless ``kind`` is one of :data:`PREDICTION_TYPES`."""
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction type {kind!r}: expected one of {', '.join(PREDICTION_TYPES)}")


@dataclass(frozen=True)
class Prediction:
    """A network output [B, …] with all that is needed to read it; the formulas run in float32 at least.

    Attributes:
        output: what the network returned, [B, …], any floating type.
        kind: what it stands for, one of :data:`PREDICTION_TYPES`.
        x_t: the noised sample the network saw, same shape as ``output``.
        alpha: α_t, [B].
        sigma: σ_t, [B].
        features: outputs of layers that were asked for, by name, each [B, …].

    Raises:
        ValueError: on an unknown ``kind``, or if ``output`` and ``x_t`` differ in shape.
    """

    output: Tensor
    kind: str
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prediction_type(self.kind)
        if self.output.shape != self.x_t.shape:
            raise ValueError(
                f"network returned shape {tuple(self.output.shape)} for an input of {tuple(self.x_t.shape)}"
            )

    def _terms(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(output, x_t, α, σ), ready to broadcast and in the type the formulas run in."""
        x_t = at_least_float32(self.x_t)
        alpha, sigma = expand_like(self.alpha, x_t), expand_like(self.sigma, x_t)
        return at_least_float32(self.output), x_t, alpha, sigma

    @property
    def x0(self) -> Tensor:
        """The clean sample, [B, …]."""
        output, x_t, alpha, sigma = self._terms()
        if self.kind == "sample":
            return output
        if self.kind == "epsilon":
            return (x_t - sigma * output) / alpha
        if self.kind == "v_prediction":
            return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
        return (x_t - sigma * output) / (alpha + sigma)

    @property
    def epsilon(self) -> Tensor:
        """The noise, [B, …]."""
        output, x_t, alpha, sigma = self._terms()
        if self.kind == "epsilon":
            return output
        if self.kind == "sample":
            return (x_t - alpha * output) / sigma
        if self.kind == "v_prediction":
            return (sigma * x_t + alpha * output) / (alpha**2 + sigma**2)
        return (x_t + alpha * output) / (alpha + sigma)

    @property
    def v(self) -> Tensor:
        """v = α ε − σ x0, [B, …]."""
        output, _, alpha, sigma = self._terms()
        if self.kind == "v_prediction":
            return output
        return alpha * self.epsilon - sigma * self.x0

    @property
    def flow(self) -> Tensor:
        """u = ε − x0, [B, …]."""
        if self.kind == "flow":
            return self._terms()[0]
        return self.epsilon - self.x0

    @property
    def score(self) -> Tensor:
        """∇ log p_t(x_t) = −ε / σ_t, [B, …]."""
        epsilon = self.epsilon
        return -epsilon / expand_like(self.sigma, epsilon)
