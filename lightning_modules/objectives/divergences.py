"""f-divergences D_f(p‖q) = ∫ q f(p/q), p real and q fake, as weights of score distillation.

With r = p/q, the gradient of D_f is that of the reverse KL weighted by h(r) = r² f''(r) (f-distill, arXiv
2502.15681, table 1); constant factors are left out (of Neyman and Pearson h is half of that, of Hellinger
twice). For Uni-Instruct (arXiv 2505.20755) −r² h''(r) beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_modules.objectives.discriminator import Discriminator

Weight = Callable[[Tensor], Tensor]

# name: h(r), −r² h''(r)
DIVERGENCES: dict[str, tuple[Weight, Weight]] = {
    "reverse_kl": (lambda r: r**0, lambda r: 0 * r),
    "forward_kl": (lambda r: r, lambda r: 0 * r),
    "jeffreys": (lambda r: 1 + r, lambda r: 0 * r),
    "jensen_shannon": (lambda r: r / (1 + r), lambda r: 2 * r**2 / (1 + r) ** 3),
    "softened_reverse_kl": (lambda r: 1 / (1 + r), lambda r: -2 * r**2 / (1 + r) ** 3),
    "squared_hellinger": (lambda r: r**0.5, lambda r: 0.25 * r**0.5),
    "neyman": (lambda r: 1 / r, lambda r: -2 / r),
    "pearson": (lambda r: r**2, lambda r: -2 * r**2),
}


def check_divergence(name: str, discriminator: Discriminator) -> None:
    """Raise ValueError unless it is one of the table, and the discriminator's logit is a log ratio."""
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}: choose one of {', '.join(DIVERGENCES)}")
    if discriminator.hinge:
        raise ValueError(
            "the density ratio is made of the discriminator's logit, and with loss: hinge that is no log "
            "ratio: set the discriminator's loss to softplus"
        )
