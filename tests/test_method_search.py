"""The search of settings for the methods' benchmark: as many trials for each, chosen by distance."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands.sweeping.check import ParseOnly
from scripts import method_search
from scripts.method_benchmark import METHODS, Cell, configure
from scripts.method_search import Trial


def read(method: str, trial: Trial, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model's settings in a trial's `fit`, which is not run."""
    told = list[str]()
    monkeypatch.setattr(method_search, "train", lambda _, words: told.extend(words))
    assert not method_search.run_trial(method, trial, 7, None, folder, folder / "samples", 16)  # type: ignore[arg-type]
    return ParseOnly(["fit", *told]).settings.model.init_args


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        ("dmd2", (1e-4, 1e-4)),
        ("sid_lsg", (1e-4, 5e-4)),
        ("pgsb", (1e-4, 1e-3)),
        ("uni_instruct", (1e-4, 5e-4)),
    ],
)
def test_a_trial_changes_guidance_and_rates(
    method: str, rates: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    model = read(method, Trial(3.0, 2.0), tmp_path, monkeypatch)
    own: Any = ParseOnly(
        ["fit", *configure(Cell(method, 0), 7, tmp_path, tmp_path, 16)]
    ).settings.model.init_args
    assert model.student.optimizer.init_args.lr == pytest.approx(2 * rates[0])
    assert model.fake_score.optimizer.init_args.lr == pytest.approx(2 * rates[1])
    objective, before = model.objective.init_args, own.objective.init_args
    if method == "pgsb":
        assert (objective.guidance_scale.init_args.low, objective.guidance_scale.init_args.high) == (0.5, 5.5)
    elif method == "dmd2":
        assert objective.guidance_scale == 3.0 and objective.fake_updates == before.fake_updates == 5
    else:
        scales = (objective.train_fake_guidance, objective.fake_guidance, objective.teacher_guidance)
        assert scales == (3.0, 3.0, 3.0) and objective.a == before.a
    assert model.objective.class_path == own.objective.class_path
    assert model.student.optimizer.class_path == own.student.optimizer.class_path


def keep(folder: Path, trial: Trial, distance: float) -> None:
    place = folder / trial.name / "sim-seed0"
    place.mkdir(parents=True)
    (place / "values.json").write_text(json.dumps({"frechet_distance": distance}))


def test_the_third_trial_has_the_better_guidance(tmp_path: Path) -> None:
    keep(tmp_path, Trial(2.0), 7.0)
    assert method_search.trials("sim", tmp_path) == {Trial(2.0): 7.0, Trial(4.0): None}
    keep(tmp_path, Trial(4.0), 6.0)
    assert [*method_search.trials("sim", tmp_path)][2] == Trial(4.0, 2.0)
    keep(tmp_path, Trial(4.0, 2.0), 6.5)
    method_search.write_report(tmp_path)
    rows = json.loads((tmp_path / "search.json").read_text())
    assert [row["guidance"] for row in rows if row["chosen"]] == [4.0] and len(rows) == 3
    table = (tmp_path / "search.md").read_text().splitlines()
    assert len(table) == 2 + len(METHODS)
    assert [cell.strip() for cell in next(row for row in table if "SIM |" in row).split("|")][2:6] == [
        "7.00", "6.00", "6.50", "4, rates × 1",
    ]  # fmt: skip
