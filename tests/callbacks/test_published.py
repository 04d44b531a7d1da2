"""Published values stand beside ours only where the protocol is the same; everything else is named."""

import hashlib
import json
from dataclasses import replace
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

TITLE = "Published values, measured the same way but for what is told above"
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
    assert table[1][0] in cells(render_html(report), TITLE)
    assert published_table(Report(content, {})) is None and measured_table(Report(content, {})) is None


def table(name: str) -> list[tuple[str, str, list[float]]]:
    """The rows of a protocol: model, the source's number and version at arXiv, values in their order."""
    return [
        (row.model, row.source.rpartition("arXiv ")[2], list(row.values.values()))
        for row in PROTOCOLS[name].results
    ]


def test_the_numbers_of_coco_are_those_of_the_papers() -> None:
    assert table("coco30k_swiftbrush") == [
        ("SwiftBrush, measured again", "2408.14176", [15.46, 0.30, 0.47, 0.46]),
        ("SwiftBrush v2, model A", "2408.14176", [11.27, 0.31, 0.48, 0.54]),
        ("SwiftBrush v2, model B", "2408.14176", [11.02, 0.32, 0.51, 0.52]),
        ("SwiftBrush v2, merged", "2408.14176", [8.77, 0.32, 0.55, 0.53]),
        ("SwiftBrush v2, with real images", "2408.14176", [8.14, 0.32, 0.57, 0.52]),
        ("SD Turbo, one step", "2408.14176", [16.10, 0.33, 0.65, 0.35]),
        ("SD2.1, guidance 2", "2408.14176", [9.64]),
        ("SD2.1, guidance 4.5", "2408.14176", [12.26]),
    ]
    for row in PROTOCOLS["coco30k_swiftbrush"].results:
        assert list(row.values) == ["fid", "clip_score", "precision", "recall"][: len(row.values)]
    assert table("coco30k_dmd2") == [
        ("DMD2, SD1.5, one step, without GAN", "2405.14867", [9.28]),
        ("DMD2, SD1.5, one step", "2405.14867", [8.35]),
        ("SiD-LSG, SD1.5, κ 1.5", "2406.01561", [8.71, 0.302]),
        ("SiD-LSG, SD1.5, κ 1.5, trained longer", "2406.01561", [8.15, 0.304]),
        ("SiD-LSG, SD1.5, κ 2", "2406.01561", [9.56, 0.313]),
        ("SiD-LSG, SD1.5, κ 3", "2406.01561", [13.21, 0.314]),
        ("SiD-LSG, SD1.5, κ 4.5", "2406.01561", [16.59, 0.317]),
        ("SiD-LSG, SD2.1-base, κ 1.5", "2406.01561", [9.52, 0.308]),
        ("SiD-LSG, SD2.1-base, κ 2", "2406.01561", [10.97, 0.318]),
        ("SiD-LSG, SD2.1-base, κ 3", "2406.01561", [13.50, 0.321]),
        ("SiD-LSG, SD2.1-base, κ 4.5", "2406.01561", [16.54, 0.322]),
    ]
    for row in PROTOCOLS["coco30k_dmd2"].results:
        assert list(row.values) == ["fid", "clip_score"][: len(row.values)]


def test_the_numbers_of_hpsv2_are_those_of_the_papers() -> None:
    assert table("hpsv2") == [
        ("SwiftBrush", "2408.14176", [26.91, 27.21, 26.32, 26.37]),
        ("SwiftBrush v2", "2408.14176", [27.13, 27.56, 26.69, 26.76]),
        ("SwiftBrush v2, with real images", "2408.14176", [27.25, 27.62, 26.86, 26.77]),
        ("SwiftBrush v2, with an HPS loss", "2408.14176", [28.22, 28.00, 27.35, 27.42]),
        ("PG-SB, SD1.5", "2412.02687v1", [27.02]),
        ("PG-SB, SD2.1", "2412.02687v1", [27.35]),
        ("PG-SB, PixArt-α", "2412.02687v1", [30.34]),
        ("PG-SB, SD1.5, with NASA", "2412.02687v1", [27.03]),
        ("PG-SB, SD2.1, with NASA", "2412.02687v1", [27.53]),
        ("PG-SB, PixArt-α, with NASA", "2412.02687v1", [31.08]),
        ("NASA-T, SD1.5", "2412.02687v3", [27.45]),
        ("NASA-T, SD2.1", "2412.02687v3", [27.84]),
        ("NASA-T, PixArt-α", "2412.02687v3", [30.61]),
    ]
    styles = ["hpsv2/anime", "hpsv2/photo", "hpsv2/concept-art", "hpsv2/paintings"]
    for row in PROTOCOLS["hpsv2"].results:
        assert list(row.values) == (styles if len(row.values) == 4 else ["hpsv2"])


def test_hpsv2_is_compared_in_its_version_2_0() -> None:
    prompts = EvaluationSet("hpsv2", ["x"] * 3200, list(range(3200)), published_count=3200, notes=("JPEG",))
    scored = {name: result(26.0, hps_version="v2.0", scale=100) for name in ("hpsv2", "hpsv2/anime")}
    assert {name for name, _ in published_rows(scored, prompts)} == {"hpsv2", "hpsv2/anime"}
    later = result(26.0, hps_version="v2.1", scale=100)
    assert deviations("hpsv2/anime", later, prompts) == ["hps version v2.1 instead of v2.0"]
    assert published_rows({"hpsv2": later}, prompts) == []
    assumed, known = remarks("hpsv2/anime", prompts)
    assert assumed.startswith("open: ") and "v2.0 is assumed" in assumed
    assert known == "small difference: JPEG"


def test_swiftbrush_v2_is_compared_by_fid_and_clip_score() -> None:
    """By the code that it released; no network here is that of its precision and recall."""
    ours = replace(coco(), name="coco30k_swiftbrush")
    eyes = {"k": 3, "reference_num_images": 40_504}
    scores = {
        "fid": result(9.0, **FID), "clip_score": result(0.3, **CLIP),
        "precision": result(0.5, **eyes, extractor="Inception v3 (x), mode clean"),
        "recall": result(0.5, **eyes, extractor="Inception v3 (x), mode legacy_tensorflow"),
    }  # fmt: skip
    assert {name for name, _ in published_rows(scores, ours)} == {"fid", "clip_score"}
    for name in ("precision", "recall"):
        (said,) = deviations(name, scores[name], ours) or []
        assert said.startswith("network Inception v3 (x), mode ") and said.endswith(
            "instead of guided-diffusion's TensorFlow Inception (BGR)"
        )
    plain = result(0.3, **(CLIP | {"prefix": "", "extractor": "open_clip ViT-B-32, openai"}))
    assert len(deviations("clip_score", plain, ours) or []) == 2
    others = replace(ours, facts={"differs": "captions of mine.txt instead of those"})
    assert deviations("fid", scores["fid"], others) == ["captions of mine.txt instead of those"]
    assert published_rows(scores, others) == []


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
