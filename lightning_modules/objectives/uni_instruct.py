"""Uni-Instruct (arXiv 2505.20755): an f-divergence over all noise levels, by score-implicit gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_modules.diffusion.broadcast import expand_like
from lightning_modules.diffusion.condition import Condition
from lightning_modules.objectives.base import Networks
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.divergences import DIVERGENCES, check_divergence
from lightning_modules.objectives.pieces import Noised, mean_distance
from lightning_modules.objectives.sid_lsg import SiDLSG, check_no_a


class UniInstruct(SiDLSG):
    """Uni-Instruct (Wang et al., arXiv 2505.20755).

    D_f(real‖fake) = ∫ ½ g²(t) E_fake[h(r) ‖y‖²] dt with r = p_real / p_fake at x_t, h(r) = r² f''(r) and
    y = s_fake − s_real. What descends it is a score-implicit gradient, weighted by h(r), and one by way of r
    (∇r = −r y), as in Diff-Instruct, with the public code's weights. In x0-predictions, D = y_real − y_fake,
    weights without gradient and divided by SiD's 2 α²/σ⁴ as well as by its ω::

        L = Σ h(r) D (y_fake − x̂) / ω + Σ sg[½ (−r² h''(r)) (α²/σ²) ‖D‖² D / ω] x̂

    The gradient of D_f has two parts more, with x_t as the student's (tests/objectives/test_uni_instruct.py):
    h's own in the first sum, and ½ (h − r h') ∇‖D‖² / ω, which SiD at a = 1 lacks, too (at a = ½ it has it);
    neither is there in the public code. Both vanish where the scores agree.

    The second sum grows with the cube of D and pushes samples away from the teacher's where −r² h'' > 0. With
    jensen_shannon r has to be truly small there to hold it back: on Gaussian data a student that starts far
    away arrives with the exact ratio of whole samples, and diverges with heads that have just begun, with
    r = 1, or within a narrow ``ratio_range``. forward_kl, reverse_kl and jeffreys have none of it.

    With the reverse KL it is SiD at a = 1. The ratio is exp of the discriminator's logit at the student's own
    x_t, within ``ratio_range``. The public code makes it of the values of the batch's loss, which leaves no
    ratio of a sample, and has ‖D‖ for ‖D‖²; it freezes the student at first, and weights later still: here
    both begin with the run. r is of the pictures that the discriminator is given: see f-distill.

    Args:
        discriminator: on the fake score in the paper; not hinge.
        divergence: forward_kl (the paper's best), reverse_kl, jeffreys, jensen_shannon, pearson, or another
            of ``divergences.DIVERGENCES``.
        ratio_range: least and largest r.
        settings: those of SiD-LSG, without a.

    Raises:
        ValueError: an unknown divergence, a hinge loss, an a, or as SiD-LSG.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        divergence: str = "forward_kl",
        ratio_range: tuple[float, float] = (0.1, 20.0),
        **settings: Any,
    ) -> None:
        super().__init__(discriminator=discriminator, **settings)
        check_no_a(self)
        check_divergence(divergence, discriminator)
        self.weights, self.ratio_range = DIVERGENCES[divergence], ratio_range

    def divergence(
        self, at: Noised, real: Tensor, fake: Tensor, condition: Condition, networks: Networks
    ) -> Tensor:
        """What is summed over a sample's values, [B, C, H, W]."""
        assert self.discriminator is not None
        ratio = self.discriminator.log_ratio(at.x_t.detach(), at.t, condition, networks).exp()
        implicit, direct = (weight(ratio.clamp(*self.ratio_range)) for weight in self.weights)
        alpha, sigma = networks.schedule.alpha_sigma(at.t)
        difference, distance = real - fake, mean_distance(at.x0, real)
        squares = difference.flatten(1).square().sum(1)
        factor = expand_like(0.5 * direct * (alpha / sigma) ** 2 * squares, fake) / distance
        product = expand_like(implicit, fake) * difference * (fake - at.x0) / distance
        return product + (factor * difference).detach() * at.x0
