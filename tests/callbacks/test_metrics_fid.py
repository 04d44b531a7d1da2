"""``fid`` against the cleanfid package, and statistics of folders of real pictures."""

import functools
import warnings
from pathlib import Path
from typing import Any

import cleanfid.features
import cleanfid.fid
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

from callbacks.metrics.base import ImageMetric, bind_metrics
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.frechet import FID, FrechetDistance
from callbacks.metrics.inception import InceptionExtractor, find_inception
from callbacks.metrics.measure import require_finite
from callbacks.metrics.precision_recall import Precision, Recall
from callbacks.metrics.reference import ReferenceFolder, ReferenceStatistics, open_reference
from common.errors import UserError
from tests.callbacks.networks import inception_file, pictures, save


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inception_file(tmp_path_factory.mktemp("inception"))


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in with 48 features, where the number does not matter: eigenvalues of 2048 take seconds."""
    monkeypatch.setattr(InceptionExtractor, "width", 48)
    (tmp_path / "narrow").mkdir()
    return inception_file(tmp_path / "narrow", width=48)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def root_of_block(matrix: np.ndarray, disp: bool = True, *, root: object) -> tuple[np.ndarray, float]:
    """scipy's matrix root, of the rows and columns that are not zero: of 2048 it would take a minute."""
    alive = np.ix_(matrix.any(1), matrix.any(1))
    full = np.zeros_like(matrix)
    full[alive] = root(matrix[alive])  # type: ignore[operator]
    return full, 0.0


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_fid_is_cleanfids(
    mode: str, inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, real = pictures(60, seed=1, height=40, width=24), pictures(70, seed=2, height=40, width=24).sqrt()
    folders = save(fake, tmp_path / "fake"), save(real, tmp_path / "real")
    own_network = functools.partial(cleanfid.features.InceptionV3W, str(inception.parent), False)
    monkeypatch.setattr(
        cleanfid.features, "InceptionV3W", lambda path, download, resize_inside: own_network(resize_inside)
    )
    root = functools.partial(root_of_block, root=cleanfid.fid.linalg.sqrtm)
    monkeypatch.setattr(cleanfid.fid.linalg, "sqrtm", root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = cleanfid.fid.compute_fid(
            *map(str, folders),
            mode=mode,
            num_workers=0,
            device=torch.device("cpu"),
            use_dataparallel=False,
            verbose=False,
        )
    metric = FID(mode, str(inception)).bind(reference=ReferenceFolder(folders[1]))
    for batch in fake.split(25):
        metric.update(batch, ["x"] * len(batch))
    with pytest.warns(UserWarning, match="fid of 60 pictures with 2048 features: fewer"):
        result = metric.result()
    assert result["value"] == pytest.approx(expected, rel=1e-6)
    assert expected > 0.1 and result["num_images"] == 60
    assert result["details"]["mode"] == mode and result["details"]["reference_num_images"] == 70


def test_modes_differ_and_others_are_refused(narrow: Path) -> None:
    clean, legacy = InceptionExtractor(narrow), InceptionExtractor(narrow, "legacy_tensorflow")
    image = pictures(2, height=64, width=64)
    assert clean.content_hash != legacy.content_hash
    assert not torch.allclose(clean.image_features(image), legacy.image_features(image), atol=1e-6)
    with pytest.raises(UserError, match="mode 'legacy_pytorch' of clean-fid is unknown"):
        FID("legacy_pytorch")


def test_metrics_share_one_network_and_one_pass(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ReferenceFolder(save(pictures(60), tmp_path / "real"))
    first = FID(inception=str(narrow)).bind(reference=folder)
    second = Precision(inception=str(narrow)).bind(reference=folder)
    third = FID("legacy_tensorflow", str(narrow)).bind(reference=folder)
    assert first.extractor is second.extractor is not third.extractor
    images = pictures(4, seed=1)
    passes = []
    forward = first.extractor._image_features
    monkeypatch.setattr(first.extractor, "_image_features", lambda x: passes.append(len(x)) or forward(x))
    for metric in (first, second, third):
        metric.update(images, ["x"] * 4)
    assert passes == [4]
    assert all(int(metric.count) == 4 for metric in (first, second, third))


def test_a_reference_goes_through_a_network_once(
    narrow: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, passes = save(pictures(60), tmp_path / "real"), []
    forward = InceptionExtractor._image_features

    def counting(self: InceptionExtractor, images: torch.Tensor) -> torch.Tensor:
        passes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(InceptionExtractor, "_image_features", counting)

    def bound() -> list[dict[str, Any]]:
        path = str(narrow)
        metrics = [FID(inception=path), Precision(inception=path), Recall(inception=path)]
        bind_metrics(metrics, None, ReferenceFolder(real), torch.device("cpu"))
        features = [metric.reference.features for metric in metrics]
        assert features[0] is None and features[1] is features[2] and len(features[1]) == 60
        return [metric.key() for metric in metrics]

    keys = bound()
    assert passes == [60]
    assert bound() == keys and passes == [60]  # from the cache
    for file in own_cache.glob("reference-*"):
        file.unlink()
    alone = FID(inception=str(narrow)).bind(reference=ReferenceFolder(real))
    assert alone.key() == keys[0] and passes == [60, 60]  # the same statistics, however they were asked for


def test_inception_is_found_or_asked_for(
    narrow: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_inception(narrow) == find_inception(narrow.parent) == narrow
    with pytest.raises(UserError, match="no Inception network at .*other.pt"):
        find_inception(tmp_path / "other.pt")
    monkeypatch.setattr("callbacks.metrics.inception.CLEANFID_CACHE", tmp_path / "cleanfid")

    def offline(folder: str) -> str:
        (Path(folder) / "inception-2015-12-05.pt").write_text("half")
        raise OSError("network is unreachable")

    monkeypatch.setattr("callbacks.metrics.inception.check_download_inception", offline)
    with pytest.raises(UserError, match="(?s)cleanfid.*cache.*network is unreachable.*name the file"):
        find_inception()
    assert not list(own_cache.iterdir())

    def online(folder: str) -> str:
        (Path(folder) / "inception-2015-12-05.pt").write_bytes(narrow.read_bytes())
        return f"{folder}/inception-2015-12-05.pt"

    monkeypatch.setattr("callbacks.metrics.inception.check_download_inception", online)
    assert find_inception() == own_cache / narrow.name
    monkeypatch.setattr("callbacks.metrics.inception.check_download_inception", offline)
    assert find_inception() == own_cache / narrow.name
    (tmp_path / "cleanfid").mkdir()
    (tmp_path / "cleanfid" / narrow.name).write_bytes(b"first choice")
    assert find_inception().read_bytes() == b"first choice"
    with pytest.raises(UserError, match="can't be loaded as a TorchScript network"):
        InceptionExtractor(tmp_path / "cleanfid")


def test_another_network_is_no_inception(tmp_path: Path) -> None:
    extractor = InceptionExtractor(inception_file(tmp_path, width=32))
    with pytest.raises(UserError, match="gives 32 features, FID's Inception gives 2048"):
        extractor.image_features(pictures(2))


def test_identical_sets_and_known_shifts(narrow: Path, tmp_path: Path) -> None:
    images = pictures(80)
    metric = FID(inception=str(narrow), reference=str(save(images, tmp_path / "real"))).bind()
    metric.update(images, ["x"] * 80)
    assert metric.compute().item() == pytest.approx(0, abs=1e-3)
    # Features moved by a constant vector v are at the distance |v|^2.
    reference = metric.reference
    shift = torch.linspace(0, 1, 48, dtype=torch.float64)
    object.__setattr__(reference, "mean", reference.mean + shift)
    metric._computed = None
    assert metric.compute().item() == pytest.approx(shift.square().sum().item(), rel=1e-4)


def test_nan_pictures_are_refused() -> None:
    images = pictures(3)
    require_finite(images, [7, 8, 9], ["a", "broken", "c"])
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"caption 8 \('broken'\) holds NaN or infinity"):
        require_finite(images, [7, 8, 9], ["a", "broken", "c"])


def test_folder_statistics_are_cached_by_content(
    narrow: Path, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.cat([pictures(30), pictures(30, seed=1)])
    folder = save(images, tmp_path / "real")
    extractor = InceptionExtractor(narrow)
    statistics = ReferenceFolder(folder, batch_size=7).statistics(extractor, features=True)
    assert "real pictures through Inception" in capsys.readouterr().err
    torch.testing.assert_close(statistics.features, extractor.image_features(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(statistics.covariance, torch.cov(statistics.features.double().T))
    (file,) = own_cache.iterdir()
    again = ReferenceFolder(folder).statistics(extractor, features=True)
    assert "real pictures through" not in capsys.readouterr().err
    assert again.content_hash == statistics.content_hash and torch.equal(again.features, statistics.features)
    # the file serves without the folder; other features, another crop or other pictures make another one
    assert open_reference(file).statistics(extractor, True).content_hash == statistics.content_hash
    # ... and where the features are not asked for
    plain = ReferenceFolder(folder).statistics(extractor)
    assert plain.features is None and torch.equal(plain.covariance, statistics.covariance)
    half = ReferenceFolder(folder, lambda image: image.resize((8, 8)), "8x8").statistics(extractor)
    assert half.preprocessing.startswith("8x8; ") and not torch.allclose(half.mean, statistics.mean)
    (folder / "0000.png").unlink()
    assert ReferenceFolder(folder).statistics(extractor).num_images == 59
    assert len(list(own_cache.iterdir())) == 3


def test_reference_folders_that_do_not_serve(narrow: Path, tmp_path: Path, tiny_clip: Path) -> None:
    folder, extractor = save(pictures(60), tmp_path / "real"), InceptionExtractor(narrow)
    with pytest.raises(UserError, match="holds 60 readable pictures, and 100 are needed"):
        ReferenceFolder(folder, minimum=100)
    with pytest.raises(UserError, match="no folder of real pictures"):
        ReferenceFolder(tmp_path / "nowhere")
    (folder / "0007.png").write_bytes((folder / "0007.png").read_bytes()[:200])
    with pytest.raises(UserError, match="0007.png can't be read"):
        ReferenceFolder(folder).statistics(extractor)
    assert ReferenceFolder(folder, skip_corrupt=True).statistics(extractor).num_images == 59
    with pytest.raises(UserError, match="0007.png can't be read"):  # those are cached, as other statistics
        ReferenceFolder(folder).statistics(extractor)
    with pytest.raises(UserError, match="holds 59 readable pictures, and 60 are needed"):
        ReferenceFolder(folder, skip_corrupt=True, minimum=60).statistics(extractor)
    statistics = ReferenceFolder(folder, skip_corrupt=True).statistics(extractor)
    statistics.save(tmp_path / "shared.safetensors")
    with pytest.raises(UserError, match="hold no features of single pictures"):
        Precision(inception=str(narrow), reference=str(tmp_path / "shared.safetensors")).bind()
    with pytest.raises(UserError, match="were made with Inception"):
        FrechetDistance(str(tiny_clip)).bind(reference=statistics)
    with pytest.raises(UserError, match="fid needs statistics of real pictures"):
        FID(inception=str(narrow)).bind(ClipExtractor(tiny_clip))


def test_statistics_of_earlier_versions_still_load() -> None:
    bundled = Path(__file__).parents[2] / "assets" / "cache" / "emoji-reference.safetensors"
    reference = ReferenceStatistics.load(bundled)
    assert reference.features is None and reference.num_images == 1024


def test_metrics_are_named_in_yaml(narrow: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=list[ImageMetric])
    given = [
        {"class_path": "callbacks.metrics.frechet.FID", "init_args": {"inception": str(narrow)}},
        {"class_path": "callbacks.metrics.precision_recall.Recall", "init_args": {"k": 5}},
        {"class_path": "callbacks.metrics.clip_score.ClipScore", "init_args": {"model": "clip_vitb32"}},
        {"class_path": "callbacks.metrics.hpsv2.HPSv2", "init_args": {"version": "v2.0"}},
    ]
    metrics = parser.instantiate(parser.parse_object({"metrics": given})).metrics
    assert [metric.name for metric in metrics] == ["fid", "recall", "clip_score", "hpsv2"]
    assert metrics[1].minimum_images == 6
    del given[3]["init_args"]  # the version has no default
    with pytest.raises(ArgumentError, match="version"):
        parser.parse_object({"metrics": given})
