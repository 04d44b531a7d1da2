"""Hits, misses, tampering, the shipped folder, a folder that can't be written, and the teacher's rows."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.metrics import teacher as teacher_module
from callbacks.metrics.result_cache import SHIPPED, ResultCache
from callbacks.metrics.teacher import teacher_metrics
from common.files import user_cache_dir, written_whole
from common.hashing import hash_folder, hash_tensors, hash_texts
from datamodules.evaluation_sets import EvaluationSet
from datamodules.picture_files import Frame

KEY = {"teacher": "abc", "steps": 25}


def test_round_trip_and_miss(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, shipped_dir=None)
    assert cache.get("row", KEY) is None
    images = torch.arange(6).reshape(3, 2).T  # not contiguous, as some networks' pictures are
    cache.put("row", KEY, {"value": 1.5, "details": {"n": [1, 2]}}, {"images": images})
    entry = cache.get("row", {"steps": 25, "teacher": "abc"})
    assert entry is not None and entry.value == {"value": 1.5, "details": {"n": [1, 2]}}
    assert torch.equal(entry.tensors["images"], images)
    assert cache.get("row", KEY | {"steps": 24}) is None
    assert cache.get("other", KEY) is None
    cache.put("row", KEY, {"value": 2.5})
    entry = cache.get("row", KEY)
    assert entry is not None and entry.value == {"value": 2.5} and entry.tensors == {}
    assert [path.name for path in tmp_path.iterdir()] == [cache.file_name("row", KEY)]


def test_a_changed_file_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ResultCache(tmp_path, shipped_dir=None)
    path = cache.put("row", KEY, {"value": 1.5}, {"x": torch.ones(3)})
    assert path is not None
    original = path.read_bytes()
    for damaged in (
        original.replace(b"1.5", b"9.5"),
        original.replace(b"abc", b"abd"),
        original[:-1] + bytes([original[-1] ^ 1]),
        original[: len(original) // 2],
        b"",
    ):
        assert damaged != original
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert cache.get("row", KEY) is None
        assert str(path) in caplog.text
    # An entry under the name of another key is not believed either.
    path.write_bytes(original)
    path.rename(tmp_path / cache.file_name("row", {"another": "key"}))
    assert cache.get("row", {"another": "key"}) is None


def test_shipped_entries_come_first_and_are_never_written(tmp_path: Path) -> None:
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    ResultCache(shipped, None).put("row", KEY, {"value": 1})
    cache = ResultCache(user, shipped)
    cache.put("row", KEY, {"value": 2})
    entry = cache.get("row", KEY)
    assert entry is not None and entry.value == {"value": 1}
    (shipped / cache.file_name("row", KEY)).write_bytes(b"damaged")
    entry = cache.get("row", KEY)
    assert entry is not None and entry.value == {"value": 2}


def test_the_bundled_teachers_results_are_shipped() -> None:
    assert list(SHIPPED.glob("teacher-steps_25-clip_score-*.safetensors"))


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in ("old", "new"):
        with written_whole(file) as partial:
            partial.write_text(content)
            assert not file.exists() or file.read_text() == "old"
        assert file.read_text() == content
    with pytest.raises(OSError, match="full"), written_whole(file) as partial:
        partial.write_text("half")
        raise OSError("full")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_unwritable_folder_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ResultCache(tmp_path / "file", None)
    with caplog.at_level(logging.WARNING):
        assert cache.put("row", KEY, {"value": 1}) is None
    assert "can't be written" in caplog.text


def test_folder_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path))
    assert user_cache_dir() == tmp_path
    monkeypatch.delenv("ONE_STEP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / ".cache" / "one-step-distillation"


def test_hashes_depend_on_content_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "weights.safetensors").write_bytes(b"12345")
    assert hash_folder(tmp_path / "a") == hash_folder(tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("a card")
    assert hash_folder(tmp_path / "a") == hash_folder(tmp_path / "b")
    (tmp_path / "b" / "unet" / "weights.safetensors").write_bytes(b"12346")
    assert hash_folder(tmp_path / "a") != hash_folder(tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        hash_folder(tmp_path / "none")
    assert hash_texts(["a", "b"]) != hash_texts(["b", "a"]) != hash_texts(["ba"])
    x = torch.ones(2, 3)
    assert hash_tensors({"x": x}) == hash_tensors({"x": x.clone()})
    assert hash_tensors({"x": x}) != hash_tensors({"x": x.T}) != hash_tensors({"y": x})
    assert hash_tensors({"x": x}) != hash_tensors({"x": x.double()})


DRAWN = EvaluationSet(
    "x", ["a cat", "a dog"], [0, 1], negatives=["blur", "noise"], groups=["u", "v"], frame=Frame(8)
)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16-mixed"},
        {"groups": ["u", "u"]},
        {"groups": None},
        {"negatives": ["blur", "text"]},
        {"negatives": None},
        {"negatives": ["u", "v"], "groups": ["blur", "noise"]},
        {"frame": Frame(8, crop=False)},
        {"frame": None},
        {"captions": ["a cat", "a cup"]},
        {"seeds": [0, 2]},
        {"teacher": "another"},
        {"protocol": -1},
        {"sampler": {"steps": 2}},
        {"metric": {"metric_version": 2}},
    ],
    ids=str,
)
def test_the_teachers_rows_are_those_of_all_they_depend_on(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone makes another row; with everything the same it is found again."""
    measured = []

    def measure(generate: Any, drawn: EvaluationSet, metrics: list[Any], *_: Any) -> dict[str, Any]:
        measured.append(drawn)
        return {one.name: {"value": float(len(measured)), "num_images": 2, "details": {}} for one in metrics}

    def value(**changed: Any) -> float:
        monkeypatch.setattr(teacher_module, "PROTOCOL", changed.get("protocol", 1))
        teacher: Any = SimpleNamespace(
            content_hash=changed.get("teacher", "one"), steps=25,
            rows={"steps_1": (None, changed.get("sampler", {"steps": 1}))},
        )  # fmt: skip
        key = changed.get("metric", {"metric_version": 1})
        metric: Any = SimpleNamespace(name="score", key=lambda: key)
        drawn = replace(DRAWN, **{k: v for k, v in changed.items() if hasattr(DRAWN, k)})
        precision = changed.get("precision", "32-true")
        rows = teacher_metrics(teacher, drawn, [metric], 2, ResultCache(tmp_path, None), precision)
        return float(rows["steps_1"]["score"]["value"])

    monkeypatch.setattr(teacher_module, "measure_set", measure)
    assert (value(), value(**change), value(), value(**change)) == (1, 2, 1, 2)
