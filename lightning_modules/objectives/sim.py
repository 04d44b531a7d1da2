"""Score implicit matching (SIM, arXiv 2410.16794); with a reward it is DI* (arXiv 2410.20898)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lightning_modules.diffusion.broadcast import expand_like
from lightning_modules.diffusion.condition import Condition
from lightning_modules.objectives.base import Networks
from lightning_modules.objectives.pieces import Noised
from lightning_modules.objectives.sid_lsg import SiDLSG, check_no_a


class SIM(SiDLSG):
    """SIM (Luo et al., arXiv 2410.16794): any distance d of the scores, where SiD at a = 1 has the square.

    With s_real and s_fake at x_t, y = s_fake − s_real and ∇ log q(x_t | x̂) = (α_t x̂ − x_t) / σ_t², the
    student minimises, the gradient going through both scores::

        L = −w(t) d'(y) · (s_fake − ∇ log q(x_t | x̂))
        d(y) = √(‖y‖² + c²) − c (pseudo-Huber), d' = y / √(‖y‖² + c²);  or d(y) = ‖y‖², d' = 2 y

    Fake score, order, guidance and timesteps are SiD-LSG's, which the paper leaves open for text to image.
    DI* adds a reward on the student's pictures: ``model.image_losses``.

    Args:
        distance: huber or square.
        c: of the pseudo-Huber distance, times √(values of a sample); the paper's was not found, this one is
            that of consistency models (arXiv 2310.14189).
        scale: x0: y is the difference of the x0-predictions (w = σ⁴/α² for the square); score: it is that of
            the scores, w = 1.
        settings: those of SiD-LSG, without a.

    Raises:
        ValueError: an a, or as SiD-LSG.
    """

    def __init__(
        self,
        distance: Literal["huber", "square"] = "huber",
        c: float = 0.00054,
        scale: Literal["x0", "score"] = "x0",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_no_a(self)
        self.distance, self.c, self.scale = distance, c, scale

    def divergence(
        self, at: Noised, real: Tensor, fake: Tensor, condition: Condition, networks: Networks
    ) -> Tensor:
        """−d'(y) (s_fake − ∇ log q), by value; s_fake − s_real = α (y_fake − y_real) / σ²."""
        difference, implicit = fake - real, fake - at.x0
        if self.scale == "score":
            alpha, sigma = networks.schedule.alpha_sigma(at.t)
            factor = expand_like(alpha / sigma**2, fake)
            difference, implicit = factor * difference, factor * implicit
        if self.distance == "square":
            return -2 * difference * implicit
        squares = difference.square().sum(tuple(range(1, fake.ndim)), keepdim=True)
        return -difference * implicit / (squares + self.c**2 * fake[0].numel()).sqrt()
