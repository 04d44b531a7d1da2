"""What is measured: against closed forms, scipy, transformers, and over two processes."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from callbacks.metrics import measure
from callbacks.metrics.clip_features import ClipExtractor, processed
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FrechetDistance, frechet_distance
from callbacks.metrics.measure import evaluate_model, milliseconds_per_image
from callbacks.metrics.reference import FeatureSums, ReferenceStatistics, compute_reference
from common.errors import UserError
from common.hashing import to_uint8

PROMPTS = ["a red cat", "a dog on a hill", "the sun", "a very long prompt " * 9, "cup", "bee, key"]


def pictures(count: int, seed: int = 0, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def extractor(tiny_clip: Path) -> ClipExtractor:
    return ClipExtractor(tiny_clip)


@pytest.fixture(scope="module")
def reference(extractor: ClipExtractor) -> ReferenceStatistics:
    return compute_reference([pictures(40, seed=7)], ["x"] * 40, extractor, "noise")


def test_frechet_distance_of_known_gaussians() -> None:
    mean1, mean2 = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    deviations1, deviations2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0])
    # For commuting covariances: |mu1 - mu2|^2 + sum (s1 - s2)^2. The rotation changes neither.
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q

    def turned(d: torch.Tensor) -> torch.Tensor:
        return rotation @ torch.diag(d.double() ** 2) @ rotation.T

    found = frechet_distance(
        rotation @ mean1.double(), turned(deviations1), rotation @ mean2.double(), turned(deviations2)
    )
    expected = (mean1 - mean2).square().sum() + (deviations1 - deviations2).square().sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert found.item() == pytest.approx(10 + 1 + 2.25)


@pytest.mark.parametrize("count", [8, 50, 500])
def test_frechet_distance_against_scipy(count: int) -> None:
    """Also where fewer samples than features make the covariance singular."""
    generator = torch.Generator().manual_seed(count)
    rows1 = torch.randn(count, 12, generator=generator).double()
    rows2 = (
        torch.randn(600, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
        + 0.3
    )
    root = scipy.linalg.sqrtm(torch.cov(rows1.T).numpy() @ torch.cov(rows2.T).numpy())
    difference = (rows1.mean(0) - rows2.mean(0)).square().sum().item()
    expected = difference + (torch.cov(rows1.T) + torch.cov(rows2.T)).trace().item() - 2 * root.real.trace()
    sums1, sums2 = FeatureSums(12), FeatureSums(12)
    sums1.add(rows1)
    sums2.add(rows2[:100])
    sums2.add(rows2[100:])
    found = frechet_distance(*sums1.mean_and_covariance(), *sums2.mean_and_covariance())
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_identical_sets_are_at_distance_zero(extractor: ClipExtractor) -> None:
    images = pictures(30)
    metric = FrechetDistance().bind(
        extractor, compute_reference(images.split(7), ["x"] * 30, extractor, "same")
    )
    metric.update(images, ["x"] * 30)
    assert metric.compute().item() == pytest.approx(0, abs=1e-3)
    metric.update(pictures(30, seed=1) * 0.3, ["x"] * 30)
    assert metric.compute().item() > 0.01


@pytest.mark.parametrize("kind", [FrechetDistance, ClipScore])
def test_order_and_batches_do_not_matter(
    kind: type[FrechetDistance] | type[ClipScore], extractor: ClipExtractor, reference: ReferenceStatistics
) -> None:
    images, values = pictures(6), []
    for order, sizes in [
        ([0, 1, 2, 3, 4, 5], (6,)),
        ([5, 3, 1, 0, 2, 4], (1, 3, 2)),
        ([4, 5, 0, 1, 2, 3], (2, 2, 2)),
    ]:
        metric = kind().bind(extractor, reference)
        for part in torch.tensor(order).split(sizes):  # type: ignore[no-untyped-call]
            metric.update(images[part], [PROMPTS[i] for i in part.tolist()])
        values.append(metric.compute().item())
        assert metric.num_images == 6
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", [FrechetDistance, ClipScore])
def test_padding_is_not_counted(
    kind: type[FrechetDistance] | type[ClipScore], extractor: ClipExtractor, reference: ReferenceStatistics
) -> None:
    plain, padded = kind().bind(extractor, reference), kind().bind(extractor, reference)
    images = pictures(6)
    plain.update(images[:4], PROMPTS[:4])
    padded.update(images, PROMPTS, torch.tensor([False] * 4 + [True] * 2))
    padded.update(images[:2], PROMPTS[:2], torch.tensor([True, True]))
    assert padded.compute().item() == pytest.approx(plain.compute().item(), rel=1e-6)
    assert padded.num_images == 4


def test_too_few_pictures_are_refused(extractor: ClipExtractor, reference: ReferenceStatistics) -> None:
    metric = FrechetDistance().bind(extractor, reference)
    metric.update(pictures(1), ["x"])
    with pytest.raises(UserError, match="at least 2 pictures and saw 1"):
        metric.compute()
    with pytest.raises(ValueError, match="2 pictures, but 1 prompts"):
        metric.update(pictures(2), ["x"])


def test_details_say_what_the_distance_depends_on(
    extractor: ClipExtractor, reference: ReferenceStatistics
) -> None:
    metric = FrechetDistance().bind(extractor, reference)
    metric.update(pictures(6), PROMPTS)
    details = metric.result()["details"]
    assert details["feature_width"] == 16 and details["reference_num_images"] == 40
    assert details["extractor_hash"] == extractor.content_hash
    assert "fewer than 8 x 16" in details["note"]
    metric.update(pictures(130, seed=3), ["x"] * 130)
    assert "note" not in metric.result()["details"]


def test_clip_score_against_transformers(tiny_clip: Path, extractor: ClipExtractor) -> None:
    images = pictures(6)
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip).eval(), AutoTokenizer.from_pretrained(tiny_clip)
    processor = AutoImageProcessor.from_pretrained(tiny_clip)
    files = [Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()) for image in images]
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=processor(images=files, return_tensors="pt").pixel_values, **tokens)
    # logits_per_image = exp(logit_scale) * cosine
    expected = (output.logits_per_image.diagonal() / model.logit_scale.exp()).mean().item()
    metric = ClipScore().bind(extractor)
    metric.update(images, PROMPTS)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-5)
    assert -1 <= expected <= 1 and abs(expected) > 1e-3


@pytest.mark.parametrize("height, width", [(16, 16), (33, 20), (12, 40), (16, 33), (64, 64)])
@pytest.mark.parametrize("size", [{"shortest_edge": 16}, {"height": 16, "width": 16}])
def test_preprocessing_is_the_image_processors(
    height: int, width: int, size: dict[str, int], tiny_clip: Path
) -> None:
    processor = AutoImageProcessor.from_pretrained(tiny_clip, size=size)
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    files = [Image.fromarray(to_uint8(one).permute(1, 2, 0).numpy()) for one in image]
    expected = processor(images=files, return_tensors="pt").pixel_values
    found = processed(processor, image)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_reference_is_bound_to_its_extractor(
    tmp_path: Path, tiny_clip: Path, extractor: ClipExtractor, reference: ReferenceStatistics
) -> None:
    file = tmp_path / "reference.safetensors"
    reference.save(file)
    loaded = ReferenceStatistics.load(file)
    assert loaded.content_hash == reference.content_hash
    assert torch.equal(loaded.covariance, reference.covariance) and loaded.num_images == 40
    other = ClipExtractor(tiny_clip)
    other.content_hash = "another"
    with pytest.raises(UserError, match="means nothing"):
        FrechetDistance().bind(other, loaded)
    with pytest.raises(UserError, match="needs statistics of real pictures"):
        FrechetDistance().bind(extractor, None)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        ReferenceStatistics.load(file)
    file.write_text("no statistics")
    with pytest.raises(UserError, match="holds no reference statistics"):
        ReferenceStatistics.load(file)
    with pytest.raises(UserError, match="no CLIP model"):
        ClipExtractor(tmp_path)


def test_damaged_clip_folders_are_refused_in_one_line(tiny_clip: Path, tmp_path: Path) -> None:
    file = "model.safetensors"

    def cut(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:1000])

    def forget(folder: Path) -> None:
        weights = load_file(folder / file)
        del weights["visual_projection.weight"]
        save_file(weights, folder / file, metadata={"format": "pt"})

    damages = {
        "cut": (cut, "cut can't be loaded"),
        "forgotten": (forget, r"forgotten lacks the weights visual_projection.weight \(1 missing\)"),
        "config": (
            lambda folder: (folder / "config.json").write_text("{"),
            "config/config.json can't be read",
        ),
    }
    for name, (spoil, message) in damages.items():
        shutil.copytree(tiny_clip, tmp_path / name)
        spoil(tmp_path / name)
        with pytest.raises(UserError, match=message) as caught:
            ClipExtractor(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_loading_a_clip_draws_no_progress_bar(tiny_clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ClipExtractor(tiny_clip)
    assert "Loading weights" not in "".join(capfd.readouterr())


def drawn(prompts: list[str], seeds: list[int]) -> torch.Tensor:
    """A picture that is a function of its seed."""
    return torch.cat([pictures(1, seed) for seed in seeds])


def test_evaluation_counts_every_caption(extractor: ClipExtractor, reference: ReferenceStatistics) -> None:
    metrics = [FrechetDistance().bind(extractor, reference), ClipScore().bind(extractor)]
    results = evaluate_model(drawn, PROMPTS, metrics, batch_size=4)
    assert {name: result["num_images"] for name, result in results.items()} == {
        "frechet_distance": 6,
        "clip_score": 6,
    }
    assert evaluate_model(drawn, PROMPTS, metrics, 5)["clip_score"]["value"] == pytest.approx(
        results["clip_score"]["value"], abs=1e-6
    )
    other = evaluate_model(drawn, PROMPTS, metrics, 5, seeds=list(range(10, 16)))
    assert other["clip_score"]["value"] != pytest.approx(results["clip_score"]["value"], abs=1e-6)
    with pytest.raises(ValueError, match="one seed for each"):
        evaluate_model(drawn, PROMPTS, metrics, 5, seeds=[1])


def test_the_time_of_a_picture_is_the_median_pass_by_its_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of the test: the first pass is no measurement, copying to the CPU is part of it."""
    clock, passes, seconds = [0.0], list[tuple[list[str], list[int]]](), iter([100.0, 7.0, 1.0, 4.0])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Drawn:
        device = "an accelerator"

        def cpu(self) -> None:
            clock[0] += 1

    def generate(prompts: list[str], seeds: list[int]) -> Any:
        passes.append((prompts, seeds))
        clock[0] += next(seconds)
        return Drawn()

    timed = milliseconds_per_image(generate, ["a", "b", "c"], batch_size=4, repeats=3)
    assert (timed["value"], timed["num_images"]) == (1250, 12)  # 5 of 8, 2 and 5 seconds, for 4 pictures
    assert timed["details"] == {
        "batch_size": 4, "device": "an accelerator", "spread": [500, 2000],
        "statistic": "median of 3 passes after a warm-up",
    }  # fmt: skip
    assert passes == [(["a", "b", "c", "a"], list(range(4 * i, 4 * i + 4))) for i in range(4)]


def _process(rank: int, folder: str, clip: str, reference: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    extractor = ClipExtractor(clip)
    metrics = [
        FrechetDistance().bind(extractor, ReferenceStatistics.load(reference)),
        ClipScore().bind(extractor),
    ]
    results = evaluate_model(drawn, PROMPTS[:5], metrics, batch_size=2)
    torch.save({name: (r["value"], r["num_images"]) for name, r in results.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_count_an_uneven_set_once(
    tmp_path: Path, tiny_clip: Path, extractor: ClipExtractor, reference: ReferenceStatistics
) -> None:
    file = tmp_path / "reference.safetensors"
    reference.save(file)
    # Forked, because starting afresh imports everything again; one thread, so there is nothing to inherit.
    arguments = (str(tmp_path), str(tiny_clip), str(file))
    mp.start_processes(_process, args=arguments, nprocs=2, start_method="fork")
    metrics = [FrechetDistance().bind(extractor, reference), ClipScore().bind(extractor)]
    alone = evaluate_model(drawn, PROMPTS[:5], metrics, batch_size=5)
    for rank in range(2):
        for name, (value, count) in torch.load(tmp_path / f"{rank}.pt").items():
            assert count == 5
            assert value == pytest.approx(alone[name]["value"], rel=1e-5)
