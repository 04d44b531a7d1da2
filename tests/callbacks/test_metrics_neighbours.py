"""``precision`` and ``recall`` against brute force, and what they say of known failures."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import callbacks.metrics.precision_recall as precision_recall
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.precision_recall import NeighbourMetric, Precision, Recall, covered, squared_radii
from callbacks.metrics.reference import ReferenceFolder
from common.errors import UserError
from tests.callbacks.networks import pictures, save


def brute_force(queries: Tensor, points: Tensor, k: int) -> float:
    """Equation 1 and 2, one query and one point at a time."""
    hits = 0
    for q in queries:
        for i, p in enumerate(points):
            others = sorted(float((p - o).norm()) for j, o in enumerate(points) if j != i)
            if float((q - p).norm()) <= others[k - 1]:
                hits += 1
                break
    return hits / len(queries)


@pytest.mark.parametrize("k", [1, 3])
def test_manifolds_are_the_papers(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_recall, "CHUNK", 100)  # four rows at a time
    generator = torch.Generator().manual_seed(k)
    a = torch.randn(25, 3, generator=generator).double()
    b = torch.randn(30, 3, generator=generator).double() * 1.5 + 2
    for queries, points in [(a, b), (b, a)]:
        found = covered(queries, points, squared_radii(points, k)).double().mean().item()
        assert found == brute_force(queries, points, k) and 0.1 < found < 1


def test_equal_pictures_are_at_no_distance() -> None:
    """In spite of the rounding of one matrix product; and others that are near stay apart."""
    points = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).double() * 3 + 5
    radii = squared_radii(points.repeat(2, 1), 1)
    assert not radii.any() and covered(points, points.repeat(2, 1), radii).all()
    assert not covered(points + 1e-4, points, radii[:20]).any()


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    return save(pictures(40), tmp_path / "real")


def measured(kind: type[NeighbourMetric], images: Tensor, real: Path, clip: Path, k: int = 3) -> float:
    metric = kind(str(clip), k=k, reference=str(real)).bind()
    for batch in images.split(16):
        metric.update(batch, ["x"] * len(batch))
    assert metric.result()["num_images"] == len(images)
    return metric.result()["value"]


def test_precision_and_recall_of_pictures(real: Path, tiny_clip: Path) -> None:
    images, extractor = pictures(30, seed=5), ClipExtractor(tiny_clip)
    fake, true = (extractor.image_features(x).double() for x in (images, pictures(40)))
    assert measured(Precision, images, real, tiny_clip) == brute_force(fake, true, 3)
    assert measured(Recall, images, real, tiny_clip) == brute_force(true, fake, 3)
    assert measured(Recall, images, real, tiny_clip, k=1) == brute_force(true, fake, 1)


def test_known_generators(real: Path, tiny_clip: Path) -> None:
    """Roles are not swapped: one real picture again and again is precise and has no recall."""
    true = pictures(40)
    collapsed, foreign = true[:1].repeat(30, 1, 1, 1), torch.zeros(30, 3, 16, 16)
    foreign[:, :, ::2] = 1
    for images, precision, recall in [(true, 1, 1), (collapsed, 1, 1 / 40), (foreign, 0, 0)]:
        assert measured(Precision, images, real, tiny_clip) == precision
        assert measured(Recall, images, real, tiny_clip) == recall


def test_order_and_restored_snapshots_do_not_matter(real: Path, tiny_clip: Path) -> None:
    images = pictures(30, seed=5)
    expected = [measured(kind, images, real, tiny_clip) for kind in (Precision, Recall)]
    found = []
    for kind in (Precision, Recall):
        metric = kind(str(tiny_clip), reference=str(real)).bind()
        for part in (torch.arange(29, 12, -1), torch.arange(13)):
            metric.update(images[part], ["x"] * len(part))
            snapshot = metric.snapshot()
            metric = kind(str(tiny_clip), reference=str(real)).bind()
            metric.restore(snapshot)
        assert metric.result()["num_images"] == 30
        found.append(metric.result()["value"])
    assert found == expected


def test_too_few_of_either_are_refused(real: Path, tiny_clip: Path) -> None:
    with pytest.raises(UserError, match="precision needs at least 4 pictures and saw 3"):
        measured(Precision, pictures(3), real, tiny_clip)
    with pytest.raises(UserError, match="recall with k = 40 needs at least 41 real pictures .* holds 40"):
        measured(Recall, pictures(50), real, tiny_clip, k=40)
    with pytest.raises(UserError, match="precision: k is 0"):
        Precision(k=0)
    details = Precision(str(tiny_clip)).bind(reference=ReferenceFolder(real)).details()
    assert details["k"] == 3 and details["reference_num_images"] == 40 and "16 wide" in details["features"]
