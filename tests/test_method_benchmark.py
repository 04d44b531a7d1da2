"""The benchmark of methods: each has its configuration, and what a cell changes in it is read by `fit`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from commands.sweeping.check import ParseOnly
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.distillation import OneStepDistillation
from scripts import method_benchmark
from scripts.method_benchmark import METHODS, SHOWN, STARTS, STEPS, Cell

# Notes its start and what it goes on from beside the cells; stops early if there is a file `fail-CELL` there.
FIT = """
import os, sys
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
root, name = options["trainer.default_root_dir"], options["experiment"]
with open(os.path.join(root, "started"), "a") as file:
    file.write(f"{name} {' '.join(sys.argv[-2:])}\\n")
folder = os.path.join(root, name, f"version_{len(os.listdir(os.path.join(root, name))) - 2}")
os.makedirs(os.path.join(folder, "checkpoints"))
if os.path.exists(os.path.join(root, f"fail-{name}")):
    sys.exit("out of luck")
open(os.path.join(folder, "checkpoints", "last.ckpt"), "w").close()
with open(os.path.join(folder, "report.json"), "w") as file:
    file.write('{"timing": {"seconds_per_step": 0.25, "peak_memory_gib": 1.5}}')
"""


class Student:
    """Its pictures tell in how many steps they were drawn; 0: in all."""

    count = 0

    def eval(self) -> "Student":
        return self

    @contextmanager
    def taking(self, count: int) -> Iterator[None]:
        self.count = count
        yield
        self.count = 0

    def images(self, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        return torch.full((len(prompts), 3, 8, 8), float(self.count))


class Judge:
    """Of no networks: the distance is what the pictures tell."""

    captions = ("a cat",) * SHOWN

    def __init__(self, folder: Path) -> None:
        self.teacher = {
            name: self.measure(Student().images, True) for name in ("steps_25", "steps_1", *STARTS)
        }

    def measure(self, draw: Callable[..., torch.Tensor], diversity: bool) -> dict[str, Any]:
        pictures = draw(list(self.captions), list(range(SHOWN)))
        values = {"frechet_distance": pictures.mean().item()} | ({"diversity": 0.5} if diversity else {})
        return {"values": values, "features": pictures.flatten(1), "pictures": pictures / 4}

    def among_the_teachers(self, features: torch.Tensor) -> dict[str, float]:
        return {"precision": 1.0, "recall": 0.5}


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a benchmark whose `fit`, students and judge are stand-ins, as is draw-teacher."""
    (script := tmp_path / "fit.py").write_text(FIT)
    (folder := tmp_path / "out" / "8x4").mkdir(parents=True)
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(method_benchmark, "fit_command", lambda: [sys.executable, "-S", "-E", str(script)])
    monkeypatch.setattr(method_benchmark, "load_generator", lambda checkpoint: Student())
    monkeypatch.setattr(method_benchmark, "Judge", Judge)
    costs = {"swiftbrush": 3.0, "dmd": 4.0, "pgsb_4step": 48.0}
    monkeypatch.setattr(method_benchmark, "operations", lambda method, *_: costs[method])
    monkeypatch.setattr(
        method_benchmark.cli, "main", lambda words: (folder / "drawn").open("a").write(f"{words}\n")
    )
    return folder


def run(cells: Path, *words: str) -> int:
    """Exit status."""
    with pytest.raises(SystemExit) as end:
        method_benchmark.main(["--updates", "8", "--batch-size", "4", "--output", str(cells.parent), *words])
    return int(end.value.code or 0)


def started(cells: Path) -> list[str]:
    return (cells / "started").read_text().splitlines() if (cells / "started").exists() else []


def test_finished_cells_are_not_run_again(cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--only", "method=dmd", "--only", "seed=1")
    assert run(cells, *words) == 0
    place = cells / "dmd-seed1"
    result = torch.load(place / "result.pt", weights_only=True)["values"]
    assert (result["updates"], result["seconds"], result["diversity"]) == (6, 0.25, 0.5)
    assert yaml.safe_load((place / "cell.yaml").read_text())["trainer"]["max_steps"] == 6
    assert not (place / "version_0" / "checkpoints").exists()
    (drawn,) = (cells / "drawn").read_text().splitlines()
    assert "'draw-teacher'" in drawn and f"--output={cells.parent / 'teacher-samples'}'" in drawn
    assert run(cells, *words) == 0 and started(cells) == ["dmd-seed1 --ckpt_path last"]
    assert "1 of 1 cells; missing: none" in capsys.readouterr().out
    rows = {row["method"]: row for row in json.loads((cells / "results.json").read_text())}
    assert rows["DMD with pairs"]["updates"] == 6 and (cells / "pictures.png").is_file()


def test_a_cell_that_failed_goes_on_and_the_others_are_run(
    cells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The version that a run without a checkpoint leaves is not looked into."""
    words = ("--only", "method=dmd")
    (fail := cells / "fail-dmd-seed0").touch()
    assert run(cells, *words) == 1
    told, log = capsys.readouterr().out, cells / "dmd-seed0" / "output.log"
    assert f"dmd-seed0 failed: see {log}\n" in told and "out of luck" in log.read_text()
    assert "1 of 2 cells; missing: dmd-seed0\n" in told
    fail.unlink()
    assert run(cells, *words) == 0
    names = ("dmd-seed0", "dmd-seed1", "dmd-seed0")
    assert started(cells) == [f"{name} --ckpt_path last" for name in names]
    assert (cells / "dmd-seed0" / "result.pt").is_file()


def test_report_only_runs_nothing(cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cells, "--only", "method=dmd", "--report-only") == 0
    assert "0 of 2 cells; missing: dmd-seed0, dmd-seed1\n" in capsys.readouterr().out
    assert sorted(path.name for path in cells.iterdir()) == ["pictures.png", "results.json", "results.md"]
    assert "| DMD with pairs | 0 | – | – |" in (cells / "results.md").read_text()


def test_a_student_of_several_steps_draws_in_fewer_too(cells: Path) -> None:
    """Diversity is that of all steps; its checkpoint stays, for rows that start from it."""
    assert run(cells, "--table", "steps", "--only", "method=pgsb_4step", "--only", "seed=0") == 0
    place = cells / "pgsb_4step-seed0"
    for count, name in ((4, "result"), (2, "result-in-2"), (1, "result-in-1")):
        values = torch.load(place / f"{name}.pt", weights_only=True)["values"]
        assert values["frechet_distance"] == count and ("diversity" in values) == (count == 4)
        assert values["updates"] == 1  # half an update is what the budget has
    assert (place / "version_0" / "checkpoints" / "last.ckpt").is_file() and not (cells / "drawn").exists()
    rows = [row["frechet_distance"] for row in json.loads((cells / "steps.json").read_text())]
    assert rows == [0] * 5 + [4, 2, 1]


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
