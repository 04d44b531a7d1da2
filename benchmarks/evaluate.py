"""Where the time of an evaluation goes: drawing, features of pictures and texts, statistics.

    python benchmarks/evaluate.py [--count 2000] [--config configs/eval/emoji.yaml] [--model PATH]

Draws the pictures of the evaluation set once (starting again at its first caption with other seeds where
there are not enough), measures them as `evaluate` does, and prints images per second and the shares.
"""

import argparse
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from callbacks.metrics.clip_features import ClipExtractor  # noqa: E402
from callbacks.metrics.measure import Stopwatch, measure_pictures  # noqa: E402
from callbacks.metrics.reference import framed_reference  # noqa: E402
from commands.evaluate import parse  # noqa: E402
from common.environment import environment, peak_memory_gib  # noqa: E402
from lightning_modules.drawing import Recipe, model_drawer  # noqa: E402
from lightning_modules.networks.loading import asset_path  # noqa: E402


class Timed:
    """Adds up the wall time of a function's calls, GPU work included."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device, self.seconds = function, device, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = self._now()
        result = self.function(*arguments)
        self.seconds += self._now() - start
        return result

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="assets/emoji-sd-swiftbrush")
    parser.add_argument("--config", default=str(ROOT / "configs/eval/emoji.yaml"))
    parser.add_argument("--count", type=int, default=2000, help="pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    options = parse(
        ["--config", arguments.config, "--model", arguments.model, "--output", "unused"], prog="evaluate"
    )
    chosen = options.data.load()
    captions = [chosen.captions[i % len(chosen)] for i in range(arguments.count)]
    recipe = Recipe(arguments.model, arguments.steps, dtype=arguments.dtype)
    drawer = model_drawer(recipe, captions, list(range(arguments.count)), None, device)
    extractor = ClipExtractor(asset_path(options.scoring_clip)) if options.scoring_clip else None
    reference = framed_reference(options.reference, chosen.frame) if options.reference else None
    for metric in options.metrics:
        metric.bind(extractor, reference, device)
        metric.to(device if device.type == "cuda" else "cpu")
    pictures, texts = _timed_features([metric.extractor for metric in options.metrics], device)
    drawer.draw(list(range(min(arguments.batch_size, arguments.count))))  # warm-up
    watch, start = Stopwatch(), time.perf_counter()
    results = measure_pictures(
        drawer.draw,
        captions,
        options.metrics,
        arguments.batch_size,
        drawer.title,
        frame=chosen.frame,
        watch=watch,
    )
    seconds = time.perf_counter() - start
    features = sum(timed.seconds for timed in pictures + texts)
    _print(arguments, drawer.title, seconds, results, {
        "drawing": watch.drawing,
        "features of pictures": sum(timed.seconds for timed in pictures),
        "features of texts": sum(timed.seconds for timed in texts),
        "statistics": watch.measuring + watch.statistics - features,
    })  # fmt: skip


def _timed_features(extractors: list[Any], device: torch.device) -> tuple[list[Timed], list[Timed]]:
    """Put stopwatches around the networks, each once."""
    pictures, texts = [], []
    for extractor in {id(extractor): extractor for extractor in extractors}.values():
        extractor.image_features = Timed(extractor.image_features, device)
        pictures.append(extractor.image_features)
        if hasattr(extractor, "text_features"):
            extractor.text_features = Timed(extractor.text_features, device)
            texts.append(extractor.text_features)
    return pictures, texts


def _print(
    arguments: argparse.Namespace, title: str, total: float, results: dict[str, Any], parts: dict[str, float]
) -> None:
    machine = environment()
    speed = arguments.count / total
    print(f"\n{title}: {arguments.count:,} pictures in {total:.1f} s, {speed:.1f} images/s")
    hardware = machine["gpus"] or machine["processor"]
    print(f"{arguments.device}, {hardware}, {machine['torch_threads']} threads, {date.today()}, "
          f"batch {arguments.batch_size}, {arguments.dtype}, peak {peak_memory_gib():.2f} GiB\n")  # fmt: skip
    print("| part | seconds | share |\n|---|---:|---:|")
    for name, seconds in {**parts, "the rest": total - sum(parts.values())}.items():
        print(f"| {name} | {seconds:.2f} | {100 * seconds / total:.1f} % |")
    print("\n" + ", ".join(f"{name} {result['value']:.4g}" for name, result in results.items()))


if __name__ == "__main__":
    main()
