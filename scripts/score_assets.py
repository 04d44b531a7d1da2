"""Score the bundled models on held-out captions: the numbers of assets/README.md.

    python scripts/fetch_emoji.py
    PYTHONPATH=. python scripts/score_assets.py [--count 512] [--output outputs/scores]

For real held-out pictures, the teacher (25 DDIM steps, guidance 4.5) and the shipped student (1 step), all
judged by the scoring CLIP ``assets/emoji-clip``:

* retrieval R@1: how often a picture is closest to its own caption among 64;
* object, style, background: zero-shot choice by CLIP of the object (among 375) and the style (among 2), the
  rest of the description being given; background by the colour of the corners. Style and background only
  where the caption names it;
* how often each style and background is drawn when the caption names neither.

Also writes a picture of each (captions in the order of ``assets/eval_captions.txt``).
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from callbacks.metrics.clip_features import ClipExtractor
from datamodules.pictures import BACKGROUNDS, STYLES, EvaluationPictures, PictureKey
from lightning_modules.generator import load_generator
from lightning_modules.networks.loading import load_parts
from lightning_modules.pipelines import multistep_images

GROUP = 64
Draw = Callable[[list[str], list[int]], Tensor]


def normalized(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def retrieval(images: Tensor, texts: Tensor) -> float:
    """Share of pictures closest to their own caption in groups of 64; features [N, D], normalised."""
    hits = [
        (a @ b.T).argmax(1) == torch.arange(GROUP) for a, b in zip(images.split(GROUP), texts.split(GROUP))
    ]
    return torch.cat(hits).float().mean().item()


def background(images: Tensor) -> Tensor:
    """Index of the nearest background colour [N], by the median of the four corners (4x4 pixels each)."""
    corners = torch.stack(
        [images[..., y, x] for y in (slice(4), slice(-4, None)) for x in (slice(4), slice(-4, None))], 1
    )
    colour = corners.flatten(3).permute(0, 2, 1, 3).flatten(2).median(dim=2).values
    return torch.cdist(colour, torch.tensor(list(BACKGROUNDS.values())).float() / 255).argmin(dim=1)


def choice(
    features: Tensor, keys: list[PictureKey], field: str, options: list[str], clip: ClipExtractor
) -> Tensor:
    """Whether each picture is closest to the true one of descriptions that differ in one field: [N]."""
    kinds = sorted({replace(key, **{field: ""}) for key in keys}, key=str)
    right = torch.zeros(len(keys), dtype=torch.bool)
    for kind in kinds:
        places = [i for i, key in enumerate(keys) if replace(key, **{field: ""}) == kind]
        texts = normalized(
            clip.text_features([describe(replace(kind, **{field: option})) for option in options])
        )
        wanted = torch.tensor([options.index(getattr(keys[i], field)) for i in places])
        right[places] = (features[places] @ texts.T).argmax(1) == wanted
    return right


def describe(key: PictureKey) -> str:
    return f"{key.object}, {key.style} style, on a {key.background} background"


def judge(images: Tensor, source: EvaluationPictures, clip: ClipExtractor) -> dict[str, float]:
    """All scores of pictures [N, 3, H, W] that were drawn for the first N captions."""
    count = len(images)
    keys, captions = source.keys[:count], source.captions[:count]
    features = normalized(torch.cat([clip.image_features(part) for part in images.split(GROUP)]))
    texts = normalized(
        torch.cat([clip.text_features(captions[i : i + GROUP]) for i in range(0, count, GROUP)])
    )
    ground_right = background(images) == torch.tensor(
        [list(BACKGROUNDS).index(key.background) for key in keys]
    )
    named_style = torch.tensor([" style" in text for text in captions])
    object_right = choice(features, keys, "object", source.source.objects, clip)
    style_right = choice(features, keys, "style", list(STYLES), clip)
    named_ground = torch.tensor([" background" in text for text in captions])
    return {
        "images": count,
        "retrieval_r1_of_64": retrieval(features, texts),
        "clip_score": (features * texts).sum(-1).mean().item(),
        "object": object_right.float().mean().item(),
        "style": style_right[named_style].float().mean().item(),
        "background": ground_right[named_ground].float().mean().item(),
    }


def frequencies(draw: Draw, source: EvaluationPictures, clip: ClipExtractor) -> dict[str, dict[str, float]]:
    """Shares of styles and backgrounds over one picture of every object, for captions that name neither."""
    captions = [f"a picture of a {name}" for name in source.source.objects]
    images = torch.cat([draw(captions[i : i + GROUP], list(range(i, min(i + GROUP, len(captions)))))
                        for i in range(0, len(captions), GROUP)])  # fmt: skip
    features, grounds = (
        normalized(torch.cat([clip.image_features(part) for part in images.split(GROUP)])),
        background(images).tolist(),
    )
    seen = [
        PictureKey(name, STYLES[0], list(BACKGROUNDS)[ground])
        for name, ground in zip(source.source.objects, grounds)
    ]
    first = choice(features, seen, "style", list(STYLES), clip)
    chosen = [0 if is_first else 1 for is_first in first.tolist()]
    return {
        "style": {name: Counter(chosen)[i] / len(chosen) for i, name in enumerate(STYLES)},
        "background": {name: Counter(grounds)[i] / len(grounds) for i, name in enumerate(BACKGROUNDS)},
    }


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
    scores = {"real pictures": judge(source.pictures(0, arguments.count), source, clip)}
    captions = source.captions[: arguments.count]
    for name, draw in sets.items():
        images = torch.cat(
            [draw(captions[i : i + GROUP], list(range(i, i + GROUP))) for i in range(0, len(captions), GROUP)]
        )
        save_image(images[:GROUP], arguments.output / f"{name.split(',')[0]}.png", nrow=16)
        scores[name] = judge(images, source, clip) | {"unnamed": frequencies(draw, source, clip)}  # type: ignore[operator]
        print(name, json.dumps(scores[name], indent=1))
    (arguments.output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
