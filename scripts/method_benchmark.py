"""All methods on the bundled teacher: the same start, prompts, budget of network operations and judge.

    python scripts/method_benchmark.py                          all cells; stopped at any moment, it goes on
    python scripts/method_benchmark.py --only method=dmd2 --only seed=0
    python scripts/method_benchmark.py --updates 100 --batch-size 16   a smaller budget: updates of SwiftBrush
    python scripts/method_benchmark.py --report-only            table and pictures of what is there

A cell is a short `fit` of `configs/experiment/emoji_METHOD.yaml` from the teacher at timestep 625 with the
batch size and the student's average of this script, for as many updates as the budget allows: the floating-
point operations of one update of each method are counted first (products and convolutions of all networks,
forwards and backwards). Methods with a discriminator or pairs learn from 2,048 samples of the teacher, which
are drawn first (their cost is not in the budget). Rates and all else are those of the configurations, which
have not been searched for. The student's average then draws the 1,024 held-out captions: frechet_distance
and clip_score as everywhere; precision and recall among the teacher's pictures of the same captions (25
steps, guidance 4.5; k = 3); diversity, 1 − the mean cosine among four pictures of a prompt, of 128 prompts;
all by the scoring CLIP's features. Writes results.json, results.md and pictures.png.
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
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import yaml
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.measure import evaluate_model
from callbacks.metrics.precision_recall import covered, squared_radii
from callbacks.metrics.reference import ReferenceStatistics
from callbacks.metrics.teacher import Teacher
from commands.sweeping.trial_process import environment, fit_command
from common.files import asset_path, write_text_atomically
from datamodules.prompts import read_prompts
from datamodules.sources import CAPTIONS, EVAL_CAPTIONS
from lightning_modules.diffusion.steps import Steps
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.generator import load_generator
from reports.sheets import labelled_grid, save_png
from reports.text import markdown_table

TEACHER, CLIP = "assets/emoji-sd", "assets/emoji-clip"
REFERENCE = "assets/cache/emoji-reference.safetensors"
# name: title, configuration, whether it sees samples of the teacher
METHODS = {
    "swiftbrush": ("SwiftBrush", "emoji_swiftbrush", False),
    "sid_lsg": ("SiD-LSG", "emoji_sid_lsg", False),
    "sim": ("SIM", "emoji_sim", False),
    "dmd2": ("DMD2 without discriminator", "emoji_dmd2", False),
    "decoupled_dmd": ("Decoupled DMD", "emoji_decoupled_dmd", False),
    "pgsb": ("PG-SB", "emoji_pgsb", False),
    "di_star": ("DI*-style (SIM + CLIP reward)", "emoji_di_star", False),
    "dmd": ("DMD with pairs", "emoji_dmd", True),
    "dmd2_gan": ("DMD2", "emoji_dmd2_gan", True),
    "f_distill": ("f-distill, forward KL", "emoji_f_distill", True),
    "sida": ("SiDA", "emoji_sida", True),
    "uni_instruct": ("Uni-Instruct, forward KL", "emoji_uni_instruct", True),
}
SEEDS, START, SAMPLES, HELD_OUT, SHOWN = (0, 1), 625, 2048, 1024, 6
COLUMNS = {
    "frechet_distance": "frechet_distance ↓", "clip_score": "clip_score ↑", "precision": "precision ↑",
    "recall": "recall ↑", "diversity": "diversity ↑", "updates": "updates", "seconds": "s per update",
    "memory": "memory, GiB",
}  # fmt: skip


class Cell(NamedTuple):
    """One run."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-seed{self.seed}"


class Judge:
    """Measures pictures of the held-out captions by one CLIP.

    Args:
        folder: where the teacher's features are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.extractor = ClipExtractor(asset_path(CLIP))
        self.captions = read_prompts(EVAL_CAPTIONS)[:HELD_OUT]
        self.metrics = [FrechetDistance(), ClipScore()]
        for metric in self.metrics:
            metric.bind(self.extractor, ReferenceStatistics.load(asset_path(REFERENCE)))
        kept = folder / "teacher.pt"
        if not kept.is_file():
            rows = Teacher(str(asset_path(TEACHER))).rows
            found = {name: self.measure(in_passes(draw)) for name, (draw, _) in rows.items()}
            start = load_generator(asset_path(TEACHER)).eval()
            start.steps = Steps((START,))
            found["start"] = self.measure(in_passes(start.images))
            torch.save(found, kept)
        self.teacher: dict[str, Any] = torch.load(kept, weights_only=True)

    @torch.no_grad()
    def measure(self, draw: Callable[[list[str], list[int]], Tensor]) -> dict[str, Any]:
        """Values, features of the held-out captions' pictures, and the first few of these."""
        pictures = draw(self.captions, list(range(len(self.captions))))
        results = evaluate_model(lambda _, seeds: pictures[seeds], self.captions, self.metrics, 64)
        values = {metric.name: float(results[metric.name]["value"]) for metric in self.metrics}
        several = [caption for caption in self.captions[:128] for _ in range(4)]
        seeds = [10_000 + place for place in range(len(several))]
        features = normalize(self.features(draw(several, seeds)), dim=1)
        cosines = (groups := features.unflatten(0, (-1, 4))) @ groups.mT
        values["diversity"] = 1 - float((cosines.sum((1, 2)) - 4).mean() / 12)
        return {"values": values, "features": self.features(pictures), "pictures": pictures[:SHOWN]}

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


def draw_samples(place: Path) -> None:
    """The teacher's samples, drawn once for all budgets."""
    cli.main([
        "draw-teacher", f"--model={asset_path(TEACHER)}", f"--prompts={CAPTIONS}", f"--output={place}",
        f"--count={SAMPLES}",
    ])  # fmt: skip


def changes(cell: Cell, updates: int, samples: Path, batch_size: int) -> dict[str, Any]:
    """What the cell's configuration has instead of the method's own one."""
    data: dict[str, Any] = {"batch_size": batch_size, "eval_size": 64}
    if METHODS[cell.method][2]:
        data["real"] = {"folder": str(samples), "batch_size": batch_size}
    return {
        "seed_everything": cell.seed,
        "model": {"init_args": {"start_timestep": START, "ema_decay": 0.95, "seed": cell.seed}},
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
    own = yaml.safe_dump(changes(cell, updates, samples, batch_size), sort_keys=False)
    (place / "cell.yaml").write_text(own)
    method = asset_path(f"configs/experiment/{METHODS[cell.method][1]}.yaml")
    return [
        "--config", str(method), "--config", str(place / "cell.yaml"),
        f"--trainer.default_root_dir={folder}", f"--experiment={cell.name}",
    ]  # fmt: skip


def operations(method: str, folder: Path, samples: Path, batch_size: int) -> float:
    """Floating-point operations of one student update with all that it plans beside it; counted once."""
    kept = folder / "operations" / f"{method}.json"
    if not kept.is_file():
        counter, step = FlopCounterMode(display=False), OneStepDistillation.training_step

        def counted(module: OneStepDistillation, *batch: Any) -> None:
            with counter:
                step(module, *batch)

        place = folder / "operations"
        with patch.object(OneStepDistillation, "training_step", counted):
            cli.main(["fit", *configure(Cell(method, 0), 1, place, samples, batch_size)])
        write_text_atomically(kept, json.dumps(counter.get_total_flops()))
        shutil.rmtree(place / Cell(method, 0).name)
    return float(json.loads(kept.read_text()))


def run_cell(cell: Cell, updates: int, judge: Judge, folder: Path, samples: Path, batch_size: int) -> bool:
    """Run a cell unless it is finished; False if it failed."""
    place = folder / cell.name
    if (place / "result.pt").is_file():
        return True
    command = [*fit_command(), *configure(cell, updates, folder, samples, batch_size), "--ckpt_path", "last"]
    with (place / "output.log").open("wb") as output:
        env = environment(1, 0)
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=env).returncode
    if status != 0:
        print(f"{cell.name} failed: see {place / 'output.log'}", flush=True)
        return False
    (last,) = place.glob("version_*/checkpoints/last.ckpt")  # a run stopped early leaves a version without
    run = last.parents[1]
    generator = load_generator(last).eval()
    result = judge.measure(in_passes(generator.images))
    timing = json.loads((run / "report.json").read_text())["timing"]
    result["values"] |= {
        "updates": updates, "seconds": timing["seconds_per_step"], "memory": timing["peak_memory_gib"]
    }  # fmt: skip
    torch.save(result, place / "result.pt")
    shutil.rmtree(run / "checkpoints")
    print(f"{cell.name}: {result['values']}", flush=True)
    return True


def write_report(folder: Path, judge: Judge) -> None:
    """results.json, results.md and pictures.png of the cells that are there."""
    rows, table, views = [], [], {}
    names = {"steps_25": "teacher, 25 steps", "steps_1": "teacher, 1 step", "start": f"start, at {START}"}
    named = {title: judge.teacher[name] for name, title in names.items()}
    groups = {title: [found] for title, found in named.items()}
    for method, (title, _, _) in METHODS.items():
        paths = [folder / Cell(method, seed).name / "result.pt" for seed in SEEDS]
        groups[title] = [torch.load(path, weights_only=True) for path in paths if path.is_file()]
    for title, found in groups.items():
        values = [one["values"] | judge.among_the_teachers(one["features"]) for one in found]
        rows += [{"method": title, "seed": seed, **one} for seed, one in enumerate(values)]
        cells = [_spread([one[name] for one in values if name in one], name) for name in COLUMNS]
        table.append([title, str(len(found)), *cells])
        if found:
            views[title] = found[0]["pictures"].numpy()
    write_text_atomically(folder / "results.json", json.dumps(rows, indent=1) + "\n")
    text = "\n".join(markdown_table(["method", "seeds", *COLUMNS.values()], table))
    write_text_atomically(folder / "results.md", text + "\n")
    save_png(labelled_grid(views, judge.captions[:SHOWN], columns=1, least_size=96), folder / "pictures.png")


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
    add("--output", type=Path, default=Path("outputs/methods"))
    add("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(words)
    folder = (options.output / f"{options.updates}x{options.batch_size}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    conditions = [one.split("=", 1) for one in options.only]
    cells = [Cell(method, seed) for seed in SEEDS for method in METHODS]
    cells = [cell for cell in cells if all(str(getattr(cell, key)) == value for key, value in conditions)]
    judge, whole, samples = Judge(folder), True, folder.parent / "teacher-samples"
    for cell in () if options.report_only else cells:
        if METHODS[cell.method][2]:
            draw_samples(samples)
        costs = [
            operations(name, folder, samples, options.batch_size) for name in ("swiftbrush", cell.method)
        ]
        updates = max(1, round(options.updates * costs[0] / costs[1]))
        whole &= run_cell(cell, updates, judge, folder, samples, options.batch_size)
        write_report(folder, judge)
    write_report(folder, judge)
    missing = [cell.name for cell in cells if not (folder / cell.name / "result.pt").is_file()]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells; missing: {', '.join(missing) or 'none'}")
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
