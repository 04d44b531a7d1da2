"""Published values stand beside ours only where the protocol is the same; everything else is named."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import cli
from callbacks.metrics import inception
from common.errors import UserError
from datamodules import published_sets
from datamodules.evaluation_sets import EvaluationSet
from datamodules.picture_files import Frame
from reports.published import PROTOCOLS, deviations, label, published_rows, remarks
from reports.run_report import Report, measured_table, published_table, result_table
from reports.write import render_html, render_markdown
from tests.callbacks.networks import inception_file, pictures, save
from tests.callbacks.standin import CAPTIONS
from tests.pages import cells

FID = {"mode": "clean", "extractor": "Inception v3 (x), mode clean", "reference_num_images": 40_504}
CLIP = {"prefix": "A photo depicts ", "scale": 1.0, "extractor": "open_clip ViT-g-14, laion2b_s12b_b42k"}


def coco(count: int = 30_000) -> EvaluationSet:
    return EvaluationSet(
        "coco30k_dmd2", ["x"] * count, list(range(count)), published_count=30_000, published_references=40_504
    )


def result(value: float, **details: Any) -> dict[str, Any]:
    return {"value": value, "num_images": 30_000, "details": details}


def test_the_same_protocol_differs_in_nothing() -> None:
    assert deviations("fid", result(9.0, **FID), coco()) == []
    assert deviations("clip_score", result(0.3, **CLIP), coco()) == []
    assert deviations("recall", result(0.3), coco()) is None  # DMD2 does not publish it
    assert deviations("fid", result(9.0, **FID), EvaluationSet("mine", ["x"], [0])) is None


@pytest.mark.parametrize(
    ("name", "details", "count", "said"),
    [
        ("fid", FID | {"mode": "legacy_tensorflow"}, 30_000, "mode legacy_tensorflow instead of clean"),
        ("fid", FID | {"reference_num_images": 5000}, 30_000, "5,000 real pictures instead of 40,504"),
        ("fid", FID, 5000, "5,000 pictures instead of 30,000"),
        ("clip_score", CLIP | {"prefix": ""}, 30_000, "prefix  instead of A photo depicts "),
        ("clip_score", CLIP | {"extractor": "emoji-clip"}, 30_000, "network emoji-clip instead of ViT-g-14"),
        ("clip_score", CLIP | {"scale": 100.0}, 30_000, "scale 100.0 instead of 1.0"),
    ],
)
def test_every_deviation_is_named_and_hides_the_published_values(
    name: str, details: dict[str, Any], count: int, said: str
) -> None:
    measured = result(9.0, **details)
    assert deviations(name, measured, coco(count)) == [said]
    assert published_rows({name: measured}, coco(count)) == []


def test_few_samples_have_their_own_name() -> None:
    names = [label("fid", coco(n)) for n in (30_000, 5000, 2500, 100)]
    assert names == ["FID-30k", "FID-5k", "FID-2.5k", "FID-100"]
    assert label("clip_score", coco(5000)) == "clip_score-5k"
    assert label("fid", EvaluationSet("mine", ["x"], [0])) == "FID"


def test_published_values_stand_beside_ours() -> None:
    results = {"fid": result(9.0, **FID), "clip_score": result(0.3, **(CLIP | {"prefix": ""}))}
    rows = published_rows(results, coco())
    assert {name for name, _ in rows} == {"fid"}
    found = {row.model: row.values["fid"] for _, row in rows}
    assert found["DMD2, SD1.5, one step"] == 8.35 and found["SiD-LSG, SD1.5, κ 1.5"] == 8.71
    content = {
        "experiment": "coco30k_dmd2", "step": None, "weights": "ema", "model": "m", "metrics": results,
        "teacher_metrics": {}, "timing": {}, "environment": {}, "config_path": "c",
    }  # fmt: skip
    published = tuple((name, row.model, row.values[name], row.source) for name, row in rows)
    report = Report(content, {}, row="m, 1 step", published=published)
    table = published_table(report)
    assert table is not None
    assert ["fid ↓", "9.000", "8.350", "DMD2, SD1.5, one step", "DMD2, arXiv 2405.14867"] in table[1]
    markdown = render_markdown(report, Path("."))
    assert "| fid ↓ | 9.000 | 8.350 | DMD2, SD1.5, one step |" in markdown and "# coco30k_dmd2\n" in markdown
    assert table[1][0] in cells(
        render_html(report), "Published values, measured the same way but for what is told above"
    )
    assert published_table(Report(content, {})) is None and measured_table(Report(content, {})) is None


def test_the_numbers_are_those_of_the_papers() -> None:
    swiftbrush = {row.model: dict(row.values) for row in PROTOCOLS["coco30k_swiftbrush"].results}
    assert swiftbrush["SwiftBrush v2, merged"] == {
        "fid": 8.77, "clip_score": 0.32, "precision": 0.55, "recall": 0.53,
    }  # fmt: skip
    assert swiftbrush["SwiftBrush"] == {"fid": 16.67, "clip_score": 0.29}
    styles = {row.model: dict(row.values) for row in PROTOCOLS["hpsv2"].results}["SwiftBrush"]
    assert styles["hpsv2/concept-art"] == 26.32 and styles["hpsv2/paintings"] == 26.37
    means = {row.model: row.values.get("hpsv2") for row in PROTOCOLS["hpsv2"].results}
    assert means["PG-SB, SD2.1"] == 27.35 and means["NASA-T, PixArt-α"] == 30.61 and not means["SwiftBrush"]
    assert "assumed" in remarks("hpsv2/anime", EvaluationSet("hpsv2", ["x"], [0]))[0]


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A miniature of coco30k_dmd2: its own list, real pictures, network."""
    monkeypatch.setenv("ONE_STEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception.InceptionExtractor, "width", 32)  # roots of large matrices take seconds
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS))
    monkeypatch.setattr(published_sets, "DMD2_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    config = tmp_path / "coco.yaml"
    yaml = (Path(__file__).parents[2] / "configs/eval/coco30k_dmd2.yaml").read_text()
    config.write_text(yaml[: yaml.index("  - class_path: callbacks.metrics.clip_score")])
    return {
        "config": str(config), "captions": str(path), "inception": str(inception_file(tmp_path, 32)),
        "reference": str(save(pictures(10, height=40, width=30), tmp_path / "real")),
        "output": str(tmp_path / "out"), "device": "cpu",
    }  # fmt: skip


def test_the_preset_frames_both_sides_and_says_what_differs(
    benchmark: dict[str, str], tmp_path: Path
) -> None:
    drawn = pictures(12, seed=1, height=30, width=50)
    given = benchmark | {"images": str(save(drawn, tmp_path / "drawn")), "count": "8"}
    cli.main(["evaluate", *(f"--{name}={value}" for name, value in given.items())])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    details = report["metrics"]["fid"]["details"]
    assert details["label"] == "FID-8" and details["reference_num_images"] == 10
    assert details["differs_from_published"][:2] == [
        "8 pictures instead of 30,000", "10 real pictures instead of 40,504",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["crop_and_resize"] == "8-bit, centre crop, LANCZOS to 256x256"
    # the same pictures, cropped and resized beforehand on both sides
    frame = Frame(256)
    save(frame.batch(drawn), tmp_path / "framed")
    save(frame.batch(pictures(10, height=40, width=30)), tmp_path / "framed_real")
    again = given | {"images": str(tmp_path / "framed"), "reference": str(tmp_path / "framed_real"),
                     "output": str(tmp_path / "again")}  # fmt: skip
    cli.main(["evaluate", *(f"--{name}={value}" for name, value in again.items())])
    found = json.loads((tmp_path / "again" / "report.json").read_text())["metrics"]["fid"]
    assert found["value"] == pytest.approx(report["metrics"]["fid"]["value"], rel=1e-9)
    assert "FID-8 ↓" in (tmp_path / "out" / "report.md").read_text()


def test_the_whole_preset_needs_all_of_val2014(benchmark: dict[str, str], tmp_path: Path) -> None:
    given = benchmark | {"images": str(save(pictures(12, height=32, width=32), tmp_path / "drawn"))}
    with pytest.raises(UserError, match="holds 10 readable pictures, and 40504 are needed"):
        cli.main(["evaluate", *(f"--{name}={value}" for name, value in given.items())])


def test_tables_of_a_run_are_as_before() -> None:
    """The columns carry names and arrows, without labels."""
    content = {"metrics": {"clip_score": result(0.5), "hpsv2/anime": result(26.0)}, "teacher_metrics": {}}
    header, cells = result_table(Report(content, {}))
    assert header == ["", "clip_score ↑", "hpsv2/anime ↑", "images measured"]
    assert cells == [["Student, 1 step", "0.5000", "26.00", "30,000"]]
