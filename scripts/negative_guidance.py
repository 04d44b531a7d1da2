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
from collections.abc import Callable
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
from callbacks.metrics.negative import REMOVAL_CASES, ClipScoreNegative, NegativeRemovalRate, RemovalCase
from callbacks.metrics.reference import ReferenceStatistics
from datamodules.prompts import EVAL_CAPTIONS, read_prompts
from lightning_modules.generator import OneStepGenerator, load_generator
from lightning_modules.guidance.methods import make_method
from reports.html import plots_page
from reports.plots import Series, line_figure
from reports.sheets import labelled_grid, save_png

BATCH = 50
QUALITY = ("removal_rate", "frechet_distance", "clip_score")
Draw = Callable[[list[str], list[int], list[str]], Tensor]  # prompts, seeds, negatives -> pictures


def scale_list(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(part) for part in text.split(",")]


def drawer(generator: OneStepGenerator, method: str, scale: float) -> Draw:
    """Pictures by one method at one scale."""
    if method == "none":
        return lambda prompts, seeds, _: generator.images(prompts, seeds)
    if method == "cfg":
        return lambda prompts, seeds, negatives: generator.images(
            prompts, seeds, guidance_scale=scale, negative_prompt=negatives
        )
    rule = make_method(method, generator.student, scale)
    return lambda prompts, seeds, negatives: generator.images(
        prompts, seeds, negative_prompt=negatives, negative_method=rule
    )


def contrary_styles(captions: list[str]) -> list[str]:
    """For each caption a style that it does not ask for."""
    styles = ["noto style", "twemoji style"]
    return [
        styles[1] if styles[0] in text else styles[0] if styles[1] in text else styles[i % 2]
        for i, text in enumerate(captions)
    ]


def measure(
    draw: Draw, metrics: list[ImageMetric], prompts: list[str], negatives: list[str], seeds: list[int]
) -> dict[str, dict[str, Any]]:
    """Results of metrics over the pictures of these prompts."""
    for metric in metrics:
        metric.reset()
        if isinstance(metric, (ClipScoreNegative, NegativeRemovalRate)):
            metric.prepare(prompts, negatives=negatives)
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        images = draw(prompts[part], seeds[part], negatives[part])
        places = list(range(start, start + len(images)))
        for metric in metrics:
            metric.update(images, prompts[part], positions=places)
    return {name: result for metric in metrics for name, result in metric.results().items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = [name for name in rows[0] if name not in ("method", "rates")]
    lines = ["| method | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in rows:
        numbers = " | ".join(f"{row[name]:g}" if name == "scale" else f"{row[name]:.3f}" for name in names)
        lines.append(f"| {row['method']} | {numbers} |")
    return "\n".join(lines) + "\n"


def case_table(rows: list[dict[str, Any]]) -> str:
    """Removal rate of each case in each row, in Markdown."""
    heads = [f"{row['method']} {row['scale']:g}" for row in rows]
    lines = ["| prompt, negative prompt | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(rows)]
    for name in rows[0]["rates"]:
        rates = " | ".join(f"{row['rates'][name]:.2f}" for row in rows)
        lines.append(f"| {name.replace(' | ', ', not: ')} | {rates} |")
    return "\n".join(lines) + "\n"


def sweep_picture(
    generator: OneStepGenerator, method: str, scales: list[float], cases: list[RemovalCase]
) -> Image.Image:
    """Rows prompts, columns scales, the same seed in all."""
    prompts, negatives = [case.prompt for case in cases], [case.negative_prompt for case in cases]
    views = {
        f"{scale:g}": drawer(generator, method, scale)(prompts, [0] * len(prompts), negatives)
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


def measure_rows(
    options: argparse.Namespace, generator: OneStepGenerator, removal: NegativeRemovalRate
) -> list[dict[str, Any]]:
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
    styles, caption_seeds = contrary_styles(captions), list(range(len(captions)))
    runs = [("none", 0.0), *((m, s) for m in ("cfg", "nasa", "nag") for s in getattr(options, m))]
    rows = []
    for method, scale in tqdm(runs, unit="row", desc="negative guidance"):
        draw = drawer(generator, method, scale)
        found = measure(draw, pair_metrics, prompts, negatives, seeds)
        price = measure(draw, caption_metrics, captions, styles, caption_seeds)
        rows.append(
            {
                "method": method,
                "scale": scale,
                "removal_rate": found["negative_removal_rate"]["value"],
                "pairs_clip_score": found["clip_score"]["value"],
                "pairs_clip_score_negative": found["clip_score_negative"]["value"],
                "frechet_distance": price["frechet_distance"]["value"],
                "clip_score": price["clip_score"]["value"],
                "rates": found["negative_removal_rate"]["details"]["rates"],
            }
        )
    return rows


def main() -> None:
    options = arguments()
    generator, removal = load_generator(options.model), NegativeRemovalRate(options.cases)
    rows = measure_rows(options, generator, removal)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items() if name != "output"}
    (options.output / "results.json").write_text(
        json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    (options.output / "results.md").write_text(table(rows) + "\n" + case_table(rows), encoding="utf-8")
    for method in ("nasa", "nag"):
        scales = [0.0, *getattr(options, method)]
        picture = sweep_picture(generator, method, scales, removal.cases)
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
