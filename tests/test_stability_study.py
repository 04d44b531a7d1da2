"""scripts/stability_study.py with a `fit` that takes no time, and its configurations as `fit` reads them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import DDIMScheduler

from scripts import stability_study
from scripts.stability_study import (
    CONFIG,
    EQUAL_MEANS,
    RANDOM,
    RULES,
    Cell,
    all_cells,
    changes,
    line,
    main,
    start_timestep,
    table,
)
from tests.test_configs import ROOT, ParseOnly

# Notes its start beside the cells; fails if there is a file `fail` there; goes on if there is a checkpoint.
FIT = """
import os, sys
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
root, name = options["trainer.default_root_dir"], options["experiment"]
folder = os.path.join(root, name, "version_0")
resumed = os.path.exists(os.path.join(folder, "checkpoints", "last.ckpt"))
with open(os.path.join(root, "started"), "a") as file:
    file.write(f"{name} {resumed} {os.path.exists(folder)}\\n")
os.makedirs(os.path.join(folder, "checkpoints"), exist_ok=True)
if os.path.exists(os.path.join(root, "fail")):
    sys.exit("out of luck")
with open(os.path.join(folder, "metrics.csv"), "w") as file:
    file.write("step,val/frechet_distance,val/clip_score\\n")
    for step in (2, 4, 6, 8):
        file.write(f"{step},{10 - step + int(name[-1])},0.5\\n")
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a study of two backbones; the third is not there."""
    script, cells = tmp_path / "fit.py", tmp_path / "out" / "8x16"
    script.write_text(FIT)
    cells.mkdir(parents=True)
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    scheduler.save_pretrained(tmp_path / "linear" / "scheduler")
    monkeypatch.setattr(stability_study, "fit_command", lambda: [sys.executable, "-S", "-E", str(script)])
    monkeypatch.setattr(stability_study, "start_distance", lambda folder: 12.5)
    folders = {"v": str(tmp_path / "none"), "pixart": str(tmp_path / "linear")}
    monkeypatch.setattr(stability_study, "BACKBONES", {**stability_study.BACKBONES, **folders})
    return cells


def run(study: Path, *words: str) -> int:
    """Exit status."""
    with pytest.raises(SystemExit) as end:
        main(["--updates", "8", "--output", str(study.parent), *words])
    return int(end.value.code or 0)


def started(study: Path) -> list[str]:
    return (study / "started").read_text().splitlines() if (study / "started").exists() else []


def test_the_cells_are_the_grid_and_the_ablation() -> None:
    cells = all_cells()
    assert len(cells) == len({cell.name for cell in cells}) == 3 * 4 * 2 + 2 * 2
    assert sum(cell.matches(["backbone=epsilon", "seed=1"]) for cell in cells) == 6
    means = {"fixed 2.25": (2.25, None), "U(0.5, 4)": (RULES["U(0.5, 4)"][0], None)}
    equal = all_cells(equal_means=True)
    assert len({cell.name for cell in equal}) == len(equal) == 4 * 3 and means.items() <= RULES.items()
    assert {cell.rule for cell in equal} > set(means) and {cell.backbone for cell in equal} == {"epsilon"}


def test_the_rules_are_what_their_names_say() -> None:
    """Teacher first; of equal means all are 2.25."""

    def scale(word: str) -> Any:
        return RANDOM if word == "U" else float(word)

    for name, rule in RULES.items():
        if name.startswith("fixed "):
            assert rule == (float(name.removeprefix("fixed ")), None)
        elif " in teacher, " in name:
            assert rule == tuple(scale(part.split()[0]) for part in name.split(", "))
        else:
            assert (name, rule) == ("U(0.5, 4)", (RANDOM, None))
    assert RANDOM["init_args"] == {"low": 0.5, "high": 4.0}
    assert {kappa for name in EQUAL_MEANS for kappa in RULES[name] if kappa not in (RANDOM, None)} == {2.25}


def test_equal_means_have_updates_and_a_page_of_their_own(study: Path) -> None:
    assert run(study, "--equal-means", "--report-only") == 0
    folder = study.parent / "500x4"
    results = json.loads((folder / "results.json").read_text())
    assert (results["settings"]["updates"], results["settings"]["batch_size"]) == (500, 4)
    assert [row["seed"] for row in results["rows"]] == [0] * 4 + [1] * 4 + [2] * 4
    lines = (folder / "results.md").read_text().splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in lines if " of 3 |" in row] == EQUAL_MEANS
    assert "update 125" in lines[2] and len([row for row in lines if row.startswith("## ")]) == 1


def test_a_line_goes_through_the_means() -> None:
    drawn = line("fixed 2", [[1.0, 3.0], [2.0, 6.0]], [5, 10], 4.0)
    assert drawn.points == [(0, 4), (5, 2), (10, 4)] and drawn.spread == [(4, 4), (1, 3), (2, 6)]


def test_of_equal_means_it_counts_the_runs_that_got_worse() -> None:
    points = [[9.0, 9.0, 9.0], [5.0, 6.0, 7.0], [7.0, 7.0, 9.0], [6.0, 5.0, 8.0]]
    row = table({"fixed 2.25": points}, [125, 250, 375, 500], 3)[-1]
    assert row.endswith("| 6.33 (5.00–8.00) | 2 of 3 |")


def test_it_runs_what_is_missing_and_shows_the_rest_as_missing(study: Path) -> None:
    words = ("--only", "rule=U(0.5, 4)", "--workers", "2")
    assert run(study, *words) == 0
    backbones = ("epsilon", "pixart")
    names = [Cell(backbone, "U(0.5, 4)", seed).name for backbone in backbones for seed in (0, 1)]
    assert sorted(started(study)) == sorted(f"{name} False False" for name in names)
    assert run(study, *words) == 0
    assert len(started(study)) == 4, "finished cells are not run again"
    rows = json.loads((study / "results.json").read_text())["rows"]
    done = {(row["backbone"], row["seed"]): row for row in rows if row["values"]}
    assert set(done) == {("epsilon", 0), ("epsilon", 1), ("pixart", 0), ("pixart", 1)} and len(rows) == 28
    assert done["epsilon", 1]["values"]["val/frechet_distance"] == {"2": 9, "4": 7, "6": 5, "8": 3}
    text = (study / "results.md").read_text()
    assert "| U(0.5, 4) | 2 of 2 | 8.50 (8.00–9.00) | 6.50 (6.00–7.00) |" in text and "| 0 of 2 |\n" in text
    assert "| fixed 2 | 0 of 2 | missing | missing | missing | missing | missing |" in text
    assert "Before any update: 12.50." in text
    assert "frechet_distance" in (study / "stability.html").read_text()


def test_a_cell_that_failed_or_was_killed_is_run_again(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = Cell("epsilon", "fixed 2", 0)
    words = ("--only", "backbone=epsilon", "--only", "rule=fixed 2", "--only", "seed=0")
    (study / "fail").touch()
    assert run(study, *words) == 1
    assert "out of luck" in capsys.readouterr().out
    (study / cell.name / "version_0" / "checkpoints" / "last.ckpt").touch()
    assert run(study, *words) == 1
    (study / cell.name / "version_0" / "checkpoints" / "last.ckpt").unlink()
    (study / "fail").unlink()
    assert run(study, *words) == 0
    ways = [line.removeprefix(cell.name) for line in started(study)]
    assert ways == [" False False", " True True", " False False"], "anew unless there is a checkpoint"
    assert not (study / cell.name / "version_0" / "checkpoints").exists()


def test_all_backbones_start_at_the_same_noise(study: Path) -> None:
    assert start_timestep("assets/emoji-sd") == 625
    linear = stability_study.BACKBONES["pixart"]
    alphas = DDIMScheduler.from_pretrained(linear, subfolder="scheduler").alphas_cumprod
    assert abs(float((1 / alphas[start_timestep(linear)] - 1).sqrt()) - 2.5) < 0.01


@pytest.mark.parametrize("rule", ["fixed 2", *list(RULES)[-2:]])
def test_fit_reads_the_cells(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path, cell = tmp_path / "cell.yaml", Cell("epsilon", rule, 1)
    path.write_text(yaml.safe_dump(changes(cell, 8, 16)))
    settings = ParseOnly(["fit", "--config", CONFIG, "--config", str(path)]).settings
    objective = settings.model.init_args.objective.init_args
    check_scale(objective.guidance_scale, RULES[rule][0])
    check_scale(objective.fake_guidance_scale, RULES[rule][1])
    assert (settings.model.init_args.seed, settings.data.init_args.seed) == (1, 1)
    assert (settings.trainer.max_steps, settings.trainer.val_check_interval) == (8, 2)
    assert settings.model.init_args.ema_decay == 0.95 and settings.data.init_args.batch_size == 16
    assert [one.class_path.rpartition(".")[2] for one in settings.trainer.callbacks] == [
        "RunCheckpoint", "Evaluation", "SampleGrid",
    ]  # fmt: skip


def check_scale(given: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert (given.init_args.low, given.init_args.high, given.init_args.per_sample) == (0.5, 4.0, False)
    else:
        assert given == wanted
