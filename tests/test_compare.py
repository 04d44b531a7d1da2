"""`compare`: runs finished and unfinished, whole and damaged, few and many, on one page."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cli import main
from common.errors import UserError
from reports.comparison import best_of, differences, find_runs, flatten, load_runs
from reports.plots import thinned
from reports.run_report import direction
from reports.sheets import labelled_grid, save_png
from reports.sweep_page import best_samples
from tests.pages import cells, figures, without_scripts

SAMPLES: dict[str, Any] = {
    "class_path": "callbacks.samples.SampleGrid",
    "init_args": {"prompts": None, "seed": 0},
}


def metric(value: float, count: int = 64) -> dict[str, Any]:
    return {"value": value, "num_images": count, "details": {"extractor": "tiny"}}


def make_run(
    folder: Path, rate: float = 0.1, score: float | None = 1.0, step: int = 20, samples: bool = True,
    seed: int = 0, count: int = 64, rows: int = 4,
) -> Path:  # fmt: skip
    """A run folder as `fit` leaves it; without a score it is unfinished."""
    folder.mkdir(parents=True)
    callback = {**SAMPLES, "init_args": {**SAMPLES["init_args"], "seed": seed}}
    config = {
        "model": {"class_path": "a.B", "init_args": {"student": {"lr": rate}, "width": 3}},
        "trainer": {"callbacks": [callback], "default_root_dir": str(folder.parent)},
        "experiment": folder.parent.name,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [f"{10 * i},{1 / (i + rate)},{'' if i % 2 else 9 - i * rate}" for i in range(1, rows + 1)]
    (folder / "metrics.csv").write_text("\n".join(["step,train/loss,val/frechet_distance", *lines, ""]))
    if samples:
        generator = torch.Generator().manual_seed(int(100 * rate))
        pictures = torch.rand(2, 3, 8, 8, generator=generator)
        save_png(
            labelled_grid({"student": pictures}, ["a cat", "a dog"]), folder / f"samples/step_{step}.png"
        )
    if score is not None:
        report = {
            "experiment": folder.parent.name, "step": step, "weights": "ema", "model": "m",
            "metrics": {"frechet_distance": metric(score, count), "clip_score": metric(1 - score / 10)},
            "teacher_metrics": {"steps_25": {"frechet_distance": metric(0.5), "clip_score": metric(0.9)}},
            "timing": {"seconds_per_step": rate, "images_per_second": 2.0, "peak_memory_gib": None},
            "environment": {"torch": "2", "processor": "old" if rate > 0.1 else "new"}, "config_path": "c",
        }  # fmt: skip
        (folder / "report.json").write_text(json.dumps(report))
    return folder


def compare(tmp_path: Path, *runs: Path | str) -> str:
    main(["compare", *map(str, runs), "--output", str(tmp_path / "out/report.html")])
    return (tmp_path / "out/report.html").read_text()


def test_metrics_differences_and_timing(tmp_path: Path) -> None:
    first = make_run(tmp_path / "one/version_0", 0.1, 3.0)
    second = make_run(tmp_path / "one/version_1", 0.2, 2.0)
    report = json.loads((first / "report.json").read_text())
    report["timing"]["seconds_per_step_quartiles"] = [0.05, 0.2]
    (first / "report.json").write_text(json.dumps(report))
    page = compare(tmp_path, first, second)
    assert cells(page, "Metrics") == [
        ["run", "step", "weights", "images", "frechet_distance ↓", "clip_score ↑"],
        ["teacher, 25 steps", "", "", "", "0.5000", "0.9000"],
        ["one/version_0", "20", "ema", "64", "3.000", "0.7000"],
        ["one/version_1", "20", "ema", "64", "★2.000", "★0.8000"],
    ]
    assert cells(page, "Configuration differences") == [
        ["run", "model.student.lr"],
        ["one/version_0", "0.1"],
        ["one/version_1", "0.2"],
    ]
    assert cells(page, "Timing")[1:] == [
        ["one/version_0", "0.1000 (0.05000 to 0.2000)", "2.000", "–"],
        ["one/version_1", "0.2000", "2.000", "–"],
    ], "no star: a time has a spread"
    assert cells(page, "Environment differences")[1:] == [["one/version_0", "new"], ["one/version_1", "old"]]
    assert "Last validation" not in page
    assert page.count("<img alt") == 2 and "Every sheet shows the same prompts from the same seeds" in page
    assert [one["layout"]["title"]["text"] for one in figures(page)] == ["val/frechet_distance", "train/loss"]
    assert all([trace["meta"] for trace in one["data"]] == [0, 1] for one in figures(page))
    assert "plotly.js v" in page, "one file: what draws the curves is in it"
    assert not re.search(r"https?://|(?:src|href)=\"(?!data:)|url\(|@import", without_scripts(page))


def test_values_measured_in_different_ways_have_no_best(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a/version_0", score=3.0),
        make_run(tmp_path / "b/version_0", score=2.0, count=32),
    ]
    page = compare(tmp_path, *runs)
    assert "frechet_distance was not measured in the same way in all runs" in page
    assert [row[4:] for row in cells(page, "Metrics")[2:]] == [["3.000", "0.7000"], ["2.000", "★0.8000"]]


def test_unfinished_runs_and_runs_without_pictures(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "a/version_0", 0.1)
    begun = make_run(tmp_path / "a/version_1", 0.2, score=None, samples=False)
    bare = tmp_path / "a/version_2"
    bare.mkdir()
    (bare / "config.yaml").write_text("model: {class_path: a.B}\n")
    page = compare(tmp_path, tmp_path / "a")
    assert cells(page, "Metrics")[3][1:] == ["40", "no report", "–", "–", "–"]
    assert cells(page, "Metrics")[4][1:] == ["–", "no report", "–", "–", "–"]
    assert cells(page, "Last validation")[1:] == [
        ["a/version_0", "20", "8.600"], ["a/version_1", "40", "★8.200"], ["a/version_2", "–", "–"]
    ]  # fmt: skip
    config = yaml.safe_load((begun / "config.yaml").read_text())
    (begun / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"init_args": {"eval_size": 8}}}))
    other = compare(tmp_path, tmp_path / "a")
    assert cells(other, "Last validation")[2] == ["a/version_1", "40", "8.200"], "of other counts: no star"
    report = json.loads((whole / "report.json").read_text())
    (whole / "report.json").write_text(json.dumps(report | {"finished": False}))
    assert cells(compare(tmp_path, whole), "Metrics")[2][2] == "ema, not finished"
    assert page.count("<img alt") == 1
    assert [run.step for run in load_runs([whole, begun, bare])] == [20, 40, None]


def test_damaged_files_are_named_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "a" / f"version_{i}") for i in range(5)]
    (runs[0] / "report.json").write_text('{"metrics": ')
    (runs[1] / "report.json").write_text('{"metrics": {"fid": 3}}')
    (runs[2] / "metrics.csv").write_text("step,val/x\n10,many\n")
    (runs[3] / "samples/step_20.png").write_bytes(b"\x89PNG nothing")
    (runs[4] / "config.yaml").write_text("model: [")
    with pytest.raises(SystemExit) as left:
        compare(tmp_path, tmp_path / "a")
    assert left.value.code == 1
    page, warned = (tmp_path / "out/report.html").read_text(), capsys.readouterr().err
    names = ["report.json", "report.json", "metrics.csv", "samples/step_20.png", "config.yaml"]
    for run, name in zip(runs, names):
        assert f"{run / name} is damaged" in warned and f"{run / name} is damaged" in page
    assert "fid has no value" in warned
    assert len(cells(page, "Metrics")) == 7  # header, teacher and all five runs
    assert page.count("<img alt") == 4


def test_other_prompts_or_seeds_stand_apart(tmp_path: Path) -> None:
    for i, seed in enumerate((0, 0, 7)):
        make_run(tmp_path / "a" / f"version_{i}", seed=seed)
    page = compare(tmp_path, tmp_path / "a")
    groups = re.findall(
        r"<h3>Same prompts.*?:\s+(.*?)</h3>\s*<div class=\"sheets\">(.*?)</div>", page, re.DOTALL
    )
    assert [(title, sheets.count("<img")) for title, sheets in groups] == [("2 runs", 2), ("1 run", 1)]


HPS = {"class_path": "HPSv2Prompts", "init_args": {"captions": "hps"}}


@pytest.mark.parametrize(
    ("one", "other", "same_set", "same_sheet"),
    [
        ({"eval_set": HPS}, {"eval_set": {**HPS, "init_args": {"captions": "other"}}}, False, False),
        ({"eval_captions": "a.txt"}, {"eval_captions": "b.txt"}, False, False),
        ({"eval_column": "prompt"}, {"eval_column": "caption"}, False, False),
        ({"eval_set_size": 5000}, {"eval_set_size": 500}, False, True),
        ({"eval_size": 256}, {"eval_size": 64}, False, True),
        ({"val_captions": "a.txt"}, {"val_captions": "b.txt"}, False, True),
        ({"eval_reference": "A"}, {"eval_reference": "B"}, False, True),
        ({"eval_batch_size": 8}, {"eval_batch_size": 4}, True, True),
        ({"batch_size": 8}, {"batch_size": 4}, True, True),
    ],
)
def test_validations_are_compared_on_one_set(
    one: dict[str, Any], other: dict[str, Any], same_set: bool, same_sheet: bool, tmp_path: Path
) -> None:
    """A value is marked as best only beside those of the same captions and reference."""
    for i, settings in enumerate((one, other)):
        file = make_run(tmp_path / f"a/version_{i}", 0.1 + i, score=None) / "config.yaml"
        data = {"class_path": "PromptDataModule", "init_args": settings}
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"data": data}))
    page = compare(tmp_path, tmp_path / "a")
    assert any("★" in row[2] for row in cells(page, "Last validation")[1:]) is same_set
    assert ("Every sheet shows the same prompts" in page) is same_sheet


def test_runs_are_found_by_folder_and_pattern(tmp_path: Path) -> None:
    for name in ("s/trial_000/version_0", "s/trial_001/version_0", "e/version_2", "e/version_10"):
        make_run(tmp_path / name, samples=False)
    found = find_runs([f"{tmp_path}/e", f"{tmp_path}/s/trial_*", f"{tmp_path}/e/version_2"])
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["e/version_2", "e/version_10", "s/trial_000/version_0", "s/trial_001/version_0"]
    assert [run.name for run in load_runs(found)] == names[:2] + [
        "trial_000/version_0",
        "trial_001/version_0",
    ]
    with pytest.raises(UserError, match="nowhere does not exist. Give run folders"):
        find_runs([f"{tmp_path}/nowhere"])
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        find_runs([str(empty)])
    with pytest.raises(UserError, match="is a folder"):
        main(["compare", str(found[0]), "--output", str(tmp_path)])


def test_a_hundred_runs(tmp_path: Path) -> None:
    """In seconds, on a page that a browser opens at once."""
    for i in range(100):
        make_run(tmp_path / "many" / f"version_{i}", 0.01 * (i + 1), 5 + (i - 42) ** 2 / 100, rows=200)
    started = time.process_time()
    page = compare(tmp_path, tmp_path / "many")
    assert time.process_time() - started < 15
    best = [row[0] for row in cells(page, "Metrics") if row[4].startswith("★")]
    assert best == ["many/version_42"]
    assert len(cells(page, "Configuration differences")) == 101
    assert page.count("data:image/webp") == 100 and "the pictures are compressed" in page
    assert len(without_scripts(page)) < 4_000_000


def test_reports_know_neither_torch_nor_lightning() -> None:
    modules = ", ".join(f"reports.{path.stem}" for path in Path("reports").glob("[a-z]*.py"))
    found = f"import sys, {modules}; print({{'torch', 'lightning'}} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


def test_flat_configurations() -> None:
    nested = {
        "a": {"b": 1, "c": [1, 2]},
        "l": [{"class_path": "x.Y", "z": None}, {"class_path": "Y"}],
        "s": "t",
    }
    assert flatten(nested) == {
        "a.b": "1", "a.c": "[1, 2]", "l[Y].class_path": "x.Y", "l[Y].z": "null", "l[Y 2].class_path": "Y",
        "s": "t",
    }  # fmt: skip
    assert differences([{"a": 1, "b": 2}, {"a": 1}, None]) == {"b": ["2", None, None]}
    assert differences([{"a": 1, "experiment": "x"}, {"a": 1, "experiment": "y"}, None]) == {}


def test_what_is_best() -> None:
    names = ("fid", "val/frechet_distance", "clip_score", "hpsv2/anime", "clip_score_negative", "steps")
    assert [direction(name) for name in names] == [-1, -1, 1, 1, -1, 0]
    assert best_of([3.0, None, 1.0, float("nan"), 1.0], -1) == {2, 4}
    assert best_of([3.0, None, 1.0], 1) == {0}
    assert best_of([3.0, 1.0], 0) == best_of([3.0, None], 1) == set()


def test_thinned_curves_keep_their_peaks() -> None:
    points = [(float(i), float(i == 777)) for i in range(2000)]
    thin = thinned(points, 100)
    assert len(thin) <= 100 and (777.0, 1.0) in thin and thin == sorted(thin)
    assert thinned(points[:50], 100) == points[:50]


def test_a_sweep_shows_the_samples_of_its_best_trials(tmp_path: Path) -> None:
    """Not of trials without a rank, without samples, or on another machine; four at most."""
    folders = [make_run(tmp_path / f"s/version_{i}", samples=i != 1) for i in range(7)]
    trials = [{"rank": i + 1, "trial": 10 + i, "folder": str(path)} for i, path in enumerate(folders)]
    trials[2]["folder"], trials[6]["rank"] = str(tmp_path / "elsewhere"), None
    captions = [one["caption"] for one in best_samples(trials)]
    assert captions == [f"Rank {i + 1}, trial {10 + i}, after 20 student updates" for i in (0, 3)]
