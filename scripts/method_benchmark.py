"""All methods on the bundled teacher: the same start, prompts, budget of network operations and judge.

    python scripts/method_benchmark.py                          all cells; stopped at any moment, it goes on
    python scripts/method_benchmark.py --only method=dmd2 --only seed=0    others may run in other processes
    python scripts/method_benchmark.py --updates 100 --batch-size 16   a smaller budget: updates of SwiftBrush
    python scripts/method_benchmark.py --report-only            table and pictures of what is there
    python scripts/method_benchmark.py --table steps            students of one and of four steps
    python scripts/method_benchmark.py --guidance 2             one guidance scale for all methods
    python scripts/method_benchmark.py --settings search.json   each with what scripts/method_search.py chose

A cell is a short `fit` of `configs/experiment/emoji_METHOD.yaml` from the teacher at timestep 625 with the
batch size and the student's average of this script, for as many updates as the budget allows: the floating-
point operations of one update of each method are counted first (products and convolutions of all networks,
forwards and backwards). Methods with a discriminator or pairs learn from 2,048 samples of the teacher, which
are drawn first (their cost is not in the budget). Rates and all else are those of the configurations, or with
--settings those that scripts/method_search.py found. The student's average then draws the 1,024 held-out
captions: frechet_distance and clip_score as everywhere; precision and recall among the teacher's pictures of
the same captions (25 steps, guidance 4.5; k = 3); diversity, 1 − the mean cosine among four pictures of a
prompt, of 128 prompts; all by the scoring CLIP's features. A student of several steps draws in fewer of them,
too; its update takes longer the later the drawn step is, and the mean counts. Writes results.json, results.md
and pictures.png (of the table of steps steps.json, .md and .png), and keeps the checkpoints of students of
several steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import yaml
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli
from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.measure import evaluate_model
from callbacks.metrics.precision_recall import covered, squared_radii
from callbacks.metrics.reference import ReferenceStatistics
from callbacks.metrics.teacher import Teacher
from commands.config_files import content_of
from commands.sweeping.trial_process import environment, fit_command
from common.files import asset_path, write_text_atomically, written_whole
from datamodules.prompts import read_prompts
from datamodules.sources import CAPTIONS, EVAL_CAPTIONS
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.steps import Steps
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.generator import load_generator
from reports.sheets import labelled_grid, save_png
from reports.text import markdown_table

TEACHER, CLIP = "assets/emoji-sd", "assets/emoji-clip"
REFERENCE = "assets/cache/emoji-reference.safetensors"


class Method(NamedTuple):
    """A row.

    Attributes:
        title: in the table.
        config: the configuration's name.
        samples: whether it sees samples of the teacher.
        steps: of the student.
        numbers: of steps that it is trained for, one of which is drawn beside the step.
        origin: row whose student of the same seed it starts from, and draws the samples; "": the teacher.
    """

    title: str
    config: str
    samples: bool = False
    steps: int = 1
    numbers: int = 1
    origin: str = ""


METHODS = {
    "swiftbrush": Method("SwiftBrush", "emoji_swiftbrush"),
    "sid_lsg": Method("SiD-LSG", "emoji_sid_lsg"),
    "sim": Method("SIM", "emoji_sim"),
    "dmd2": Method("DMD2 without discriminator", "emoji_dmd2"),
    "decoupled_dmd": Method("Decoupled DMD", "emoji_decoupled_dmd"),
    "pgsb": Method("PG-SB", "emoji_pgsb"),
    "di_star": Method("DI*-style (SIM + CLIP reward)", "emoji_di_star"),
    "dmd": Method("DMD with pairs", "emoji_dmd", samples=True),
    "dmd2_gan": Method("DMD2", "emoji_dmd2_gan", samples=True),
    "f_distill": Method("f-distill, forward KL", "emoji_f_distill", samples=True),
    "sida": Method("SiDA", "emoji_sida", samples=True),
    "uni_instruct": Method("Uni-Instruct, forward KL", "emoji_uni_instruct", samples=True),
}
STEPS = {
    "pgsb_4step": Method("PG-SB, 4 steps", "emoji_pgsb_4step", steps=4),
    "dmd2_4step": Method("DMD2 without discriminator, 4 steps", "emoji_dmd2_4step", steps=4),
    "tdm_4step": Method("TDM, 4 steps", "emoji_tdm_4step", steps=4),
    "tdm_unify": Method("TDM, told 4, 2 or 1 steps", "emoji_tdm_unify", steps=4, numbers=3),
    "tdm": Method("TDM", "emoji_tdm_4step"),
    "pgsb": METHODS["pgsb"],
    "dmd2": METHODS["dmd2"],
    "sida": METHODS["sida"],
    "sida_from_4step": Method("SiDA, from PG-SB's 4 steps", "emoji_sida", samples=True, origin="pgsb_4step"),
    "pgsb_from_4step": Method("PG-SB, from its 4 steps", "emoji_pgsb", origin="pgsb_4step"),
}
TABLES = {"methods": METHODS, "steps": STEPS}
SEEDS, START, SAMPLES, HELD_OUT, SHOWN, LEAST_GUIDANCE = (0, 1), 625, 2048, 1024, 6, 0.5
SID_GUIDANCE = ("train_fake_guidance", "fake_guidance", "teacher_guidance")
# what the students begin as, by the row's key
STARTS = {
    "start": (f"start, at {START}", Steps((START,))),
    "start_fresh": ("start, 4 steps, new noise", Steps((625, 469, 312, 156), "fresh")),
    "start_none": ("start, 4 steps, deterministic", Steps((625, 469, 312, 156), "none")),
}
DRAWN_IN = (4, 2, 1)
COLUMNS = {
    "frechet_distance": "frechet_distance ↓", "clip_score": "clip_score ↑", "precision": "precision ↑",
    "recall": "recall ↑", "diversity": "diversity ↑", "updates": "updates", "seconds": "s per update",
    "memory": "memory, GiB",
}  # fmt: skip


class Cell(NamedTuple):
    """One run.

    Attributes:
        method: its row's key.
        seed: of everything.
        guidance: guidance scale in place of the configuration's; PG-SB's mean, drawn from `LEAST_GUIDANCE`
            on; of what builds on SiD-LSG all three.
        rates: factor on the learning rates of student and fake score.
    """

    method: str
    seed: int
    guidance: float | None = None
    rates: float = 1.0

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-seed{self.seed}"

    @property
    def of(self) -> Method:
        """Its row."""
        return (METHODS | STEPS)[self.method]


def chosen(search: Path) -> dict[str, tuple[float, float]]:
    """Guidance and factor on the rates of each method, from search.json of scripts/method_search.py.

    Raises:
        ValueError: a method has no chosen trial.
    """
    rows = json.loads(search.read_text())
    found = {row["method"]: (row["guidance"], row["rates"]) for row in rows if row["chosen"]}
    if missing := METHODS.keys() - found.keys():
        raise ValueError(
            f"{search} has no chosen trial of {', '.join(sorted(missing))}; scripts/method_search.py goes on "
            "where it was stopped"
        )
    return found


def bound_metrics() -> tuple[ClipExtractor, list[ImageMetric]]:
    """The scoring CLIP, and frechet_distance and clip_score by it."""
    extractor, reference = ClipExtractor(asset_path(CLIP)), ReferenceStatistics.load(asset_path(REFERENCE))
    metrics: list[ImageMetric] = [FrechetDistance(), ClipScore()]
    for metric in metrics:
        metric.bind(extractor, reference)
    return extractor, metrics


class Judge:
    """Measures pictures of the held-out captions by one CLIP.

    Args:
        folder: where the teacher's features are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.captions = read_prompts(EVAL_CAPTIONS)[:HELD_OUT]
        self.extractor, self.metrics = bound_metrics()
        kept = folder / "teacher.pt"
        found = torch.load(kept, weights_only=True) if kept.is_file() else {}
        rows = {name: draw for name, (draw, _) in Teacher(str(asset_path(TEACHER))).rows.items()}
        for name in (rows.keys() | STARTS.keys()) - found.keys():
            if name in STARTS:
                start = load_generator(asset_path(TEACHER)).eval()
                start.steps = STARTS[name][1]
                rows[name] = start.images
            found[name] = self.measure(in_passes(rows[name]))
            with written_whole(kept) as file:
                torch.save(found, file)
        self.teacher: dict[str, Any] = found

    @torch.no_grad()
    def measure(
        self, draw: Callable[[list[str], list[int]], Tensor], diversity: bool = True
    ) -> dict[str, Any]:
        """Values, features of the held-out captions' pictures, and the first few of these."""
        pictures = draw(self.captions, list(range(len(self.captions))))
        results = evaluate_model(lambda _, seeds: pictures[seeds], self.captions, self.metrics, 64)
        values = {metric.name: float(results[metric.name]["value"]) for metric in self.metrics}
        if diversity:
            values["diversity"] = self.diversity(draw)
        return {"values": values, "features": self.features(pictures), "pictures": pictures[:SHOWN]}

    def diversity(self, draw: Callable[[list[str], list[int]], Tensor]) -> float:
        """1 − the mean cosine among four pictures of a prompt."""
        several = [caption for caption in self.captions[:128] for _ in range(4)]
        seeds = [10_000 + place for place in range(len(several))]
        features = normalize(self.features(draw(several, seeds)), dim=1)
        cosines = (groups := features.unflatten(0, (-1, 4))) @ groups.mT
        return 1 - float((cosines.sum((1, 2)) - 4).mean() / 12)

    def features(self, pictures: Tensor) -> Tensor:
        """[N, D], float64."""
        return torch.cat([self.extractor.image_features(part) for part in pictures.split(64)]).double()

    def among_the_teachers(self, features: Tensor, k: int = 3) -> dict[str, float]:
        """Precision and recall (arXiv 1904.06991) where the teacher's pictures are the real ones."""
        real = self.teacher["steps_25"]["features"]
        return {
            "precision": float(covered(features, real, squared_radii(real, k)).double().mean()),
            "recall": float(covered(real, features, squared_radii(features, k)).double().mean()),
        }


def in_passes(draw: Callable[[list[str], list[int]], Tensor]) -> Callable[[list[str], list[int]], Tensor]:
    """The same, 64 pictures at a time."""
    return lambda prompts, seeds: torch.cat(
        [draw(prompts[i : i + 64], list(seeds[i : i + 64])) for i in range(0, len(prompts), 64)]
    )


def draw_samples(cell: Cell, folder: Path) -> Path:
    """Where the samples are that the cell learns from; draws them: the teacher's once for all budgets."""
    origin = origin_of(cell, folder)
    place = folder.parent / "teacher-samples" if origin is None else folder / cell.name / "samples"
    if cell.of.samples:
        cli.main([
            "draw-teacher", f"--model={origin or asset_path(TEACHER)}", f"--prompts={CAPTIONS}",
            f"--output={place}", f"--count={SAMPLES}",
        ])  # fmt: skip
    return place


def origin_of(cell: Cell, folder: Path) -> Path | None:
    """The checkpoint that the cell starts from, None for the teacher."""
    if not cell.of.origin:
        return None
    (last,) = (folder / Cell(cell.of.origin, cell.seed).name).glob("version_*/checkpoints/last.ckpt")
    return last


def tried(cell: Cell) -> dict[str, Any]:
    """Guidance and rates that the cell has in place of its configuration's, in `model.init_args`."""
    config = asset_path(f"configs/experiment/{cell.of.config}.yaml")
    model = content_of(config)["model"]["init_args"]
    own: dict[str, Any] = {
        role: {"optimizer": {"init_args": {"lr": model[role]["optimizer"]["init_args"]["lr"] * cell.rates}}}
        for role in ("student", "fake_score")
    }
    if cell.guidance is not None:
        args, scale = model["objective"]["init_args"], cell.guidance
        names = [name for name in SID_GUIDANCE if name in args]
        bounds = {"init_args": {"low": LEAST_GUIDANCE, "high": 2 * scale - LEAST_GUIDANCE}}
        value = bounds if isinstance(args["guidance_scale"], dict) else scale
        own["objective"] = {"init_args": dict.fromkeys(names or ["guidance_scale"], value)}
    return own


def changes(
    cell: Cell, updates: int, samples: Path, batch_size: int, origin: Path | None = None
) -> dict[str, Any]:
    """What the cell's configuration has instead of the method's own one."""
    data: dict[str, Any] = {"batch_size": batch_size, "eval_size": 64}
    if cell.of.samples:
        data["real"] = {"folder": str(samples), "batch_size": batch_size}
    start: dict[str, Any] = {"start_timestep": START, "timesteps": None} if cell.of.steps == 1 else {}
    if origin is not None:
        start["student_init"] = str(origin)
    return {
        "seed_everything": cell.seed,
        "model": {"init_args": {**tried(cell), **start, "ema_decay": 0.95, "seed": cell.seed}},
        "data": {"init_args": data},
        "trainer": {
            "max_steps": updates, "limit_val_batches": 0, "precision": "32-true",
            "callbacks": [
                {"class_path": "RunCheckpoint", "init_args": {"every_n_steps": 20, "monitor": None}},
            ],
        },
    }  # fmt: skip


def configure(cell: Cell, updates: int, folder: Path, samples: Path, batch_size: int) -> list[str]:
    """The options of the cell's `fit` in this folder; writes its own part of the configuration."""
    place = folder / cell.name
    place.mkdir(parents=True, exist_ok=True)
    origin = origin_of(cell, folder)
    own = yaml.safe_dump(changes(cell, updates, samples, batch_size, origin), sort_keys=False)
    (place / "cell.yaml").write_text(own)
    method = asset_path(f"configs/experiment/{cell.of.config}.yaml")
    return [
        "--config", str(method), "--config", str(place / "cell.yaml"),
        f"--trainer.default_root_dir={folder}", f"--experiment={cell.name}",
    ]  # fmt: skip


def operations(method: str, folder: Path, samples: Path, batch_size: int) -> float:
    """Floating-point operations of one student update with all that it plans beside it; counted once.

    Of a student of K steps the mean of K updates, in each of which another step is drawn; of one that is
    trained for several numbers of steps that of K for each of them. Where a student starts makes no
    difference.
    """
    rows = METHODS | STEPS
    method = next(name for name, row in rows.items() if _costs(row) == _costs(rows[method]))
    kept = folder / "operations" / f"{method}.json"
    if not kept.is_file():
        total, row = 0, Cell(method, 0).of
        count = row.steps * row.numbers
        step, uniform = OneStepDistillation.training_step, StepRandom.shared_uniform

        def counted(module: OneStepDistillation, *batch: Any) -> None:
            nonlocal total
            with FlopCounterMode(display=False) as counter:
                step(module, *batch)
            total += counter.get_total_flops()

        def in_turn(random: StepRandom, name: str) -> float:
            places = {
                "student_step": random.step % row.steps / row.steps,
                "step_count": random.step // row.steps / row.numbers,
            }
            return places[name] if name in places else uniform(random, name)

        kept.parent.mkdir(parents=True, exist_ok=True)
        with (
            patch.object(OneStepDistillation, "training_step", counted),
            patch.object(StepRandom, "shared_uniform", in_turn),
            TemporaryDirectory(dir=kept.parent) as own,  # others may count the same method at this moment
        ):
            cli.main(["fit", *configure(Cell(method, 0), count, Path(own), samples, batch_size)])
        write_text_atomically(kept, json.dumps(total / count))
    return float(json.loads(kept.read_text()))


def affordable(cell: Cell, budget: int, folder: Path, samples: Path, batch_size: int) -> int:
    """Updates of the cell's method for the operations of so many of SwiftBrush, at least 1."""
    costs = [operations(name, folder, samples, batch_size) for name in ("swiftbrush", cell.method)]
    return max(1, round(budget * costs[0] / costs[1]))


def _costs(row: Method) -> tuple[str, int]:
    return row.config, row.steps


def train(place: Path, options: list[str]) -> Path | None:
    """The last checkpoint of this `fit` below a folder, resumed if it was stopped; None if it failed."""
    with (place / "output.log").open("wb") as output:
        command, env = [*fit_command(), *options, "--ckpt_path", "last"], environment(1, 0)
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=env).returncode
    if status != 0:
        print(f"{place.name} failed: see {place / 'output.log'}", flush=True)
        return None
    (last,) = place.glob("version_*/checkpoints/last.ckpt")  # a run stopped early leaves a version without
    return last


def run_cell(cell: Cell, updates: int, judge: Judge, folder: Path, samples: Path, batch_size: int) -> bool:
    """Run a cell unless it is finished; False if it failed."""
    place = folder / cell.name
    if (place / "result.pt").is_file():
        return True
    last = train(place, configure(cell, updates, folder, samples, batch_size))
    if last is None:
        return False
    run = last.parents[1]
    generator = load_generator(last).eval()
    timing = json.loads((run / "report.json").read_text())["timing"]
    for count in sorted({count for count in DRAWN_IN if count <= cell.of.steps}):
        with generator.taking(count):
            result = judge.measure(in_passes(generator.images), diversity=count == cell.of.steps)
        result["values"] |= {
            "updates": updates, "seconds": timing["seconds_per_step"], "memory": timing["peak_memory_gib"]
        }  # fmt: skip
        torch.save(result, place / result_name(cell.of, count))
        print(f"{cell.name} in {count}: {result['values']}", flush=True)
    if cell.of.steps == 1:
        shutil.rmtree(run / "checkpoints")
    return True


def result_name(method: Method, count: int) -> str:
    """File of what a student draws in so many steps; the last one that is written is that of all of them."""
    return "result.pt" if count == method.steps else f"result-in-{count}.pt"


def write_report(folder: Path, judge: Judge, table_name: str) -> None:
    """results.json, results.md and pictures.png of the cells that are there (steps.json, … of few steps)."""
    rows, table, views = [], [], {}
    names = {"steps_25": "teacher, 25 steps", "steps_1": "teacher, 1 step"}
    names |= {
        name: title for name, (title, _) in list(STARTS.items())[: None if table_name == "steps" else 1]
    }
    groups = {title: [judge.teacher[name]] for name, title in names.items()}
    for name, method in TABLES[table_name].items():
        for count in (count for count in DRAWN_IN if count <= method.steps):
            title = method.title + (f", drawn in {count}" if method.steps > 1 else "")
            paths = [folder / Cell(name, seed).name / result_name(method, count) for seed in SEEDS]
            groups[title] = [torch.load(path, weights_only=True) for path in paths if path.is_file()]
    for title, found in groups.items():
        values = [one["values"] | judge.among_the_teachers(one["features"]) for one in found]
        rows += [{"method": title, "seed": seed, **one} for seed, one in enumerate(values)]
        cells = [_spread([one[name] for one in values if name in one], name) for name in COLUMNS]
        table.append([title, str(len(found)), *cells])
        if found:
            views[title] = found[0]["pictures"].numpy()
    stem, pictures = ("results", "pictures") if table_name == "methods" else (table_name, table_name)
    write_text_atomically(folder / f"{stem}.json", json.dumps(rows, indent=1) + "\n")
    text = "\n".join(markdown_table(["method", "seeds", *COLUMNS.values()], table))
    write_text_atomically(folder / f"{stem}.md", text + "\n")
    save_png(
        labelled_grid(views, judge.captions[:SHOWN], columns=1, least_size=96), folder / f"{pictures}.png"
    )


def _spread(values: Sequence[float], name: str) -> str:
    """Mean (lowest–highest); "missing" without a run."""
    if not values:
        return "–"
    digits = 0 if name == "updates" else 2
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line says; exit status 1 if a cell failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--updates", type=int, default=300, help="the budget in updates of SwiftBrush (default: %(default)s)")
    add("--batch-size", type=int, default=48, help="prompts per update (default: %(default)s)")
    add("--only", action="append", default=[], metavar="FIELD=VALUE", help="method or seed")
    add("--table", choices=list(TABLES), default="methods", help="(default: %(default)s)")
    own = parser.add_mutually_exclusive_group().add_argument
    own("--guidance", type=float, help="guidance scale of all methods (default: that of each configuration)")
    own("--settings", type=Path, help="search.json of scripts/method_search.py; for the table of methods")
    add("--output", type=Path, default=Path("outputs/methods"))
    add("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(words)
    budget = f"{options.updates}x{options.batch_size}"
    budget += "" if options.guidance is None else f"-guidance{options.guidance:g}"
    budget += "" if options.settings is None else "-searched"
    folder = (options.output / budget).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    conditions = [one.split("=", 1) for one in options.only]
    settings = dict.fromkeys(TABLES[options.table], (options.guidance, 1.0))
    if options.settings is not None:
        if options.table != "methods":
            parser.error("--settings is for the table of methods: no search has few-step students")
        settings = chosen(options.settings)
    cells = [Cell(method, seed, *settings[method]) for seed in SEEDS for method in settings]
    cells = [cell for cell in cells if all(str(getattr(cell, key)) == value for key, value in conditions)]
    judge, whole = Judge(folder.parent), True
    for cell in () if options.report_only else cells:
        samples = draw_samples(cell, folder)
        updates = affordable(cell, options.updates, folder, samples, options.batch_size)
        whole &= run_cell(cell, updates, judge, folder, samples, options.batch_size)
        write_report(folder, judge, options.table)
    write_report(folder, judge, options.table)
    missing = [cell.name for cell in cells if not (folder / cell.name / "result.pt").is_file()]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells; missing: {', '.join(missing) or 'none'}")
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
