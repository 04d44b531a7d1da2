"""The command `sweep` as a user meets it: mistakes named before the first trial, results, a real run."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import main
from commands.sweeping.check import ParseOnly, check_keys
from commands.sweeping.results import importance, plain_copy, ranked_table, write_results
from commands.sweeping.settings import option, read_settings
from commands.sweeping.study import same
from common.errors import UserError
from tests.sweep_stand_in import choice, content_of, driver, number, study, whole, write_sweep

ROOT = Path(__file__).parent.parent
SWEEPS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs/sweep").glob("*.yaml"))


def refused(folder: Path, message: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(write_sweep(folder, **changes))


def test_mistakes_in_the_yaml(tmp_path: Path) -> None:
    refused(tmp_path, "unknown option 'trails'.*did you mean 'trials'", trails=3)
    refused(tmp_path, "base config .*none.yaml does not exist", base=str(tmp_path / "none.yaml"))
    refused(tmp_path, "direction: Expected .*minimize.*maximize.*down", direction="down")
    refused(tmp_path, "trials: .*0 does not conform", trials=0)
    refused(tmp_path, "both searched and overridden", overrides={"x": 1})
    refused(tmp_path, "overrides maps config keys", overrides=[1])
    refused(tmp_path, "experiment is given to each trial", overrides={"experiment": "mine"})
    refused(
        tmp_path, "trainer.default_root_dir is given", space={"trainer.default_root_dir": choice("a", "b")}
    )
    wrong = {"class_path": "MedianPruner", "init_args": {"n_warmup": 3}}
    refused(tmp_path, "n_warmup' of optuna.pruners.MedianPruner; did you mean 'n_warmup_steps'", pruner=wrong)
    refused(tmp_path, "TPSampler", sampler={"class_path": "TPSampler"})
    refused(tmp_path, "only 3 different points; write trials: 3", space={"x": choice(1, 2, 3)})
    for entry, message in [
        (number(0, 1, log=True), "low.*> 0"),
        (number(2, 1), "low <= high"),
        ({"class_path": "FloatDistribution", "init_args": {"low": 1}}, "required: high"),
        (whole(1, 2.5), "2.5"),  # type: ignore[arg-type]
        (number("a", 2), "Got value: a"),  # type: ignore[arg-type]
        (number(1, 2, hihg=3), "hihg.*did you mean 'high'"),
        (choice(1, 1.0), "holds the same value twice"),
        (choice(), "one or more elements"),
        (number(1, 2, log=True, step=1), "step.*log"),
    ]:
        refused(tmp_path, message, space={"x": entry})
    with pytest.raises(UserError, match="cannot read the sweep"):
        read_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "old",
    [{"space": {"x": {"range": [0, 1]}}}, {"space": {"x": [1, 2]}}, {"pruning": True}, {"seed": 3}],
)
def test_a_file_of_the_old_form(tmp_path: Path, old: dict[str, Any]) -> None:
    refused(tmp_path, "Optuna's classes.*class_path: FloatDistribution.*docs/sweeps.md", **old)


def test_the_space_is_what_the_yaml_says(tmp_path: Path) -> None:
    space = {
        "a": choice(1, 2),
        "b": choice(None, True, "[0.0, 0.9]"),
        "c": number(0, 1, step=0.25),
        "d": whole(4, 12, step=4),
        "model.e": number("1e-4", 1.0e-2, log=True),  # type: ignore[arg-type]
    }
    read = read_settings(write_sweep(tmp_path, space=space))
    log: Any = read.space["model.e"]
    assert (log.low, log.high, log.log, read.size()) == (1e-4, 1e-2, True, float("inf"))
    finite = {key: space[key] for key in "abcd"}
    assert read_settings(write_sweep(tmp_path, space=finite)).size() == 2 * 3 * 5 * 3
    assert same({"x": 0.1 + 0.2}, {"x": 0.3}) and not same({"x": 1e-4}, {"x": 1.0001e-4})
    assert not same({"x": 1}, {"y": 1})


def test_options_keep_every_digit() -> None:
    given: dict[str, Any] = {
        "a": 0.1 + 0.2,
        "b": 1e-05,
        "c": None,
        "d": True,
        "e": "SwiftBrush",
        "f": [0.0, 0.9],
    }
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
    content: dict[str, Any] = {
        "space": {RATE: number(0.01, 1.0, log=True)}, "metric": "val/frechet_distance", "trials": 2,
        "overrides": {},
    }  # fmt: skip
    path = write_sweep(folder, **{**content, **changes})
    (folder / "base.yaml").write_text(TINY)
    return path


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.init_args.learning_rat": choice(0.1, 0.2)}, "did you mean 'learning_rate'"),
        ({"trainer.max_step": choice(3, 4)}, "did you mean 'trainer.max_steps'"),
        ({"trainer.max_steps": number(3, 4.5)}, "the point.*max_steps"),
        ({RATE: choice(0.1, "much")}, "much"),
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


def test_a_base_below_the_base_belongs_to_the_identity(tmp_path: Path) -> None:
    """What a configuration says counts, with all that it builds on; a comment does not."""
    settings = read_settings(write_sweep(tmp_path))
    (tmp_path / "base.yaml").write_text("base: below.yaml\ntrainer: {max_steps: 1}\n")
    (tmp_path / "below.yaml").write_text("model: {rate: 1}\n")
    before = settings.identity()
    (tmp_path / "below.yaml").write_text("# a comment\nmodel: {rate: 1}\n")
    assert settings.identity() == before
    (tmp_path / "below.yaml").write_text("model: {rate: 2}\n")
    assert settings.identity() != before


def test_a_wrong_base_config_is_told_from_a_wrong_key(tmp_path: Path) -> None:
    path = tiny_sweep(tmp_path)
    (tmp_path / "base.yaml").write_text(TINY.replace("max_steps", "max_step"))
    with pytest.raises(UserError, match="the base config: .*did you mean 'trainer.max_steps'"):
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
    parsed = ParseOnly(words).settings
    assert parsed.model.init_args.objective.init_args.guidance_scale == 1.5
    assert parsed.model.init_args.student.optimizer.init_args.lr == 1e-4
    assert parsed.trainer.max_steps == 40


def test_a_sweep_of_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trial by the real command line; the best configuration gives the same value again."""
    path = tiny_sweep(tmp_path, trials=1)
    os.environ["OMP_NUM_THREADS"] = "1"  # the number of threads of the tests
    main(["sweep", "--config", str(path)])
    content = content_of(path)
    best, out = content["best"], capsys.readouterr().out
    assert content["counts"]["complete"] == 1 and best["rank"] == 1
    assert ranked_table(content) in out and "sweep.html" in out
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
        "x": number(0, 8),
        "model.y": choice("<i>a", "c"),
        "other.y": number(1e-3, 1, log=True),
    }
    path = write_sweep(tmp_path, space=space, trials=7, overrides={"delay": 0, "fail_above": 6.5})
    driver(path, workers=2).run()
    content = write_results(study(path))
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
    assert set(content["importance"]) == {"x", "model.y", "other.y"}
    page = (tmp_path / "runs/sweep/sweep.html").read_text()
    assert page.count('class="figure"') == 5  # history, parallel, slices, importance, curves
    assert "&lt;i&gt;a" in page and "<i>a" not in page
    assert "x is far too large" in page and ">other.y<" in page and ">model.y<" in page
    assert not re.search(r"<(?:script|img|iframe)[^>]*src=|<link|@import", page), "fetches nothing"


def test_importance_finds_the_key_that_matters(tmp_path: Path) -> None:
    space = {"x": number(0, 8), "y": number(0, 8)}
    sampler = {"class_path": "RandomSampler", "init_args": {"seed": 0}}
    one = study(write_sweep(tmp_path, space=space, trials=60, sampler=sampler))
    for _ in range(60):
        assert importance(plain_copy(one)) is None or len(one.live()) >= 4
        trial = one.claim()
        assert trial is not None
        one.tell(trial, "COMPLETE", (trial.params["x"] - 3) ** 2)
    shares = importance(plain_copy(one))
    assert shares is not None and list(shares) == ["x", "y"] and shares["x"] > 0.8


def test_a_page_before_any_value(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, space={"x": choice(7, 8)}, trials=2, overrides={"delay": 0, "fail_above": 6})
    driver(path).run()
    content = write_results(study(path))
    assert content["best"] is None and content["best_config"] is None and content["importance"] is None
    assert "nothing to plot" in (tmp_path / "runs/sweep/sweep.html").read_text()


def test_failed_trials_tell_by_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sweep(tmp_path, space={"x": choice(1, 8)}, trials=2, overrides={"delay": 0, "fail_above": 6})
    driver(path).run()  # the command has nothing left to do but to tell
    monkeypatch.setattr("commands.sweeping.check.check_keys", lambda settings: None)
    with pytest.raises(SystemExit) as left:
        main(["sweep", "--config", str(path)])
    assert left.value.code == 1
