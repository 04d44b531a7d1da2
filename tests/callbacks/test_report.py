"""The report of a run: its schema, its numbers, a page that fetches nothing, and curves that lose nothing."""

import json
import math
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from importlib import metadata
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from callbacks import report as report_module
from callbacks.loggers import MetricsCSV
from callbacks.report import RunReport, StepTimer, sample_pictures
from callbacks.samples import SampleGrid
from callbacks.stage_report import StageReport
from common.environment import peak_memory_gib
from lightning_modules.diffusion.steps import Steps
from reports.html import figure_json
from reports.plots import Series, grouped, line_figure, read_series, thinned
from reports.run_report import Report, findings, render_text_table
from reports.sheets import labelled_grid, save_png
from reports.strip import read_strip
from reports.text import bullets, format_value, markdown_table
from reports.write import render_html, write_report
from tests.callbacks.standin import StandIn, StandInData
from tests.callbacks.test_evaluation import evaluation, own_cache, reference, trainer  # noqa: F401 - fixtures
from tests.pages import Page, figures, without_scripts

KEYS = {
    "experiment", "step", "weights", "model", "metrics", "teacher_metrics", "timing", "environment",
    "config_path", "finished", "command", "commit", "run", "evaluation_set",
}  # fmt: skip


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validate_and_test_leave_a_report_of_their_own(
    stage: str,
    tiny_sd: Path,
    tiny_clip: Path,
    reference: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(perf_counter=iter([100.0, 128.0]).__next__)  # at the beginning and at the end
    monkeypatch.setattr("callbacks.stage_report.time", clock)
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
    assert (report["timing"]["seconds"], report["timing"]["images_per_second"]) == (28, 0.25)
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
    timing = report["timing"]
    assert timing.pop("seconds_per_step_quartiles") is None, "one step has no spread"
    assert set(timing) == {"seconds_per_step", "images_per_second", "peak_memory_gib"}
    assert all(value > 0 for value in timing.values()) and report["finished"]
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
        for title in ("Teacher, 2 steps, guidance 4.5", "Teacher, 1 step, unguided", "Student, 1 step"):
            assert title in text
        for results in (report["metrics"], *report["teacher_metrics"].values()):
            for result in results.values():
                assert format_value(result["value"]) in text
    assert str(folder / "report.html") in printed
    assert "samples/step_1.png" in (folder / "report.md").read_text()
    assert "fewer than 8 x 16" in (folder / "report.html").read_text()
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_a_student_of_several_steps_has_rows_for_fewer(
    tiny_sd: Path,
    tiny_clip: Path,
    reference: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    module = StandIn(tiny_sd)
    module.steps = module.generator.steps = Steps((999, 749, 499, 249))
    trainer(tmp_path, RunReport(), evaluation(tiny_clip, reference), max_steps=1).fit(module, StandInData())
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == KEYS | {"student_metrics"} and set(report["student_metrics"]) == {
        "steps_1",
        "steps_2",
    }
    rows = [report["student_metrics"]["steps_1"], report["student_metrics"]["steps_2"], report["metrics"]]
    assert len({row["frechet_distance"]["value"] for row in rows}) == 3
    text = (tmp_path / "report.md").read_text()
    places = [text.index(f"Student, {steps}") for steps in ("1 step", "2 steps", "4 steps")]
    assert places == sorted(places) and len(module.generator.steps) == 4


def test_page_fetches_nothing_from_the_net_and_holds_pictures_and_curves(
    tiny_sd: Path,
    tiny_clip: Path,
    reference: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a<b>&c" / "version_0"
    callbacks = [evaluation(tiny_clip, reference), SampleGrid(num_images=2, teacher_steps=2), RunReport()]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("lr: 0.5\nlogger:\n  api_key: hush\n")
    trainer(folder, *callbacks, KeepReport(), max_steps=4).fit(StandIn(tiny_sd), StandInData())
    early = json.loads((folder / "early.json").read_text())
    assert early["step"] == 2 and not early["finished"] and early["teacher_metrics"] == {}
    assert early["metrics"]["clip_score"]["num_images"] == 7, "of the validation"
    page = Page((folder / "early.html").read_text())
    assert "This run is not finished" in page.text and "Student, 1 step, at its last validation" in page.text
    assert "lr: 0.5" in page.text and "hush" not in page.text and "(not shown)" in page.text
    assert [one["layout"]["title"]["text"] for one in figures((folder / "early.html").read_text())] == [
        "val/clip_score", "val/frechet_distance", "train/loss",
    ]  # fmt: skip
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "not finished" not in page.text
    *pictures, report, manifest, curves, script = page.addresses
    assert all(address.startswith("data:image/webp;base64,") for address in pictures)
    assert b64decode(curves.removeprefix("data:text/csv;base64,")) == (folder / "metrics.csv").read_bytes()
    assert json.loads(b64decode(report.partition(",")[2])) == json.loads((folder / "report.json").read_text())
    assert json.loads(b64decode(manifest.partition(",")[2]))["captions"]["count"] == 8
    assert script == "../../plotly.min.js", "what draws the curves lies once beside all experiments"
    assert "plotly.js v" in (tmp_path / "plotly.min.js").read_text()
    assert not re.search(r"https?:|url\(|@import|<link", text)
    assert page.tags.count("img") == 4  # student and teacher for two prompts
    frames = [json.loads(each) for each in re.findall("data-frames='(.*?)'", text)]
    assert [len(each) for each in frames] == [3, 3], "steps 0, 2, 4"
    assert "data-steps='[0, 2, 4]'" in text and frames[0][-1] == pictures[0]
    assert "student, 1 step" in page.text and "teacher, 2 steps" in page.text
    assert f"teacher {tiny_sd.name} · on " in page.text
    for name in (
        "milliseconds_per_image",
        "fastest to slowest pass",
        "Brackets behind a time hold the fastest",
    ):
        assert name in page.text
    assert "a<b>&c, step 4" in page.text and "a<b>" not in text
    drawn = {one["layout"]["title"]["text"]: one for one in figures(text)}
    metrics = ("clip_score", "frechet_distance")
    assert {*drawn} == {"train/loss", *(f"{stage}/{name}" for stage in ("val", "test") for name in metrics)}
    assert drawn["train/loss"]["layout"]["xaxis"]["title"]["text"] == "student updates"
    names = {title: [trace["name"] for trace in one["data"]] for title, one in drawn.items()}
    assert names["test/clip_score"] == ["test/clip_score", "teacher, 2 steps", "teacher, 1 step"]
    assert names["val/clip_score"] == ["val/clip_score"], "the teacher was measured on other captions"


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


class KeepReport(Callback):
    """Keeps the report of the first validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for suffix in ("json", "html"):
            folder = Path(str(trainer.log_dir))
            if not trainer.sanity_checking and not (folder / f"early.{suffix}").exists():
                shutil.copy(folder / f"report.{suffix}", folder / f"early.{suffix}")


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
    assert "Better: 25 times as fast" in found and "Better: CLIP score 0.250 has closed 75 % of" in found
    assert "Better: Fréchet distance 10, 0.25 times the teacher's in one step (40)" in found
    assert "Worse: Fréchet distance 10, 2.00 times the teacher's in 25 steps (5)" in found
    worse = made_report()
    for name, value in (("frechet_distance", 80), ("clip_score", 0.05)):
        worse.content["metrics"][name]["value"] = value
    for row, ends in (
        (worse.content["metrics"], [2.0, 5.0]),
        (worse.content["teacher_metrics"]["steps_25"], [90, 110]),
    ):
        row["milliseconds_per_image"]["details"]["spread"] = ends
    assert findings(worse) == [
        "Better: 25 times as fast as the teacher in 25 steps (18 to 55)",
        "Worse: Fréchet distance 80, 2.00 times the teacher's in one step (40)",
        "Worse: Fréchet distance 80, 16.00 times the teacher's in 25 steps (5)",
        "Worse: CLIP score 0.050 has closed -25 % of the gap between the teacher's one step (0.100) and 25 "
        "(0.300)",
    ]
    helped = made_report(run={"method": "SwiftBrush, ClipLoss"}, model="checkpoints/last.ckpt")
    assert findings(helped)[-1].endswith("; a CLIP loss in training helps here")
    assert "The table is of the last update." in render_html(helped)
    page = render_html(worse)
    assert page.count('<li class="worse">') == 3 and page.count('<li class="better">') == 1
    lines = render_text_table(made_report()).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "Teacher, 25 steps, guidance 4.5", "Teacher, 1 step", "Student, 1 step",
    ]  # fmt: skip
    assert lines[4].split()[-4:] == ["10.00", "0.2500", "4.000", "1,024"]
    assert len({len(line) for line in lines}) == 1
    assert findings(made_report(teacher_metrics={})) == []
    no_gap = made_report()
    no_gap.content["teacher_metrics"]["steps_1"]["clip_score"]["value"] = 0.35  # above that in 25 steps
    assert not any("CLIP score" in sentence for sentence in findings(no_gap))


def test_the_next_command_names_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an environment in the current folder by its path, since nobody has activated it."""
    monkeypatch.chdir(tmp_path)
    for path, command in (
        (tmp_path / ".venv" / "bin" / "python", ".venv/bin/python"),
        (tmp_path.parent / "bin" / "python", "python"),
    ):
        monkeypatch.setattr(sys, "executable", str(path))
        assert report_module.python_command() == command


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


def test_curves_drop_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = [f"{i},{math.sin(i)},{'' if i % 10 else i}" for i in range(200)]
    path.write_text("\n".join(["step,train/loss,val/clip_score", *rows, "200,nan,", "201,-inf,5", ""]))
    series = read_series(path)
    assert len(series["train/loss"].points) == 200 and series["train/loss"].not_finite == 2
    assert [x for x, _ in series["val/clip_score"].points] == [*range(0, 200, 10), 201]
    (trace,) = line_figure("loss", [series["train/loss"]]).data
    assert list(zip(trace.x, trace.y)) == series["train/loss"].points and "2 not finite" in trace.name
    assert read_series(tmp_path / "none.csv") == {}


def test_long_curves_keep_their_extremes() -> None:
    values = [(float(i), math.sin(i / 700)) for i in range(50_000)]
    values[31_234] = (31_234.0, 9.0)
    values[40_001] = (40_001.0, -7.0)
    points = thinned(values)
    assert len(points) <= 2_000 and points == sorted(points)
    assert {values[0], values[31_234], values[40_001], values[-1]} <= set(points)
    assert list(line_figure("x", [Series("x", values)]).data[0].x) == [x for x, _ in points]


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
def test_every_curve_has_names_and_levels(values: list[tuple[float, float]]) -> None:
    figure = line_figure("a<b", [Series("a<b", values)], {"teacher": 1.0, "none": float("nan")})
    text = figure_json(figure)
    assert "<" not in text and "NaN" not in text, "it may stand in a page as it is"
    content = json.loads(text)
    assert content["layout"]["title"]["text"].startswith("a<b")
    assert [trace["name"] for trace in content["data"]] == ["a<b", "teacher"]
    assert content["data"][1]["y"] == [1.0, 1.0]


def test_wide_ranges_get_powers_of_ten() -> None:
    figure = line_figure("x", [Series("x", [(0.0, 1e-4), (1.0, 1e-2), (2.0, 1.0)])])
    assert figure.layout.yaxis.type == "log" and figure.layout.title.text == "x (log)"
    assert line_figure("x", [Series("x", [(0.0, 0.0), (1.0, 1e4)])]).layout.yaxis.type == "linear"


def test_groups() -> None:
    names = ["val/fid", "test/fid", "train/loss", "train/norm/a", "train/norm/b", "norm/a", "norm/b", "lr"]
    groups = grouped({name: Series(name) for name in names})
    found = {title: [one.name for one in group] for title, group in groups.items()}
    assert found == {
        "val/fid": ["val/fid"], "test/fid": ["test/fid"], "train/loss": ["train/loss"],
        "train/norm": ["train/norm/a", "train/norm/b"],
        "norm": ["norm/a", "norm/b"], "lr": ["lr"],
    }  # fmt: skip
    assert line_figure("empty", [Series("empty", [], 3)]) is None


def test_several_scales_never_share_an_axis() -> None:
    sizes = {
        "norm/a": 1.0,
        "norm/b": 2.5,
        "time/load": 0.01,
        "time/step": 2.0,
        "val/fid": 9.0,
    }
    groups = grouped({name: Series(name, [(0.0, size)]) for name, size in sizes.items()})
    assert list(groups) == ["norm", "time/load", "time/step", "val/fid"]


def test_a_spread_is_a_band_behind_its_curve() -> None:
    one = Series("a", [(0.0, 1.0), (1.0, 2.0)], spread=[(0.5, 1.5), (1.0, 3.0)])
    band, curve = line_figure("x", [one]).data
    assert list(zip(band.x, band.y)) == [(0, 1.5), (1, 3), (1, 1), (0, 0.5)] and band.fill == "toself"
    assert list(curve.y) == [1, 2] and curve.line.color == band.fillcolor


def test_text_in_a_page_and_in_markdown_is_escaped() -> None:
    report = made_report(model="<script>alert(1)</script>", experiment="a<b>")
    text = render_html(report)
    page = Page(without_scripts(text))
    assert "<script>alert(1)</script>" in page.text and "<b>" not in text
    assert markdown_table(["", "x"], [["a|b", "1"]])[-1].startswith("| a\\|b |")
    assert bullets({"a": {"b": [1, 2], "c": None}, "d": 0.5}) == [
        "- a:", "  - b: 1, 2", "  - c: none", "- d: 0.5000",
    ]  # fmt: skip


def test_timer_takes_the_median_once_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [100.0, 50, 50, 50, 50, 1, 2, 30, 2, 2]
    clock, now = [], 0.0
    for duration in durations:
        clock += [now, now + duration]
        now += duration + 1000
    monkeypatch.setattr(report_module.time, "perf_counter", iter(clock).__next__)
    timer, cpu = StepTimer(), torch.device("cpu")
    assert timer.seconds_per_step() is None and timer.quartiles() is None
    for _ in durations:
        timer.start(cpu)
        timer.stop(cpu, 64)
    assert timer.seconds_per_step() == 2.0 and timer.images_per_step == 64
    assert timer.quartiles() == [1.5, 16.0]
    assert 0.01 < peak_memory_gib() < 200
    ballast = b"x" * 2**30
    own = [sys.executable, "-c", "from common.environment import peak_memory_gib as peak; print(peak())"]
    assert float(subprocess.check_output(own)) < 0.9, f"a child of one with {len(ballast):,} bytes"


def test_pictures_of_all_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module.time, "perf_counter", iter([0.0, 4.0]).__next__)
    run, callback = SimpleNamespace(world_size=2), RunReport()
    module, batch = SimpleNamespace(device=torch.device("cpu")), {"prompts": ["a cat"] * 6}
    callback.on_train_batch_start(run, module, batch, 0)  # type: ignore[arg-type]
    callback.on_train_batch_end(run, module, None, batch, 0)  # type: ignore[arg-type]
    timing = callback.state_dict()["timing"]
    assert (timing["seconds_per_step"], timing["images_per_second"]) == (4.0, 3.0)


def test_pictures_begin_with_the_last(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    grids = [f"step_{n}" for n in range(0, 1000, 100)]
    for name in [*grids, "score_views_step_900", "score_views_step_0", "other"]:
        Image.new("RGB", (1, 1)).save(tmp_path / "samples" / f"{name}.png")
    names = [path.stem for path in sample_pictures(tmp_path).values()]
    assert names[:3] == ["step_900", "score_views_step_900", "step_0"] and names[-1] == "step_800"
    assert len(names) == 8


def test_a_strip_holds_the_pictures_of_the_sheets(tmp_path: Path) -> None:
    """Cut out where the sheet says they are; of other prompts, and of a foreign PNG, there are none."""
    sheets, colours = {}, {}
    for step in range(0, 30, 2):
        pictures = torch.full((2, 3, 4, 4), step / 32)
        pictures[1, 0] = 1.0
        colours[step] = [step / 32, 1.0]
        views = {"student": pictures, "teacher": torch.zeros(2, 3, 4, 4)}
        prompts = ["other", "prompts"] if step == 2 else ["a cat", "ein Hund, süß"]
        sheets[step] = tmp_path / f"step_{step}.png"
        save_png(labelled_grid(views, prompts, columns=1, least_size=16), sheets[step])
    strip = read_strip(sheets)
    assert strip is not None and strip.views == ["student", "teacher"]
    assert len(strip.steps) <= 12 and strip.steps[0] == 0 and strip.steps[-1] == 28 and 2 not in strip.steps
    assert [prompt for prompt, *_ in strip.cards] == ["a cat", "ein Hund, süß"]
    for i, (_, frames, others) in enumerate(strip.cards):
        for step, frame in zip(strip.steps, frames, strict=True):
            red = np.asarray(Image.open(BytesIO(b64decode(frame.partition(",")[2]))))[..., 0]
            assert red.shape == (16, 16) and abs(red.mean() / 255 - colours[step][i]) < 0.03
        assert len(others) == 1
    Image.new("RGB", (4, 4)).save(sheets[28])
    assert read_strip(sheets) is None
