"""The benchmark of methods: each has its configuration, and what a cell changes in it is read by `fit`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.sweeping.check import ParseOnly
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.distillation import OneStepDistillation
from scripts import method_benchmark
from scripts.method_benchmark import METHODS, STEPS, Cell


def test_every_method_has_a_configuration() -> None:
    configs = Path(__file__).parents[1] / "configs" / "experiment"
    assert all(
        (configs / f"{config}.yaml").is_file()
        for config in {row.config for row in (METHODS | STEPS).values()}
    )


def test_a_cell_is_a_fit_of_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    words = method_benchmark.configure(Cell("f_distill", 1), 7, tmp_path, tmp_path / "samples", 16)
    settings: Any = ParseOnly(["fit", *words]).settings
    assert settings.model.init_args.objective.class_path.endswith("FDistill")
    assert (settings.model.init_args.seed, settings.model.init_args.start_timestep) == (1, 625)
    data, run = settings.data.init_args, settings.trainer
    assert (data.batch_size, data.real.folder, data.real.batch_size) == (16, str(tmp_path / "samples"), 16)
    assert (run.max_steps, run.limit_val_batches, len(run.callbacks)) == (7, 0, 1)


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        ("dmd2", (1e-4, 1e-4)),
        ("sid_lsg", (1e-4, 5e-4)),
        ("pgsb", (1e-4, 1e-3)),
        ("uni_instruct", (1e-4, 5e-4)),
    ],
)
def test_guidance_and_rates_of_a_cell(
    method: str, rates: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take the place of the configuration's; nothing else changes."""
    monkeypatch.chdir(Path(__file__).parents[1])

    def read(cell: Cell) -> Any:
        words = method_benchmark.configure(cell, 7, tmp_path, tmp_path / "samples", 16)
        return ParseOnly(["fit", *words]).settings.model.init_args

    own, model = read(Cell(method, 0)), read(Cell(method, 0, 3.0, 2.0))
    for role, rate in zip(("student", "fake_score"), rates, strict=True):
        assert getattr(own, role).optimizer.init_args.lr == rate
        assert getattr(model, role).optimizer.init_args.lr == pytest.approx(2 * rate)
        getattr(model, role).optimizer.init_args.lr = rate
    before, changed = own.objective.init_args, model.objective.init_args
    if method == "pgsb":
        scale = changed.guidance_scale.init_args
        assert (scale.low, scale.high) == (0.5, 5.5)
        scale.high = 4.0
    elif method == "dmd2":
        assert changed.guidance_scale == 3.0 != before.guidance_scale
        changed.guidance_scale = before.guidance_scale
    else:
        for name in ("train_fake_guidance", "fake_guidance", "teacher_guidance"):
            assert (before[name], changed[name]) == (2.0, 3.0)
            changed[name] = 2.0
    assert model == own


def test_searched_settings(tmp_path: Path) -> None:
    """Of each method the chosen trial's, not the first or the last one's; none may be missing."""
    search = tmp_path / "search.json"
    rows = [
        {"method": method, "guidance": guidance, "rates": rates, "chosen": (guidance, rates) == (4.0, 1.0)}
        for method in METHODS
        for guidance, rates in ((2.0, 1.0), (4.0, 1.0), (4.0, 2.0))
    ]
    search.write_text(json.dumps(rows))
    assert method_benchmark.chosen(search) == dict.fromkeys(METHODS, (4.0, 1.0))
    search.write_text(json.dumps(rows[:-2]))
    with pytest.raises(ValueError, match="no chosen trial of uni_instruct"):
        method_benchmark.chosen(search)


def test_mean_and_spread() -> None:
    spread = method_benchmark._spread
    assert spread([1.0, 3.0], "recall") == "2.00 (1.00–3.00)" and spread([4, 4], "updates") == "4"
    assert spread([], "recall") == "–"


def test_one_step_from_four_starts_from_that_row_s_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    last = tmp_path / "pgsb_4step-seed1" / "version_0" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    words = method_benchmark.configure(Cell("sida_from_4step", 1), 7, tmp_path, tmp_path / "samples", 16)
    model: Any = ParseOnly(["fit", *words]).settings.model.init_args
    assert (model.student_init, model.timesteps, model.start_timestep) == (str(last), None, 625)
    words = method_benchmark.configure(Cell("dmd2_4step", 0), 7, tmp_path, tmp_path / "samples", 16)
    model = ParseOnly(["fit", *words]).settings.model.init_args
    assert (model.student_init, list(model.timesteps)) == (None, [625, 469, 312, 156])


@pytest.mark.parametrize(
    ("method", "steps", "numbers"), [("pgsb", 1, 1), ("pgsb_4step", 4, 1), ("tdm_unify", 4, 3)]
)
def test_operations_of_every_step_count(
    method: str, steps: int, numbers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over the drawn steps and numbers of them: each step before one is a forward pass more."""
    monkeypatch.setattr(method_benchmark.FlopCounterMode, "get_total_flops", lambda counter: 7)
    drawn, places = list[tuple[float, float]](), list[Path]()

    def fit(words: list[str]) -> None:
        assert words[0] == "fit" and (place := Path(words[1])).is_dir()
        places.append(place)
        for step in range(steps * numbers):
            random = StepRandom(0, step, torch.arange(2))
            OneStepDistillation.training_step(None, random)  # type: ignore[arg-type]

    def step(module: Any, random: StepRandom) -> None:
        drawn.append((random.shared_uniform("student_step") * 4, random.shared_uniform("step_count") * 3))

    monkeypatch.setattr(OneStepDistillation, "training_step", step)
    monkeypatch.setattr(method_benchmark.cli, "main", fit)
    monkeypatch.setattr(method_benchmark, "configure", lambda cell, count, place, *more: [str(place)])
    assert method_benchmark.operations(method, tmp_path, tmp_path, 2) == 7
    assert drawn == [(k, count) for count in range(numbers) for k in range(steps)]
    assert method_benchmark.operations(method, tmp_path, tmp_path, 2) == 7 and len(places) == 1
    (kept,) = (tmp_path / "operations").iterdir()  # the folder that it ran in is gone
    kept.unlink()
    method_benchmark.operations(method, tmp_path, tmp_path, 2)
    assert places[0] != places[1]  # as when two processes count at the same moment
