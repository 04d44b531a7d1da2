"""The report of a run: its schema, its numbers, a page that fetches nothing, and curves that lose nothing."""

import json
import math
import re
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from callbacks import report as report_module
from callbacks.loggers import MetricsCSV
from callbacks.report import RunReport, StepTimer, sample_pictures
from callbacks.samples import SampleGrid
from callbacks.stage_report import StageReport
from common.environment import peak_memory_gib
from reports.plots import Series, grouped, line_plot, read_series
from reports.run_report import Report, findings, format_value, write_report
from reports.text import render_text_table
from tests.callbacks.standin import StandIn, StandInData
from tests.callbacks.test_evaluation import evaluation, own_cache, reference, trainer  # noqa: F401 - fixtures

KEYS = {
    "experiment", "step", "weights", "model", "metrics", "teacher_metrics", "timing", "environment",
    "config_path",
}  # fmt: skip


class Page(HTMLParser):
    """Checks that tags are balanced and collects every address and all text."""

    VOID = {"meta", "img", "br", "line", "circle", "polyline", "path"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_leave_a_report_of_their_own(
    stage: str,
    tiny_sd: Path,
    tiny_clip: Path,
    reference: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "emoji" / "version_3"
    run = trainer(folder, StageReport(), evaluation(tiny_clip, reference, seed=5))
    (values,) = getattr(run, stage)(StandIn(tiny_sd), StandInData(), verbose=False)
    report = json.loads((folder / stage / "report.json").read_text())
    assert set(report) == KEYS and report["weights"] == "ema" and report["experiment"] == "emoji"
    prefix = {"validate": "val", "test": "test"}[stage]
    assert set(report["metrics"]) == {"frechet_distance", "clip_score"}
    for name, result in report["metrics"].items():
        assert result["value"] == pytest.approx(values[f"{prefix}/{name}"])
        assert result["num_images"] == 7  # without the padding sample
        assert result["details"]["seeds"] == "0 + place of the caption"
    assert report["metrics"]["frechet_distance"]["details"]["reference"].startswith("12 real pictures (")
    manifest = json.loads((folder / stage / "manifest.json").read_text())
    assert manifest["captions"]["count"] == 7 and manifest["seeds"]["first"] == 0
    page = (folder / stage / "report.html").read_text()
    assert "How each number was measured" in page and "data:image/png" in page
    assert (folder / stage / "samples.png").is_file() and not (folder / "report.json").exists()
    assert f"{stage}/report.html" in capsys.readouterr().out


def test_a_run_of_one_step_leaves_a_whole_report(
    tiny_sd: Path,
    tiny_clip: Path,
    reference: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "emoji" / "version_3"
    callbacks = [RunReport(), evaluation(tiny_clip, reference), SampleGrid(num_images=2, teacher_steps=2)]
    trainer(folder, *callbacks, max_steps=1).fit(StandIn(tiny_sd), StandInData())
    report = json.loads((folder / "report.json").read_text())
    assert set(report) == KEYS
    assert (report["experiment"], report["step"], report["weights"]) == ("emoji", 1, "ema")
    assert set(report["timing"]) == {"seconds_per_step", "images_per_second", "peak_memory_gib"}
    assert all(value > 0 for value in report["timing"].values())
    timing = report["timing"]
    assert timing["images_per_second"] == pytest.approx(4 / timing["seconds_per_step"])
    assert set(report["teacher_metrics"]) == {"steps_2", "steps_1"}
    for results in (report["metrics"], *report["teacher_metrics"].values()):
        assert set(results) == {"frechet_distance", "clip_score", "milliseconds_per_image"}
        assert all(set(result) == {"value", "num_images", "details"} for result in results.values())
    assert report["environment"]["torch"] == metadata.version("torch")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["captions"]["count"] == 8 and manifest["start_timestep"] == 999
    printed = capsys.readouterr().out
    page = Page((folder / "report.html").read_text())
    for text in (printed, (folder / "report.md").read_text(), page.text):
        for title in ("Teacher, 2 steps, guidance 4.5", "Teacher, 1 step", "Student, 1 step"):
            assert title in text
        for results in (report["metrics"], *report["teacher_metrics"].values()):
            for result in results.values():
                assert format_value(result["value"]) in text
    assert str(folder / "report.html") in printed
    assert "samples/step_1.png" in (folder / "report.md").read_text()
    assert "fewer than 8 x 16" in (folder / "report.html").read_text()
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_page_fetches_nothing_and_holds_pictures_and_curves(
    tiny_sd: Path,
    tiny_clip: Path,
    reference: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a<b>&c" / "version_0"
    callbacks = [evaluation(tiny_clip, reference), SampleGrid(num_images=2, teacher_steps=2), RunReport()]
    trainer(folder, *callbacks, max_steps=4).fit(StandIn(tiny_sd), StandInData())
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert page.tags.count("img") == 3  # steps 4, 0, 2
    assert page.tags.count("svg") == 3  # frechet_distance, clip_score, train/loss
    assert "a<b>&c, step 4" in page.text and "a<b>" not in text
    assert "student updates" in page.text and "teacher, 2 steps" in page.text


def test_completing_a_finished_run_keeps_its_timing_and_its_rows(
    tiny_sd: Path,
    tiny_clip: Path,
    reference: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "emoji" / "version_0"
    first = trainer(folder, RunReport(), evaluation(tiny_clip, reference), max_steps=2)
    first.fit(StandIn(tiny_sd), StandInData())
    first.save_checkpoint(tmp_path / "last.ckpt")
    before, rows = json.loads((folder / "report.json").read_text()), (folder / "metrics.csv").read_text()
    assert rows.count("\n") == 4  # header, two steps (validation stands with the second), the final values
    (folder / "report.json").unlink()
    module = StandIn(tiny_sd)
    module.student_steps = 2  # a distillation takes it from the checkpoint
    logger = MetricsCSV(folder, resume_step=2)
    again = trainer(folder, RunReport(), evaluation(tiny_clip, reference), max_steps=2, logger=logger)
    again.fit(module, StandInData(), ckpt_path=tmp_path / "last.ckpt")
    after = json.loads((folder / "report.json").read_text())
    for name in ("seconds_per_step", "images_per_second"):
        assert after["timing"][name] == before["timing"][name] > 0
    assert after["timing"]["peak_memory_gib"] >= before["timing"]["peak_memory_gib"] * 0.99
    assert (folder / "metrics.csv").read_text().count("\n") == 4


def test_report_without_evaluation(tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path / "run", RunReport(), max_steps=1).fit(StandIn(tiny_sd), StandInData())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report) == KEYS and report["metrics"] == {} and report["teacher_metrics"] == {}
    assert "Nothing was measured" in Page((tmp_path / "run" / "report.html").read_text()).text
    assert "report.html" in capsys.readouterr().out


def made_report(**changes: Any) -> Report:
    def result(value: float, **details: Any) -> dict[str, Any]:
        return {"value": value, "num_images": 1024, "details": details}

    def row(distance: float, score: float, milliseconds: float) -> dict[str, Any]:
        return {
            "frechet_distance": result(distance), "clip_score": result(score),
            "milliseconds_per_image": result(milliseconds),
        }  # fmt: skip

    content = {
        "experiment": "emoji", "step": 500, "weights": "ema", "model": "m", "metrics": row(10, 0.25, 4),
        "teacher_metrics": {"steps_1": row(40, 0.1, 4), "steps_25": row(5, 0.3, 100)},
        "timing": {"seconds_per_step": None, "images_per_second": None, "peak_memory_gib": 1.0},
        "environment": {"gpus": []}, "config_path": "c",
    }  # fmt: skip
    return Report(content | changes, {"guidance": {"steps_25": 4.5}})


def test_findings_and_table() -> None:
    found = " | ".join(findings(made_report()))
    assert "25 times as fast" in found and "25 % of the teacher's in one step" in found and "75 % of" in found
    lines = render_text_table(made_report()).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "Teacher, 25 steps, guidance 4.5", "Teacher, 1 step", "Student, 1 step",
    ]  # fmt: skip
    assert lines[4].split()[-4:] == ["10.00", "0.2500", "4.000", "1,024"]
    assert len({len(line) for line in lines}) == 1
    assert findings(made_report(teacher_metrics={})) == []


def test_report_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(made_report(), tmp_path)
    before = (tmp_path / "report.json").read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_report(made_report(step=501), tmp_path)
    assert (tmp_path / "report.json").read_text() == before


@pytest.mark.parametrize(
    "value, text",
    [(12.3456, "12.35"), (0.123456, "0.1235"), (0.00123456, "0.001235"), (1234.5, "1,234"), (0.0, "0"),
     (1.0, "1.000"), (-0.25, "-0.2500"), (1e-6, "1.000e-06"), (2.5e7, "2.500e+07")],
)  # fmt: skip
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert format_value(value) == text


def points_of(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r'<polyline[^>]* points="([^"]*)"', svg)
    return [(float(x), float(y)) for text in found for x, y in (pair.split(",") for pair in text.split())]


def test_curves_drop_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = [f"{i},{math.sin(i)},{'' if i % 10 else i}" for i in range(200)]
    path.write_text("\n".join(["step,train/loss,val/clip_score", *rows, "200,nan,", "201,-inf,5", ""]))
    series = read_series(path)
    assert len(series["train/loss"].points) == 200 and series["train/loss"].not_finite == 2
    assert [x for x, _ in series["val/clip_score"].points] == [*range(0, 200, 10), 201]
    svg = line_plot("loss", [series["train/loss"]])
    points = points_of(svg)
    assert len(points) == 200 and "2 not finite" in svg
    # Up is up and right is right.
    highest = max(range(200), key=math.sin)
    assert min(range(200), key=lambda i: points[i][1]) == highest
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert read_series(tmp_path / "none.csv") == {}


def test_long_curves_keep_their_extremes() -> None:
    values = [(float(i), math.sin(i / 700)) for i in range(50_000)]
    values[31_234] = (31_234.0, 9.0)
    values[40_001] = (40_001.0, -7.0)
    points = points_of(line_plot("x", [Series("x", values)]))
    few = values[::17] + [values[31_234], values[40_001]]
    every = points_of(line_plot("x", [Series("x", few)]))
    assert len(points) < 2_000
    assert min(y for _, y in points) == pytest.approx(min(y for _, y in every))
    assert max(y for _, y in points) == pytest.approx(max(y for _, y in every))
    assert (points[0][0], points[-1][0]) == (pytest.approx(58), pytest.approx(446, abs=0.2))


@pytest.mark.parametrize(
    "values",
    [
        [(5.0, 2.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(1.0, -3.0), (2.0, 1e-9)],
        [(0.0, 1e12)],
        [(1.0, 1e-7), (9.0, 2.0)],
    ],  # fmt: skip
)
def test_every_curve_has_axes(values: list[tuple[float, float]]) -> None:
    svg = line_plot("a<b", [Series("a<b", values)], {"teacher": 1.0, "none": float("nan")})
    assert "a&lt;b" in svg and "student updates" in svg and "nan" not in svg and "teacher" in svg
    assert svg.count('class="grid"') >= 3
    numbers = [float(n) for n in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy)="([^"]+)"', svg)]
    assert all(0 <= n <= 460 for n in numbers)


def test_wide_ranges_get_powers_of_ten() -> None:
    svg = line_plot("x", [Series("x", [(0.0, 1e-4), (1.0, 1e-2), (2.0, 1.0)])])
    assert "x (log)" in svg and ">1e-4<" in svg and ">1<" in svg
    heights = [y for _, y in points_of(svg)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert "(log)" not in line_plot("x", [Series("x", [(0.0, 0.0), (1.0, 1e4)])])


def test_groups() -> None:
    names = ["val/fid", "test/fid", "train/loss", "train/norm/a", "train/norm/b", "norm/a", "norm/b", "lr"]
    groups = grouped({name: Series(name) for name in names})
    found = {title: [one.name for one in group] for title, group in groups.items()}
    assert found == {
        "fid": ["val/fid", "test/fid"], "train/loss": ["train/loss"],
        "train/norm": ["train/norm/a", "train/norm/b"],
        "norm": ["norm/a", "norm/b"], "lr": ["lr"],
    }  # fmt: skip
    assert line_plot("empty", [Series("empty", [], 3)]) == ""


def test_timer_takes_the_median_once_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [100.0, 50, 50, 50, 50, 1, 2, 30, 2, 2]
    clock, now = [], 0.0
    for duration in durations:
        clock += [now, now + duration]
        now += duration + 1000
    monkeypatch.setattr(report_module.time, "perf_counter", iter(clock).__next__)
    timer, cpu = StepTimer(), torch.device("cpu")
    assert timer.seconds_per_step() is None
    for _ in durations:
        timer.start(cpu)
        timer.stop(cpu, 64)
    assert timer.seconds_per_step() == 2.0 and timer.images_per_step == 64
    assert 0.01 < peak_memory_gib() < 200


def test_pictures_begin_with_the_last(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    grids = [f"step_{n}" for n in range(0, 1000, 100)]
    for name in [*grids, "score_views_step_900", "score_views_step_0", "other"]:
        Image.new("RGB", (1, 1)).save(tmp_path / "samples" / f"{name}.png")
    names = [path.stem for path in sample_pictures(tmp_path).values()]
    assert names[:3] == ["step_900", "score_views_step_900", "step_0"] and names[-1] == "step_800"
    assert len(names) == 8
