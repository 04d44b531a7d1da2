"""Precision and recall of generated pictures, from manifolds of nearest neighbours.

Kynkäänniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import clip_network
from callbacks.metrics.inception import inception_network
from common.errors import UserError
from common.processes import from_every_rank

CHUNK = 2**24
"""Distances held at a time: 128 MiB in float64."""
_ROUNDING = 1e-12


def squared_radii(points: Tensor, k: int) -> Tensor:
    """Squared distances [N] of points [N, D] from their k-th nearest other point."""
    radii = []
    for start, rows in _chunks(points, len(points)):
        distances = _squared_distances(rows, points)
        own = torch.arange(len(rows), device=points.device)
        distances[own, start + own] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def covered(queries: Tensor, points: Tensor, radii: Tensor) -> Tensor:
    """Which queries [Q, D] lie in the manifold of points [N, D] with squared radii [N], as booleans [Q].

    f(q, P) = 1 where |q - p| <= |p - NN_k(p, P)| for at least one p in P       equation 1
    """
    inside = [(_squared_distances(rows, points) <= radii).any(1) for _, rows in _chunks(queries, len(points))]
    return torch.cat(inside)


def _chunks(rows: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    size = max(1, CHUNK // columns)
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[A, B] of [A, D] and [B, D] by one matrix product; equal points are at 0 in spite of rounding."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = squares - 2 * a @ b.T
    return torch.where(distances <= _ROUNDING * squares, 0, distances)


class NeighbourMetric(ImageMetric):
    """Keeps the features of every picture, on the CPU, and compares them with those of real pictures.

    Args:
        model: None for the Inception network; a CLIP folder in transformers' format; an open_clip
            architecture (with ``pretrained``) or ``local-dir:<folder>``.
        pretrained: open_clip's tag or file of weights.
        k: neighbours that span a picture's neighbourhood.
        mode, inception: of the Inception network, as for ``fid``.
        reference: folder of real pictures, or a statistics file that holds their features (default: that of
            the evaluation).

    Raises:
        UserError: k is below 1, or the mode is unknown.
    """

    needs_reference = True
    needs_reference_features = True

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | None = None,
        k: int = 3,
        mode: str = "clean",
        inception: str | None = None,
        reference: str | None = None,
    ) -> None:
        if k < 1:
            raise UserError(f"{self.name}: k is {k}: it must be at least 1")
        spec = inception_network(inception, mode) if model is None else clip_network(model, pretrained)
        super().__init__(spec, reference)
        self.k, self.minimum_images = k, k + 1

    def setup_states(self, width: int) -> None:
        """No sums: the features are no torchmetrics state, which would be gathered on a GPU."""
        self._rows = [torch.zeros(0, width)]

    def reset(self) -> None:
        super().reset()
        self._rows = [torch.zeros(0, self.extractor.width)]

    def snapshot(self) -> dict[str, Tensor]:
        """The features of this process's pictures, and their number."""
        return super().snapshot() | {"features": torch.cat(self._rows)}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        super().restore(snapshot)
        self._rows.append(snapshot["features"])

    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        self._rows.append(features.cpu())

    def _both(self) -> tuple[Tensor, Tensor]:
        """Features of generated [N, D] and real pictures [M, D] over all processes, float64, centred."""
        real = self.reference.features
        assert real is not None
        if len(real) < self.minimum_images:
            raise UserError(
                f"{self.name} with k = {self.k} needs at least {self.minimum_images} real pictures and the "
                f"reference holds {len(real)}: name a larger one"
            )
        fake = torch.cat(from_every_rank(torch.cat(self._rows)))
        # float64 in place of fp32 for distances from one matrix product; Apple's GPUs have none.
        device = self.extractor.device if self.extractor.device.type == "cuda" else "cpu"
        real, fake = real.to(device).double(), fake.to(device).double()
        return fake - real.mean(0), real - real.mean(0)

    def settings(self) -> dict[str, Any]:
        return {"k": self.k}

    def details(self) -> dict[str, Any]:
        """The features, k, both counts, and how the paper's own choice differs."""
        return super().details() | {
            "features": f"{self.extractor.name}, {self.extractor.width} wide",
            "differs": "the paper takes VGG-16 features of 50,000 generated and 50,000 real pictures",
        }


class Precision(NeighbourMetric):
    """Share of generated pictures that lie among the real ones. Higher is better."""

    name = "precision"
    version = 1

    def _value(self) -> Tensor:
        fake, real = self._both()
        return covered(fake, real, squared_radii(real, self.k)).double().mean().cpu()


class Recall(NeighbourMetric):
    """Share of real pictures that lie among the generated ones. Higher is better."""

    name = "recall"
    version = 1

    def _value(self) -> Tensor:
        fake, real = self._both()
        return covered(real, fake, squared_radii(fake, self.k)).double().mean().cpu()
