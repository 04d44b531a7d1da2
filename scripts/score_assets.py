"""Score the bundled models on held-out captions: the numbers of assets/README.md.

    python scripts/fetch_emoji.py
    python scripts/score_assets.py [--count 512] [--output outputs/scores]

For real held-out pictures, the teacher (25 DDIM steps, guidance 4.5) and the shipped student (1 step), all
judged by the scoring CLIP ``assets/emoji-clip``:

* retrieval R@1: how often a picture is closest to its own caption among 64;
* object, style, background: zero-shot choice by CLIP of the object (among 375) and the style (among 2), the
  rest of the description being given; background by the colour of the corners. Style and background only
  where the caption names it;
* how often each style and background is drawn when the caption names neither;
* of real pictures, GenEval's twin (``emoji_geneval``), which shows how far its judge can be trusted.

Also writes a picture of each (captions in the order of ``assets/eval_captions.txt``).
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.emoji_geneval import EmojiTaskAccuracy
from callbacks.metrics.negative import background_colours
from datamodules.pictures import BACKGROUNDS, STYLES, EmojiPictures, EvaluationPictures, PictureKey
from lightning_modules.generator import load_generator
from lightning_modules.networks.loading import load_parts
from lightning_modules.pipelines import multistep_images

GROUP = 64
Draw = Callable[[list[str], list[int]], Tensor]


def features(function: Callable[..., Tensor], items: Sequence[str] | Tensor) -> Tensor:
    """Normalised features [N, D] of texts or pictures, some at a time."""
    parts = [function(items[i : i + GROUP]) for i in range(0, len(items), GROUP)]
    return F.normalize(torch.cat(parts), dim=-1)


def draw_all(draw: Draw, captions: list[str]) -> Tensor:
    """A picture of each caption, some at a time; seed i belongs to caption i."""
    seeds = list(range(len(captions)))
    parts = [slice(i, i + GROUP) for i in range(0, len(captions), GROUP)]
    return torch.cat([draw(captions[part], seeds[part]) for part in parts])


def retrieval(images: Tensor, texts: Tensor) -> float:
    """Share of pictures closest to their own caption in groups of 64; features [N, D], normalised."""
    hits = [
        (a @ b.T).argmax(1) == torch.arange(GROUP) for a, b in zip(images.split(GROUP), texts.split(GROUP))
    ]
    return torch.cat(hits).float().mean().item()


def choice(
    pictures: Tensor, keys: list[PictureKey], field: str, options: list[str], clip: ClipExtractor
) -> Tensor:
    """Whether each picture (its features) is closest to its own of descriptions that differ in one field."""
    right = torch.zeros(len(keys), dtype=torch.bool)
    for kind in {replace(key, **{field: ""}) for key in keys}:
        places = [i for i, key in enumerate(keys) if replace(key, **{field: ""}) == kind]
        others = [replace(kind, **{field: option}) for option in options]
        texts = [f"{key.object}, {key.style} style, on a {key.background} background" for key in others]
        wanted = torch.tensor([options.index(getattr(keys[i], field)) for i in places])
        right[places] = (pictures[places] @ features(clip.text_features, texts).T).argmax(1) == wanted
    return right


def judge(images: Tensor, source: EvaluationPictures, clip: ClipExtractor) -> dict[str, float]:
    """All scores of pictures [N, 3, H, W] that were drawn for the first N captions."""
    keys, captions = source.keys[: len(images)], source.captions[: len(images)]
    pictures, texts = features(clip.image_features, images), features(clip.text_features, captions)
    right = {
        "object": choice(pictures, keys, "object", source.source.objects, clip),
        "style": choice(pictures, keys, "style", list(STYLES), clip),
        "background": torch.tensor(
            [key.background == colour for key, colour in zip(keys, background_colours(images))]
        ),
    }
    named = {name: torch.tensor([f" {name}" in text for text in captions]) for name in right}
    named["object"][:] = True
    return {
        "images": len(images),
        "retrieval_r1_of_64": retrieval(pictures, texts),
        "clip_score": (pictures * texts).sum(-1).mean().item(),
        **{name: found[named[name]].float().mean().item() for name, found in right.items()},
    }


def frequencies(draw: Draw, source: EvaluationPictures, clip: ClipExtractor) -> dict[str, dict[str, float]]:
    """Shares of styles and backgrounds over one picture of every object, for captions that name neither."""
    names = source.source.objects
    images = draw_all(draw, [f"a picture of a {name}" for name in names])
    colours = background_colours(images)
    seen = [PictureKey(name, STYLES[0], colour) for name, colour in zip(names, colours)]
    first = choice(features(clip.image_features, images), seen, "style", list(STYLES), clip)
    return {
        "style": {name: (first == (name == STYLES[0])).float().mean().item() for name in STYLES},
        "background": {name: colours.count(name) / len(colours) for name in BACKGROUNDS},
    }


def twin_of_real_pictures(source: EmojiPictures, clip: ClipExtractor) -> dict[str, float]:
    """GenEval's twin with the artwork for pictures; what a prompt leaves open is chosen at random."""
    metric, rng = EmojiTaskAccuracy(), random.Random("twin")
    keys = [
        PictureKey(
            entry["object"],
            entry["style"] or rng.choice(STYLES),
            entry["background"] or rng.choice(list(BACKGROUNDS)),
        )
        for entry in metric.entries
    ]
    prompts = [entry["prompt"] for entry in metric.entries]
    metric.bind(clip)
    metric.prepare(prompts, [entry["tag"] for entry in metric.entries])
    metric.update(source.composite(keys), prompts, None, range(len(keys)))
    return {name: result["value"] for name, result in metric.results().items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count", type=int, default=512, help="captions, a multiple of 64 (default: %(default)s)"
    )
    parser.add_argument("--clip", default="assets/emoji-clip")
    parser.add_argument("--teacher", default="assets/emoji-sd")
    parser.add_argument("--student", default="assets/emoji-sd-swiftbrush", help="'' leaves the student out")
    parser.add_argument("--output", type=Path, default=Path("outputs/scores"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    source, clip, parts = EvaluationPictures(), ClipExtractor(arguments.clip), load_parts(arguments.teacher)
    sets: dict[str, Draw] = {
        "teacher, 25 steps": lambda prompts, seeds: multistep_images(parts, prompts, seeds)
    }
    if arguments.student:
        sets["student, 1 step"] = load_generator(arguments.student).images
    scores: dict[str, Any] = {"real pictures": judge(source.pictures(0, arguments.count), source, clip)}
    scores["real pictures"] |= twin_of_real_pictures(source.source, clip)
    captions = source.captions[: arguments.count]
    for name, draw in sets.items():
        images = draw_all(draw, captions)
        save_image(images[:GROUP], arguments.output / f"{name.split(',')[0]}.png", nrow=16)
        scores[name] = judge(images, source, clip) | {"unnamed": frequencies(draw, source, clip)}
        print(name, json.dumps(scores[name], indent=1))
    (arguments.output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
