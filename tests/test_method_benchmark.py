"""The benchmark of methods: each has its configuration, and what a cell changes in it is read by `fit`."""

from pathlib import Path
from typing import Any

import pytest

from commands.sweeping.check import ParseOnly
from scripts import method_benchmark
from scripts.method_benchmark import METHODS, Cell


def test_every_method_has_a_configuration() -> None:
    configs = Path(__file__).parents[1] / "configs" / "experiment"
    assert all((configs / f"{config}.yaml").is_file() for _, config, _ in METHODS.values())


def test_a_cell_is_a_fit_of_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    words = method_benchmark.configure(Cell("f_distill", 1), 7, tmp_path, tmp_path / "samples", 16)
    settings: Any = ParseOnly(["fit", *words]).settings
    assert settings.model.init_args.objective.class_path.endswith("FDistill")
    assert (settings.model.init_args.seed, settings.model.init_args.start_timestep) == (1, 625)
    data, run = settings.data.init_args, settings.trainer
    assert (data.batch_size, data.real.folder, data.real.batch_size) == (16, str(tmp_path / "samples"), 16)
    assert (run.max_steps, run.limit_val_batches, len(run.callbacks)) == (7, 0, 1)


def test_mean_and_spread() -> None:
    spread = method_benchmark._spread
    assert spread([1.0, 3.0], "recall") == "2.00 (1.00–3.00)" and spread([4, 4], "updates") == "4"
    assert spread([], "recall") == "–"
