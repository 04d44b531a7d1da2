"""Every metric on 2 and 3 processes with 101 pictures: each counted once, the values of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FID, FrechetDistance
from callbacks.metrics.hpsv2 import HPSv2
from callbacks.metrics.inception import InceptionExtractor
from callbacks.metrics.precision_recall import Precision, Recall
from callbacks.metrics.reference import ReferenceFolder
from common.errors import UserError
from tests.callbacks.networks import inception_file, open_clip_file, pictures, save

COUNT = 101
PROMPTS = [f"{'a long prompt ' * (i % 3)}number {i}" for i in range(COUNT)]
STYLES = ["anime" if i < 40 else "photo" for i in range(COUNT)]


def measure(folder: Path, batch_size: int, rank: int = 0, world: int = 1) -> dict[str, dict]:
    """Results of this process's share; the last pass is padded to the same length on all of them."""
    clip, weights, inception = str(folder / "clip"), str(folder / "weights.pt"), str(folder)
    metrics: list[ImageMetric] = [
        FID(inception=inception),
        FrechetDistance(clip),
        Precision(inception=inception),
        Recall(inception=inception),
        ClipScore(clip),
        HPSv2("v2.1", weights, "tiny-open-clip"),
    ]
    reference = ReferenceFolder(folder / "real", cache_dir=folder / f"cache{world}", batch_size=7)
    images = pictures(COUNT, seed=3)
    for metric in metrics:
        metric.bind(reference=reference)
        metric.prepare(PROMPTS, STYLES)
    share = list(range(rank, COUNT, world))
    share += [0] * (-(-COUNT // world) - len(share))
    for start in range(0, len(share), batch_size):
        chosen = share[start : start + batch_size]
        padding = torch.tensor([start + i >= len(range(rank, COUNT, world)) for i in range(len(chosen))])
        batch = images[chosen]
        for metric in metrics:
            metric.update(batch, [PROMPTS[i] for i in chosen], padding, chosen)
    return {name: result for metric in metrics for name, result in metric.results().items()}


def _process(rank: int, folder: Path, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    torch.save(measure(folder, 8, rank, world), folder / f"{world}-{rank}.pt")
    (folder / "real" / "0002.png").write_bytes(b"no picture")
    dist.barrier()
    try:
        FID(inception=str(folder)).bind(reference=ReferenceFolder(folder / "real", cache_dir=folder / "c"))
    except UserError as error:  # the same on every process, whichever read the file
        (folder / f"{world}-{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_an_uneven_set(
    world: int, tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InceptionExtractor, "width", 40)
    inception_file(tmp_path, width=40)
    open_clip_file(tmp_path)
    (tmp_path / "clip").symlink_to(tiny_clip)
    save(pictures(65, seed=4) * 0.8, tmp_path / "real")
    alone = measure(tmp_path, 40)
    assert [r["num_images"] for r in alone.values()] == [COUNT] * 6 + [40, 61]
    assert 0.1 < alone["precision"]["value"] < 1 and 0.1 < alone["recall"]["value"] < 1
    # Forked, because starting afresh imports everything again; one thread, so there is nothing to inherit.
    mp.start_processes(_process, args=(tmp_path, world), nprocs=world, start_method="fork")
    for rank in range(world):
        together = torch.load(tmp_path / f"{world}-{rank}.pt")
        assert list(together) == list(alone)
        for name, result in alone.items():
            assert together[name]["num_images"] == result["num_images"], name
            assert together[name]["value"] == pytest.approx(result["value"], rel=1e-6), name
            assert together[name]["details"].get("truncated_prompts") == result["details"].get(
                "truncated_prompts"
            )
        assert "0002.png can't be read" in (tmp_path / f"{world}-{rank}.txt").read_text()
