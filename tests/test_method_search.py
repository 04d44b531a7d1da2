"""The search of settings for the methods' benchmark: as many trials for each, chosen by distance."""

import json
from pathlib import Path

from scripts import method_search
from scripts.method_benchmark import METHODS
from scripts.method_search import Trial


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
