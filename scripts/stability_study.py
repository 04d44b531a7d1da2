"""Is a random guidance scale steadier than a fixed one? PG-SB (arXiv 2412.02687) on the bundled models.

    python scripts/stability_study.py                          all cells; stopped at any moment, it goes on
    python scripts/stability_study.py --workers 2 --only backbone=epsilon
    python scripts/stability_study.py --long                   2,000 updates of 48 prompts a cell: hours
    python scripts/stability_study.py --report-only            table and plot of what is there

A cell is a short `fit`: `configs/experiment/emoji_pgsb.yaml` but for backbone, rule of the guidance scale,
seed, a short average of the student, and adapters on attention and feed-forward layers only, which all
backbones have. Three backbones by four rules by two seeds, and on the first backbone two rules more that
randomise one score only. After every quarter of the updates the student draws 256 held-out captions.
All cells have the same settings; none was tuned. The student starts where its backbone's schedule has the
noise of Stable Diffusion's timestep 625.

Several of these may run at once on one output folder: a cell belongs to the process that holds its lock. A
cell that was killed goes on from its last checkpoint; a finished one is never run again. Cells whose backbone
is not there, and others not run, are shown as missing. Writes results.json, results.md and stability.html.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from diffusers import DDIMScheduler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.measure import evaluate_model
from callbacks.metrics.reference import ReferenceStatistics
from commands.sweeping.trial_process import TrialProcess, environment, fit_command, read_values
from datamodules.prompts import EVAL_CAPTIONS, read_prompts
from lightning_modules.generator import make_generator
from lightning_modules.networks.loading import asset_path, load_parts
from reports.html import plots_page
from reports.plots import Series, line_figure

CONFIG = "configs/experiment/emoji_pgsb.yaml"
BACKBONES = {"epsilon": "assets/emoji-sd", "v": "assets/emoji-sd-v", "pixart": "assets/emoji-pixart"}
TITLES = {"epsilon": "UNet, epsilon-prediction", "v": "UNet, v-prediction", "pixart": "PixArt transformer"}
RANDOM = {"class_path": "UniformGuidance", "init_args": {"low": 0.5, "high": 4.0}}
# name: κ of the teacher, κ of the fake score (None: the same draw)
RULES: dict[str, tuple[Any, Any]] = {
    "fixed 2": (2.0, None), "fixed 4.5": (4.5, None), "fixed 7.5": (7.5, None), "U(0.5, 4)": (RANDOM, None),
    "U in teacher, 4.5 in fake": (RANDOM, 4.5), "4.5 in teacher, U in fake": (4.5, RANDOM),
}  # fmt: skip
GRID = list(RULES)[:4]
ABLATION = ["fixed 4.5", *list(RULES)[4:], "U(0.5, 4)"]
ABLATED = "epsilon"
SEEDS = (0, 1)
CAPTIONS = 256
CLIP, REFERENCE = "assets/emoji-clip", "assets/cache/emoji-reference.safetensors"
METRICS = ("val/frechet_distance", "val/clip_score")
POINTS = 4
POLL = 0.5  # seconds
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


@dataclass(frozen=True)
class Cell:
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


def all_cells() -> list[Cell]:
    """Backbone by backbone, and seed by seed, so that what is there can be compared."""
    cells = []
    for backbone in BACKBONES:
        rules = [*GRID, *ABLATION[1:-1]] if backbone == ABLATED else GRID
        cells += [Cell(backbone, rule, seed) for seed in SEEDS for rule in rules]
    return cells


@lru_cache
def start_timestep(folder: str) -> int:
    """The timestep of a backbone's schedule with the noise of Stable Diffusion's 625: nearest in log σ/α."""
    tables = [
        DDIMScheduler.from_pretrained(asset_path(path), subfolder="scheduler").alphas_cumprod.double()
        for path in (BACKBONES[ABLATED], folder)
    ]
    log_ratios = [((1 - table) / table).log() for table in tables]
    return int((log_ratios[1] - log_ratios[0][625]).abs().argmin())


def changes(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """What the cell's configuration has instead of the common one."""
    teacher, fake = RULES[cell.rule]
    folder = BACKBONES[cell.backbone]
    interval = options.updates // POINTS
    return {
        "seed_everything": cell.seed,
        "model": {"init_args": {
            "teacher": folder, "start_timestep": start_timestep(folder), "lora": {"targets": TARGETS},
            "ema_decay": 0.95,
            "objective": {"init_args": {"guidance_scale": teacher, "fake_guidance_scale": fake}},
        }},
        "data": {"init_args": {"batch_size": options.batch_size, "eval_size": CAPTIONS}},
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


@dataclass
class Study:
    """The folder of a study and the cells that run."""

    options: argparse.Namespace
    running: dict[int, tuple[Cell, TrialProcess, IO[str]]] = field(default_factory=dict)
    failed: set[Cell] = field(default_factory=set)

    def folder(self, cell: Cell) -> Path:
        """Of one cell."""
        return Path(self.options.output) / f"{self.options.updates}x{self.options.batch_size}" / cell.name

    def start_of(self, backbone: str) -> float | None:
        """`start_distance` of a backbone of which a cell is finished; measured once."""
        cells = [cell for cell in all_cells() if cell.backbone == backbone and self.result(cell) is not None]
        if not cells:
            return None
        path = self.folder(cells[0]).parent / f"start-{backbone}.json"
        if not path.is_file():
            path.write_text(json.dumps(start_distance(BACKBONES[backbone])), encoding="utf-8")
        return float(json.loads(path.read_text(encoding="utf-8")))

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell has measured."""
        path = self.folder(cell) / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def start(self, cell: Cell, worker: int) -> bool:
        """Run a cell unless it is finished, failed here, cannot be run, or another process has it."""
        folder = self.folder(cell)
        if cell in self.failed or not asset_path(BACKBONES[cell.backbone]).is_dir():
            return False
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        if self.result(cell) is not None:
            lock.close()
            return False
        if not (folder / "version_0" / "checkpoints" / "last.ckpt").is_file():
            shutil.rmtree(folder / "version_0", ignore_errors=True)  # too little to go on from
        config = folder / "cell.yaml"
        config.write_text(yaml.safe_dump(changes(cell, self.options), sort_keys=False), encoding="utf-8")
        files = ["--config", str(asset_path(CONFIG)), "--config", str(config)]
        command = [*fit_command(), *files, "--ckpt_path", "last"]
        process = TrialProcess.start(
            command, folder.parent, cell.name, METRICS[0], environment(self.options.workers, worker)
        )
        self.running[worker] = cell, process, lock
        return True

    def start_next(self, waiting: list[Cell], worker: int) -> bool:
        """Run the first of the waiting cells that can be run; takes it and those before it from the list."""
        while waiting:
            if self.start(waiting.pop(0), worker):
                return True
        return False

    def finish(self, worker: int) -> None:
        """Keep the result of a cell that has ended."""
        cell, process, lock = self.running.pop(worker)
        if process.status() != 0:
            self.failed.add(cell)
            tqdm.write(f"{cell.name} failed: {process.error()}")
        else:
            values = {name: read_values(process.folder / "metrics.csv", name) for name in METRICS}
            text = json.dumps({"values": values, "seconds": round(process.seconds, 1)}, indent=1)
            partial = self.folder(cell) / "result.json.partial"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.rename(partial.with_suffix(""))
            shutil.rmtree(process.folder / "checkpoints")  # a hundred megabytes
        lock.close()

    def run(self, cells: list[Cell]) -> None:
        """Work through the cells; stopped by Ctrl-C, it stops those that run."""
        waiting = list(cells)
        with tqdm(total=len(cells), unit="cell", desc="stability", dynamic_ncols=True) as bar:
            try:
                while waiting or self.running:
                    ended = [w for w, (_, process, _) in self.running.items() if process.status() is not None]
                    for worker in ended:
                        self.finish(worker)
                        write_report(self)
                    free = [worker for worker in range(self.options.workers) if worker not in self.running]
                    started = [worker for worker in free if self.start_next(waiting, worker)]
                    if ended or started:
                        bar.n = sum(self.result(cell) is not None for cell in cells)
                        bar.set_postfix_str(", ".join(cell.name for cell, _, _ in self.running.values()))
                    time.sleep(POLL if self.running else 0)
            finally:
                for _, process, _ in self.running.values():
                    process.stop_and_wait(60)


def write_report(study: Study) -> None:
    """results.json, results.md and stability.html of the cells that are there."""
    cells = all_cells()
    folder = Path(study.options.output) / f"{study.options.updates}x{study.options.batch_size}"
    found = {cell: study.result(cell) for cell in cells}
    rows = [{**vars(cell), **(found[cell] or {"values": None})} for cell in cells]
    starts = {backbone: study.start_of(backbone) for backbone in BACKBONES}
    settings = {
        "updates": study.options.updates,
        "batch_size": study.options.batch_size,
        "captions": CAPTIONS,
        "starts": starts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, "rows": rows}, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    panels = {TITLES[name]: (name, GRID) for name in BACKBONES}
    panels[f"Which score is random ({TITLES[ABLATED]})"] = (ABLATED, ABLATION)
    tables, plots = [], []
    for title, (backbone, rules) in panels.items():
        curves = {rule: curve(found, backbone, rule) for rule in rules}
        tables.append(f"## {title}\n\n{table(curves, settings, starts[backbone])}")
        lines = [line(rule, points, starts[backbone]) for rule, points in curves.items()]
        plots.append(line_figure(f"{title}: frechet_distance", lines))
    (folder / "results.md").write_text("\n".join(tables), encoding="utf-8")
    page = plots_page("Stability", [plot for plot in plots if plot is not None])
    (folder / "stability.html").write_text(page, encoding="utf-8")


def curve(found: dict[Cell, Any], backbone: str, rule: str) -> list[tuple[int, list[float]]]:
    """Update, and the distance of each seed that is there, over one cell's points."""
    results = [found[Cell(backbone, rule, seed)] for seed in SEEDS]
    values = [result["values"][METRICS[0]] for result in results if result is not None]
    return [(int(step), [one[step] for one in values]) for step in (values[0] if values else {})]


def line(rule: str, points: list[tuple[int, list[float]]], start: float | None) -> Series:
    """A rule's line in the plot, from the start that all share; without points if no cell was run."""
    if not points or start is None:
        return Series(f"{rule} (missing)")
    points = [(0, [start]), *points]
    spread = [(min(ys), max(ys)) for _, ys in points]
    return Series(rule, [(float(x), statistics.mean(ys)) for x, ys in points], spread=spread)


def table(
    curves: dict[str, list[tuple[int, list[float]]]], settings: dict[str, Any], start: float | None
) -> str:
    """Mean (lowest to highest) of the seeds in Markdown; cells that were not run are "missing"."""
    quarter = settings["updates"] // POINTS
    steps = [quarter * (i + 1) for i in range(POINTS)]
    lines = ["| κ | seeds | " + " | ".join(f"update {step}" for step in steps) + " |",
             "|---|---:|" + "---:|" * POINTS]  # fmt: skip
    for rule, points in curves.items():
        seeds = len(points[0][1]) if points else 0
        texts = ["missing"] * POINTS
        if points:
            texts = [f"{statistics.mean(ys):.2f} ({min(ys):.2f}–{max(ys):.2f})" for _, ys in points]
        lines.append(f"| {rule} | {seeds} of {len(SEEDS)} | " + " | ".join(texts) + " |")
    before = "" if start is None else f"\nBefore any update: {start:.2f}.\n"
    return "\n".join(lines) + "\n" + before


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line says; exit status 1 if a cell failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--updates", type=int, default=100, help="of each cell (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="prompts per update (default: %(default)s)")
    add("--long", action="store_true", help="2,000 updates of 48 prompts")
    add("--workers", type=int, default=1, help="cells at once, each on its share of the cores")
    add("--only", action="append", default=[], metavar="FIELD=VALUE", help="backbone, rule or seed")
    add("--output", default="outputs/stability")
    add("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(words)
    if options.long:
        options.updates, options.batch_size = 2000, 48
    study, cells = Study(options), [cell for cell in all_cells() if cell.matches(options.only)]
    if not options.report_only:
        study.run(cells)
    write_report(study)
    missing = [cell.name for cell in cells if study.result(cell) is None]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells; missing: {', '.join(missing) or 'none'}")
    sys.exit(1 if study.failed else 0)


if __name__ == "__main__":
    main()
