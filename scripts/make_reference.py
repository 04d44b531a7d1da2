"""Statistics of the real evaluation pictures in the features of the scoring CLIP, for ``frechet_distance``.

    python scripts/fetch_emoji.py
    python scripts/make_reference.py

Writes assets/cache/emoji-reference.safetensors, and with --captions the captions that belong to it.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from callbacks.metrics.clip_features import ClipExtractor  # noqa: E402
from callbacks.metrics.reference import compute_reference  # noqa: E402
from common.errors import UserError  # noqa: E402
from datamodules.pictures import EvaluationPictures  # noqa: E402


def main() -> int:
    """Make and save the statistics; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data/emoji", help="folder that scripts/fetch_emoji.py wrote")
    parser.add_argument("--scoring-clip", default=str(ROOT / "assets/emoji-clip"), help="CLIP folder")
    parser.add_argument("--count", type=int, default=1024, help="how many pictures")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", default=str(ROOT / "assets/cache/emoji-reference.safetensors"))
    parser.add_argument("--captions", help="write the captions of the pictures here, one a line")
    arguments = parser.parse_args()
    try:
        pictures = EvaluationPictures(arguments.data, arguments.count)
        extractor = ClipExtractor(arguments.scoring_clip)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    source = f"{len(pictures):,} held-out emoji pictures (Noto, Twemoji) on plain backgrounds, 64x64"
    statistics = compute_reference(
        batches(pictures, arguments.batch_size), pictures.captions, extractor, source
    )
    statistics.save(arguments.output)
    if arguments.captions:
        Path(arguments.captions).write_text("\n".join(pictures.captions) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {statistics.num_images} pictures, {extractor.width} features")
    print(f"content hash {statistics.content_hash}")
    return 0


def batches(pictures: EvaluationPictures, batch_size: int) -> Iterator[Tensor]:
    """The pictures in order, as [B, 3, 64, 64] in [0, 1]."""
    for start in range(0, len(pictures), batch_size):
        yield pictures.pictures(start, min(start + batch_size, len(pictures)))


if __name__ == "__main__":
    sys.exit(main())
