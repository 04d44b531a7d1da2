"""Is a random guidance scale steadier than a fixed one? PG-SB (arXiv 2412.02687) on the bundled models.

    python scripts/stability_study.py                          all cells; stopped at any moment, it goes on
    python scripts/stability_study.py --workers 2 --only backbone=epsilon
    python scripts/stability_study.py --equal-means            500 updates of 4 prompts, three seeds
    python scripts/stability_study.py --long                   2,000 updates of 48 prompts a cell: hours
    python scripts/stability_study.py --report-only            table and plot of what is there

A cell is a short `fit`: `configs/experiment/emoji_pgsb.yaml` but for backbone, rule of the guidance scale,
seed, a short average of the student, and adapters on attention and feed-forward layers only, which all
backbones have. Three backbones by four rules by two seeds, and on the first backbone two rules more that
randomise one score only. After every quarter of the updates the student draws 256 held-out captions.
All cells have the same settings; none was tuned. The student starts where its backbone's schedule has the
noise of Stable Diffusion's timestep 625.

`--equal-means` asks what is random when the mean is not: κ = 2.25 in both scores, U(0.5, 4), whose mean that
is, in both or in one of them; on the first backbone.

A cell that was stopped goes on from its last checkpoint; a finished one is never run again. Cells whose
backbone is not there, and others not run, are shown as missing. Writes results.json, results.md and
stability.html.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from diffusers import DDIMScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.measure import evaluate_model
from callbacks.metrics.reference import ReferenceStatistics
from commands.sweeping.trial_process import environment, fit_command, read_values
from common.files import write_text_atomically
from datamodules.prompts import read_prompts
from datamodules.sources import EVAL_CAPTIONS
from lightning_modules.generator import make_generator
from lightning_modules.networks.loading import asset_path, load_parts
from reports.html import plots_page
from reports.plots import Series, line_figure
from reports.text import markdown_table

CONFIG = "configs/experiment/emoji_pgsb.yaml"
BACKBONES = {"epsilon": "assets/emoji-sd", "v": "assets/emoji-sd-v", "pixart": "assets/emoji-pixart"}
TITLES = {"epsilon": "UNet, epsilon-prediction", "v": "UNet, v-prediction", "pixart": "PixArt transformer"}
RANDOM = {"class_path": "UniformGuidance", "init_args": {"low": 0.5, "high": 4.0}}
# name: κ of the teacher, κ of the fake score (None: the same draw)
RULES: dict[str, tuple[Any, Any]] = {
    "fixed 2": (2.0, None), "fixed 4.5": (4.5, None), "fixed 7.5": (7.5, None), "U(0.5, 4)": (RANDOM, None),
    "U in teacher, 4.5 in fake": (RANDOM, 4.5), "4.5 in teacher, U in fake": (4.5, RANDOM),
    "fixed 2.25": (2.25, None),
    "U in teacher, 2.25 in fake": (RANDOM, 2.25), "2.25 in teacher, U in fake": (2.25, RANDOM),
}  # fmt: skip
GRID = list(RULES)[:4]
ABLATION = ["fixed 4.5", *list(RULES)[4:6], "U(0.5, 4)"]
EQUAL_MEANS = [*list(RULES)[6:], "U(0.5, 4)"]
ABLATED = "epsilon"
SEEDS, EQUAL_MEANS_SEEDS = (0, 1), (0, 1, 2)
CAPTIONS, POINTS = 256, 4
CLIP, REFERENCE = "assets/emoji-clip", "assets/cache/emoji-reference.safetensors"
METRICS = ("val/frechet_distance", "val/clip_score")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


class Cell(NamedTuple):
    """One run."""

    backbone: str
    rule: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        rule = "".join(c if c.isalnum() or c == "." else "_" for c in self.rule)
        return f"{self.backbone}-{rule.strip('_')}-seed{self.seed}"

    def matches(self, conditions: Sequence[str]) -> bool:
        """Whether it has all these "field=value"."""
        return all(str(getattr(self, key)) == value for key, value in (c.split("=", 1) for c in conditions))


def all_cells(equal_means: bool = False) -> list[Cell]:
    """Backbone by backbone, and seed by seed, so that what is there can be compared."""
    if equal_means:
        return [Cell(ABLATED, rule, seed) for seed in EQUAL_MEANS_SEEDS for rule in EQUAL_MEANS]
    rules = {backbone: list(RULES)[:6] if backbone == ABLATED else GRID for backbone in BACKBONES}
    return [Cell(backbone, rule, seed) for backbone in rules for seed in SEEDS for rule in rules[backbone]]


@lru_cache
def start_timestep(folder: str) -> int:
    """The timestep of a backbone's schedule with the noise of Stable Diffusion's 625: nearest in log σ/α."""
    tables = [
        DDIMScheduler.from_pretrained(asset_path(path), subfolder="scheduler").alphas_cumprod.double()
        for path in (BACKBONES[ABLATED], folder)
    ]
    log_ratios = [((1 - table) / table).log() for table in tables]
    return int((log_ratios[1] - log_ratios[0][625]).abs().argmin())


def changes(cell: Cell, updates: int, batch_size: int) -> dict[str, Any]:
    """What the cell's configuration has instead of the common one."""
    teacher, fake = RULES[cell.rule]
    folder, interval = BACKBONES[cell.backbone], updates // POINTS
    return {
        "seed_everything": cell.seed,
        "model": {"init_args": {
            "teacher": folder, "start_timestep": start_timestep(folder), "lora": {"targets": TARGETS},
            "ema_decay": 0.95,
            "objective": {"init_args": {"guidance_scale": teacher, "fake_guidance_scale": fake}},
        }},
        "data": {"init_args": {"batch_size": batch_size, "eval_size": CAPTIONS}},
        "trainer": {
            "max_steps": interval * POINTS, "val_check_interval": interval,
            "callbacks": [
                {"class_path": "RunCheckpoint", "init_args": {"every_n_steps": interval, "monitor": None}},
                {"class_path": "Evaluation", "init_args": {"final_size": 0, "teacher_rows": False}},
                {"class_path": "SampleGrid", "init_args": {"every_n_steps": interval * POINTS}},
            ],
        },
    }  # fmt: skip


@torch.no_grad()
def start_distance(folder: str) -> float:
    """The distance of a backbone's student before any update: of the teacher's own prediction."""
    metric = FrechetDistance()
    metric.bind(ClipExtractor(asset_path(CLIP)), ReferenceStatistics.load(asset_path(REFERENCE)))
    generator = make_generator(load_parts(folder), start_timestep(folder)).eval()
    captions = read_prompts(EVAL_CAPTIONS)[:CAPTIONS]
    return float(evaluate_model(generator.images, captions, [metric], 64)[metric.name]["value"])


def kept(path: Path) -> Any:
    """What a JSON file says, None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run_cell(cell: Cell, folder: Path, options: argparse.Namespace) -> bool:
    """Run a cell unless it is finished or its backbone is not there; False if it failed."""
    place = folder / cell.name
    if kept(place / "result.json") is not None or not asset_path(BACKBONES[cell.backbone]).is_dir():
        return True
    if not (place / "version_0" / "checkpoints" / "last.ckpt").is_file():
        shutil.rmtree(place / "version_0", ignore_errors=True)  # too little to go on from
    place.mkdir(parents=True, exist_ok=True)
    config = place / "cell.yaml"
    config.write_text(yaml.safe_dump(changes(cell, options.updates, options.batch_size), sort_keys=False))
    command = [
        *fit_command(), "--config", str(asset_path(CONFIG)), "--config", str(config), "--ckpt_path", "last",
        f"--trainer.default_root_dir={folder}", f"--experiment={cell.name}",
    ]  # fmt: skip
    log, began = place / "output.log", time.monotonic()
    with log.open("wb") as output:  # Ctrl-C reaches the cell, too, which then ends with a checkpoint
        env = environment(options.workers, 0)
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=env).returncode
    if status != 0:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        print(f"{cell.name} failed: {' '.join(last)} (see {log})", flush=True)
        return False
    seconds, run = round(time.monotonic() - began, 1), place / "version_0"
    values = {name: read_values(run / "metrics.csv", name) for name in METRICS}
    result = {"values": values, "seconds": seconds}
    write_text_atomically(place / "result.json", json.dumps(result, indent=1) + "\n")
    shutil.rmtree(run / "checkpoints")  # a hundred megabytes
    print(f"{cell.name}: {seconds:.0f} s", flush=True)
    return True


def start_of(backbone: str, folder: Path) -> float:
    """`start_distance` of a backbone, measured once."""
    path = folder / f"start-{backbone}.json"
    if not path.is_file():
        write_text_atomically(path, json.dumps(start_distance(BACKBONES[backbone])))
    return float(kept(path))


def write_report(folder: Path, options: argparse.Namespace) -> None:
    """results.json, results.md and stability.html of the cells that are there."""
    found = {cell: kept(folder / cell.name / "result.json") for cell in all_cells(options.equal_means)}
    there = {cell.backbone for cell, result in found.items() if result is not None}
    starts = {backbone: start_of(backbone, folder) for backbone in sorted(there)}
    settings = {
        "updates": options.updates, "batch_size": options.batch_size, "captions": CAPTIONS, "starts": starts
    }  # fmt: skip
    rows = [{**cell._asdict(), **(result or {"values": None})} for cell, result in found.items()]
    text = json.dumps({"settings": settings, "rows": rows}, indent=1, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "results.json", text + "\n")
    steps = [options.updates // POINTS * (i + 1) for i in range(POINTS)]
    title = f"Which score is random ({TITLES[ABLATED]})"
    if options.equal_means:
        panels = {title: (ABLATED, EQUAL_MEANS)}
    else:
        panels = {TITLES[name]: (name, GRID) for name in BACKBONES} | {title: (ABLATED, ABLATION)}
    seeds = len({cell.seed for cell in found})
    lines: list[str] = []
    figures = []
    for title, (backbone, rules) in panels.items():
        curves = {rule: distances(found, backbone, rule, steps) for rule in rules}
        start = starts.get(backbone)
        lines += [f"## {title}", "", *table(curves, steps, seeds), ""]
        lines += [] if start is None else [f"Before any update: {start:.2f}.", ""]
        series = [line(rule, points, steps, start) for rule, points in curves.items() if points and start]
        figures += [figure] if (figure := line_figure(f"{title}: frechet_distance", series)) else []
    write_text_atomically(folder / "results.md", "\n".join(lines))
    write_text_atomically(folder / "stability.html", plots_page("Stability", figures))


def distances(found: dict[Cell, Any], backbone: str, rule: str, steps: list[int]) -> list[list[float]]:
    """The distance of each seed that is there, for each step; empty if no cell was run."""
    there = [result for cell, result in found.items() if (cell.backbone, cell.rule) == (backbone, rule)]
    results = [result for result in there if result]
    return [[one["values"][METRICS[0]][str(step)] for one in results] for step in steps] if results else []


def table(curves: dict[str, list[list[float]]], steps: list[int], seeds: int) -> list[str]:
    """Mean (lowest to highest) of the seeds in Markdown; cells that were not run are "missing".

    Its last column is how many runs were farther away at the end than at half.
    """
    cells = []
    for rule, points in curves.items():
        texts = [f"{statistics.mean(ys):.2f} ({min(ys):.2f}–{max(ys):.2f})" for ys in points]
        count = len(points[0]) if points else 0
        worse = [sum(end > half for half, end in zip(points[POINTS // 2 - 1], points[-1]))] if points else []
        texts += [f"{number} of {count}" for number in worse]
        cells.append([rule, f"{count} of {seeds}", *(texts or ["missing"] * (POINTS + 1))])
    return markdown_table(["κ", "seeds", *(f"update {step}" for step in steps), "got worse"], cells)


def line(rule: str, points: list[list[float]], steps: list[int], start: float) -> Series:
    """A rule's line in the plot with the spread of its seeds, from the start that all share."""
    heights = [[start], *points]
    means = [(float(step), statistics.mean(ys)) for step, ys in zip([0, *steps], heights)]
    return Series(rule, means, spread=[(min(ys), max(ys)) for ys in heights])


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line says; exit status 1 if a cell failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--updates", type=int, default=100, help="of each cell (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="prompts per update (default: %(default)s)")
    add("--long", action="store_true", help="2,000 updates of 48 prompts")
    add(
        "--equal-means",
        action="store_true",
        help="500 updates of 4 prompts; which score is random, mean 2.25",
    )
    add("--workers", type=int, default=1, help="cells at once, each on its share of the cores")
    add("--only", action="append", default=[], metavar="FIELD=VALUE", help="backbone, rule or seed")
    add("--output", type=Path, default=Path("outputs/stability"))
    add("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(words)
    if options.long:
        options.updates, options.batch_size = 2000, 48
    if options.equal_means:
        options.updates, options.batch_size = 500, 4
    folder = options.output / f"{options.updates}x{options.batch_size}"
    cells, whole = [cell for cell in all_cells(options.equal_means) if cell.matches(options.only)], [True]
    if not options.report_only:
        with ThreadPoolExecutor(options.workers) as pool:
            whole = list(pool.map(lambda cell: run_cell(cell, folder, options), cells))
    write_report(folder, options)
    missing = [cell.name for cell in cells if kept(folder / cell.name / "result.json") is None]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells; missing: {', '.join(missing) or 'none'}")
    sys.exit(0 if all(whole) else 1)


if __name__ == "__main__":
    main()
