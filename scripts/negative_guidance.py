"""What negative prompts do to a one-step student: no guidance, CFG, NASA and NAG over their scales.

    python scripts/negative_guidance.py                           bundled student and cases
    python scripts/negative_guidance.py --images 8 --captions 32  a quick look

For each method and scale, on the cases of ``assets/removal_cases.jsonl`` (prompt, unwanted feature, its
detector): ``negative_removal_rate``, ``clip_score`` and ``clip_score_negative`` of their pictures, the same
seeds for all; and on held-out captions, each with the style that it does not name as negative prompt (the two
in turn where it names none): ``frechet_distance`` and ``clip_score``, the price in quality.

The bundled cases were chosen without looking at any guided picture: of objects in random order, the first for
six background colours and for each style where the shipped student draws the feature in 40 to 60 of its first
100 pictures and the detector is right on the real pictures. Another student needs others.

Writes results.json, results.md, sweep_nasa.png and sweep_nag.png (rows prompts, columns scales), and
plot_nasa.html and plot_nag.html (the camera above a plot saves it as PNG).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.frechet import FrechetDistance
from callbacks.metrics.measure import measure_pictures
from callbacks.metrics.negative import REMOVAL_CASES, ClipScoreNegative, NegativeRemovalRate, RemovalCase
from callbacks.metrics.reference import ReferenceStatistics
from datamodules.evaluation_sets import EvaluationSet
from datamodules.prompts import read_prompts
from datamodules.sources import EVAL_CAPTIONS
from lightning_modules.drawing import Drawer, Recipe, model_drawer
from reports.html import plots_page
from reports.plots import Series, line_figure
from reports.sheets import labelled_grid, save_png

BATCH = 50
METHODS = ("cfg", "nasa", "nag")
QUALITY = ("removal_rate", "frechet_distance", "clip_score")
PAIRS = {
    "removal_rate": "negative_removal_rate", "pairs_clip_score": "clip_score",
    "pairs_clip_score_negative": "clip_score_negative",
}  # fmt: skip


def scale_list(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(part) for part in text.split(",")]


def drawer(
    model: str, method: str, scale: float, prompts: list[str], negatives: list[str], seeds: list[int]
) -> Drawer:
    """Pictures of these prompts by one method at one scale; 0 is off."""
    recipe = Recipe(model, negative_guidance=method, negative_scale=scale) if scale else Recipe(model)
    return model_drawer(recipe, prompts, seeds, negatives, torch.device("cpu"))


def contrary_styles(captions: list[str]) -> list[str]:
    """For each caption a style that it does not ask for."""
    styles = ["noto style", "twemoji style"]
    return [
        styles[1] if styles[0] in text else styles[0] if styles[1] in text else styles[i % 2]
        for i, text in enumerate(captions)
    ]


def table(rows: list[dict[str, Any]], cases: bool = False) -> str:
    """Markdown: a row for each method and scale; with `cases` their removal rates, a column for each."""
    if cases:
        head = ["prompt, negative prompt", *(f"{row['method']} {row['scale']:g}" for row in rows)]
        lines = [
            [name.replace(" | ", ", not: "), *(f"{row['rates'][name]:.2f}" for row in rows)]
            for name in rows[0]["rates"]
        ]
    else:
        names = [*PAIRS, "frechet_distance", "clip_score"]
        head = ["method", "scale", *names]
        lines = [
            [row["method"], f"{row['scale']:g}", *(f"{row[name]:.3f}" for name in names)] for row in rows
        ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sweep_picture(model: str, method: str, scales: list[float], cases: list[RemovalCase]) -> Image.Image:
    """Rows prompts, columns scales, the same seed in all."""
    prompts, negatives = [case.prompt for case in cases], [case.negative_prompt for case in cases]
    places = list(range(len(cases)))
    views: dict[str, Tensor] = {
        f"{scale:g}": drawer(model, method, scale, prompts, negatives, [0] * len(cases)).draw(places)
        for scale in scales
    }
    labels = [f"{case.prompt}  |  not: {case.negative_prompt}" for case in cases]
    return labelled_grid(views, labels, columns=1, least_size=64)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="assets/emoji-sd-swiftbrush", help="checkpoint or folder (default: %(default)s)")
    add("--cases", default=REMOVAL_CASES, help="JSON Lines file (default: %(default)s)")
    add("--clip", default="assets/emoji-clip", help="the CLIP that decides (default: %(default)s)")
    add("--reference", default="assets/cache/emoji-reference.safetensors")
    add("--images", type=int, default=100, help="pictures of each case (default: %(default)s)")
    add("--captions", type=int, default=1024, help="held-out captions for quality (default: %(default)s)")
    nasa = "0.1,0.25,0.3,0.4,0.5,0.75,1,1.25,1.5"
    add("--nasa", type=scale_list, default=nasa, help="scales (default: %(default)s)")
    add("--nag", type=scale_list, default="2,4,8", help="scales (default: %(default)s)")
    add("--cfg", type=scale_list, default="1.5,2.5", help="scales, 1 is off (default: %(default)s)")
    add("--output", type=Path, default=Path("outputs/negative_guidance"))
    return parser.parse_args()


def measure_rows(options: argparse.Namespace, removal: NegativeRemovalRate) -> list[dict[str, Any]]:
    """One row for each method and scale, the same seeds for all."""
    pair_metrics: list[ImageMetric] = [removal, ClipScore(), ClipScoreNegative()]
    caption_metrics: list[ImageMetric] = [FrechetDistance(), ClipScore()]
    extractor, reference = ClipExtractor(options.clip), ReferenceStatistics.load(options.reference)
    for metric in pair_metrics + caption_metrics:
        metric.bind(extractor, reference)
    pairs = [(case.prompt, case.negative_prompt) for case in removal.cases for _ in range(options.images)]
    prompts, negatives = (list(column) for column in zip(*pairs, strict=True))
    seeds = list(range(options.images)) * len(removal.cases)
    captions = read_prompts(EVAL_CAPTIONS)[: options.captions]
    styles = contrary_styles(captions)
    rows = []
    runs = [("none", 0.0), *((m, s) for m in METHODS for s in getattr(options, m))]
    for method, scale in tqdm(runs, unit="row", desc="negative guidance"):
        draw = drawer(options.model, method, scale, prompts, negatives, seeds).draw
        found = measure_pictures(draw, EvaluationSet("pairs", prompts, seeds, negatives), pair_metrics, BATCH)
        numbers = list(range(len(captions)))
        draw = drawer(options.model, method, scale, captions, styles, numbers).draw
        price = measure_pictures(draw, EvaluationSet("captions", captions, numbers), caption_metrics, BATCH)
        row: dict[str, Any] = {"method": method, "scale": scale}
        row |= {name: found[metric]["value"] for name, metric in PAIRS.items()}
        row |= {name: price[name]["value"] for name in ("frechet_distance", "clip_score")}
        rows.append(row | {"rates": found["negative_removal_rate"]["details"]["rates"]})
    return rows


def main() -> None:
    options = arguments()
    removal = NegativeRemovalRate(options.cases)
    rows = measure_rows(options, removal)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items() if name != "output"}
    (options.output / "results.json").write_text(
        json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    text = table(rows) + "\n" + table(rows, cases=True)
    (options.output / "results.md").write_text(text, encoding="utf-8")
    for method in ("nasa", "nag"):
        picture = sweep_picture(options.model, method, [0.0, *getattr(options, method)], removal.cases)
        save_png(picture, options.output / f"sweep_{method}.png")
        own = [row for row in rows if row["method"] in ("none", method)]
        curves = [Series(name, [(row["scale"], row[name]) for row in own]) for name in QUALITY]
        plots = [line_figure(curve.name, [curve], x_name="scale") for curve in curves]
        (options.output / f"plot_{method}.html").write_text(plots_page(method, plots), encoding="utf-8")
    print(table(rows))
    print(f"All in {options.output}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
