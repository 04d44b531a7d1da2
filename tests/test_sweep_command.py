"""The command `sweep` as a user meets it: mistakes named before the first trial, results, a real run."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import main
from commands.sweeping.check import _ParseOnly, check_keys
from commands.sweeping.results import importance, text_table, write_results
from commands.sweeping.settings import read_settings
from commands.sweeping.space import Point, option, same
from common.errors import UserError
from reports.sweep_page import _axis, _curves, _history
from tests.sweep_stand_in import book, content_of, driver, write_sweep

ROOT = Path(__file__).parent.parent
SWEEPS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs/sweep").glob("*.yaml"))


def refused(folder: Path, message: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(write_sweep(folder, **changes))


def test_mistakes_in_the_yaml(tmp_path: Path) -> None:
    refused(tmp_path, "unknown key 'trails'; did you mean 'trials'", trails=3)
    refused(tmp_path, "base config .*none.yaml does not exist", base=str(tmp_path / "none.yaml"))
    refused(tmp_path, "direction is 'down'; it must be minimize or maximize", direction="down")
    refused(tmp_path, "trials is 0", trials=0)
    refused(tmp_path, "both searched and overridden", overrides={"x": 1})
    refused(tmp_path, "experiment is given to each trial", overrides={"experiment": "mine"})
    refused(tmp_path, "trainer.default_root_dir is given", space={"trainer.default_root_dir": ["a", "b"]})
    refused(tmp_path, "pruning is .*warmup_steps and finished_trials", pruning={"warm_up": 3})
    refused(tmp_path, "only 3 different points; write trials: 3", space={"x": [1, 2, 3]})
    for entry, message in [
        ({"log_range": [0, 1]}, "above 0"),
        ({"range": [2, 1]}, "lowest value comes first"),
        ({"range": [1]}, "the lowest and the highest"),
        ({"int_range": [1, 2.5]}, "whole numbers"),
        ({"range": ["a", 2]}, "'a' is not a number"),
        ({"rang": [1, 2]}, "unknown rang; give exactly one of grid"),
        ({"choices": [1, 1]}, "the same value twice"),
        ({"choices": [1, 1.0]}, "the same value twice"),
        ({"grid": [0, float("inf")]}, "must be finite"),
        ({"choices": []}, "not empty"),
        ({"log_range": [1, 2], "step": 1}, "step is 1"),
        (3, "write e.g."),
    ]:
        refused(tmp_path, f"space: x.*{message}", space={"x": entry})
    with pytest.raises(UserError, match="cannot read the sweep"):
        read_settings(tmp_path / "none.yaml")


def test_the_space_is_what_the_yaml_says(tmp_path: Path) -> None:
    space = {
        "a": [1, 2],
        "b": {"choices": [None, True, [0.0, 0.9]]},
        "c": {"range": [0, 1], "step": 0.25},
        "d": {"int_range": [4, 12], "step": 4},
        "e": {"log_range": ["1e-4", 1.0e-2]},
    }
    read = read_settings(write_sweep(tmp_path, space=space)).space
    lists = [dimension.all_values() for dimension in read.dimensions]
    assert [list(values or ()) for values in lists[:4]] == [
        [1, 2], [None, True, "[0.0, 0.9]"], [0, 0.25, 0.5, 0.75, 1], [4, 8, 12]
    ]  # fmt: skip
    assert lists[4] is None and read.size() == float("inf")
    log = read.distributions()["e"]
    assert (log.low, log.high, log.log) == (1e-4, 1e-2, True)  # type: ignore[attr-defined]
    finite = read_settings(write_sweep(tmp_path, space={k: space[k] for k in "abcd"})).space
    assert finite.size() == 2 * 3 * 5 * 3 == len(finite.points())
    assert read.cells() == [{"a": 1}, {"a": 2}]
    assert not same({"x": 1}, {"x": True}) and same({"x": 1}, {"x": 1.0})
    assert same({"x": 0.1 + 0.2}, {"x": 0.3}) and not same({"x": 1e-4}, {"x": 1.0001e-4})
    seeds = read_settings(write_sweep(tmp_path, space={"x": {"int_range": [0, 10**12]}})).space
    assert seeds.size() == 10**12 + 1, "counted, not listed"


def test_options_keep_every_digit() -> None:
    given: Point = {"a": 0.1 + 0.2, "b": 1e-05, "c": None, "d": True, "e": "SwiftBrush", "f": [0.0, 0.9]}
    words = [option(key, value) for key, value in given.items()]
    plain = ["--d=true", "--e=SwiftBrush", "--f=[0.0, 0.9]"]
    assert words == ["--a=0.30000000000000004", "--b=1e-05", "--c=null", *plain]


TINY = """
model: {class_path: tests.tiny_run.TinyModule, init_args: {learning_rate: 0.1}}
data: {class_path: tests.tiny_run.TinyData}
trainer:
  {max_steps: 4, val_check_interval: 2, limit_val_batches: 2, accelerator: cpu, enable_progress_bar: false,
   log_every_n_steps: 1}
"""
RATE = "model.init_args.learning_rate"


def tiny_sweep(folder: Path, **changes: Any) -> Path:
    path = write_sweep(
        folder, **{"space": {RATE: {"log_range": [0.01, 1.0]}}, "metric": "val/frechet_distance", "trials": 2,
                   "overrides": {}, **changes},
    )  # fmt: skip
    (folder / "base.yaml").write_text(TINY)
    return path


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.init_args.learning_rat": [0.1, 0.2]}, "did you mean 'learning_rate'"),
        ({"trainer.max_step": [3, 4]}, "did you mean 'trainer.max_steps'"),
        ({"trainer.max_steps": {"range": [3, 4.5]}}, "search key trainer.max_steps|the point.*max_steps"),
        ({RATE: [0.1, "much"]}, "much"),
    ],
)
def test_a_search_key_that_is_no_config_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: dict[str, Any], message: str
) -> None:
    """Refused by the command itself, and no trial is started."""
    path = tiny_sweep(tmp_path, space=space)
    monkeypatch.setattr(
        "commands.sweeping.driver.Driver.run", lambda driver: pytest.fail("a trial would start")
    )
    with pytest.raises(UserError, match=message):
        main(["sweep", "--config", str(path)])
    assert not (tmp_path / "runs").exists()


def test_a_wrong_base_config_is_told_from_a_wrong_key(tmp_path: Path) -> None:
    path = tiny_sweep(tmp_path)
    (tmp_path / "base.yaml").write_text(TINY.replace("max_steps", "max_step"))
    with pytest.raises(UserError, match="the base config of .*did you mean 'trainer.max_steps'"):
        main(["sweep", "--config", str(path)])


@pytest.mark.parametrize("path", [path for path in SWEEPS if path.name != "wandb.yaml"], ids=str)
def test_shipped_sweeps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_keys(read_settings(path))


def test_the_wandb_example_is_a_command_line_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load((ROOT / "configs/sweep/wandb.yaml").read_text())
    words = [word for word in content["command"] if not word.startswith("$")]
    words += [f"--{name}={values['min']}" for name, values in content["parameters"].items()]
    parsed = _ParseOnly(words).settings
    assert parsed.model.init_args.objective.init_args.guidance_scale == 1.5
    assert parsed.model.init_args.student.optimizer.init_args.lr == 1e-4
    assert parsed.trainer.max_steps == 40


def test_a_sweep_of_real_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two trials by the real command line; the best configuration gives the same value again."""
    path = tiny_sweep(tmp_path)
    os.environ["OMP_NUM_THREADS"] = "1"  # the number of threads of the tests
    main(["sweep", "--config", str(path), "--workers", "2"])
    content = content_of(path)
    best, out = content["best"], capsys.readouterr().out
    assert content["counts"]["complete"] == 2 and best["rank"] == 1
    assert best["value"] == min(trial["value"] for trial in content["trials"])
    assert text_table(content) in out and "sweep.html" in out
    run = Path(best["folder"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["learning_rate"] == best["params"][RATE]
    main(["fit", "--config", content["best_config"]])
    again = (tmp_path / "runs/sweep_best/version_0/metrics.csv").read_text()
    assert again == (run / "metrics.csv").read_text()
    assert repr(best["value"]) in again


def test_page_and_files_of_a_sweep(tmp_path: Path) -> None:
    """Ranked table, importance, plots and errors are in one page that fetches nothing."""
    space = {
        "x": {"range": [0, 8]},
        "model.y": {"choices": ["a<b", "c"]},
        "other.y": {"log_range": [1e-3, 1]},
    }
    path = write_sweep(tmp_path, space=space, trials=7, overrides={"delay": 0, "fail_above": 6.5})
    driver(path, workers=2).run()
    content = write_results(book(path))
    assert content["best_config"] == str(tmp_path / "runs/sweep/best.yaml")
    best = yaml.safe_load(Path(content["best_config"]).read_text())
    assert best["x"] == content["best"]["params"]["x"] and best["experiment"] == "sweep_best"
    on_disk = content_of(path)
    assert on_disk["trials"][0] == json.loads(json.dumps(content["best"]))
    values = [t["value"] for t in content["trials"] if t["state"] == "complete"]
    assert values == sorted(values) and [t["rank"] for t in content["trials"]][: len(values)] == [
        *range(1, len(values) + 1)
    ]
    assert content["counts"]["failed"] == 7 - len(values) > 0
    assert abs(sum(content["importance"].values()) - 1) < 1e-9
    assert content["importance"].keys() == space.keys()
    page = (tmp_path / "runs/sweep/sweep.html").read_text()
    assert page.count("<svg") == 6  # parallel, history, three keys, curves
    assert "a&lt;b" in page and "<b" not in page.replace("<body", "").replace("<br", "").replace("<b>", "")
    assert "x is far too large" in page and "other.y" in page and ">model.y" in page
    assert not re.search(r"(?:src|href)=|https?://|<script|url\(|@import", page)


def test_plots_show_the_whole_range_and_pruned_trials() -> None:
    trials = [
        {"trial": i, "rank": None, "state": state, "value": value, "params": {"x": 0.02}, "values": values}
        for i, (state, value, values) in enumerate([
            ("complete", 2.0, {"10": 3.0, "20": 2.0}), ("pruned", 4.0, {"10": 4.0}), ("failed", None, {})
        ])
    ]  # fmt: skip
    content = {
        "trials": trials, "metric": "m", "direction": "minimize",
        "space": {"x": {"kind": "log_range", "values": [0.001, 1.0], "step": None}},
    }  # fmt: skip
    assert _curves(content).count("<circle") == 3 and _curves(content).count("<polyline") == 1
    assert _curves({**content, "trials": trials[1:]}) == "", "one value of each is no curve"
    assert (axis := _axis(content, "x", "x")).ticks[0] == 0.001 and axis.ticks[-1] == 1.0
    line = _history(content, trials[:2]).partition("<polyline")[2].partition("/>")[0]
    assert line.count(",") == 2, "from the first trial to the last"


def test_importance_finds_the_key_that_matters(tmp_path: Path) -> None:
    space = {"x": {"range": [0, 8]}, "y": {"range": [0, 8]}}
    one = book(write_sweep(tmp_path, space=space, trials=25))
    for _ in range(25):
        assert importance(one) is None or len(one.live()) >= 4
        trial = one.claim()
        assert trial is not None
        one.tell(trial, "COMPLETE", (trial.params["x"] - 3) ** 2)
    shares = importance(one)
    assert shares is not None and list(shares) == ["x", "y"] and shares["x"] > 0.8


def test_a_page_before_any_value(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, space={"x": [7, 8]}, trials=2, overrides={"delay": 0, "fail_above": 6})
    driver(path).run()
    content = write_results(book(path))
    assert content["best"] is None and content["best_config"] is None and content["importance"] is None
    assert "nothing to plot" in (tmp_path / "runs/sweep/sweep.html").read_text()


def test_failed_trials_tell_by_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sweep(tmp_path, space={"x": [1, 8]}, trials=2, overrides={"delay": 0, "fail_above": 6})
    driver(path).run()  # the command has nothing left to do but to tell
    monkeypatch.setattr("commands.sweeping.check.check_keys", lambda settings: None)
    with pytest.raises(SystemExit) as left:
        main(["sweep", "--config", str(path)])
    assert left.value.code == 1
