"""Write the bundled caption files from the object names of the emoji artwork.

    python scripts/make_captions.py     # after scripts/fetch_emoji.py

``assets/captions.txt``: training captions, two of each picture that is not held out, without repeats
and without those that also describe a held-out picture (they name no background).
``assets/eval_captions.txt``: the captions of the 1,024 held-out evaluation pictures, in their order.
``assets/choosing_captions.txt``: captions of the other held-out pictures, two of each but for repeats, none
of them in the other files: a run chooses its best checkpoint by these, and reports on the former.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.pictures import EmojiPictures, EvaluationPictures, caption

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def main() -> None:
    rng = random.Random("captions")
    evaluation = EvaluationPictures()
    held_out = evaluation.captions
    training = {caption(key, rng): None for key in EmojiPictures().keys("a", "b") for _ in range(2)}
    captions = [text for text in training if text not in set(held_out)]
    rng.shuffle(captions)
    others = [key for key in EmojiPictures().keys("held_out") if key not in set(evaluation.keys)]
    choosing = {caption(key, rng): None for _ in range(2) for key in others}
    known = {*held_out, *training}
    choose = [text for text in choosing if text not in known]
    rng.shuffle(choose)
    files = {"captions.txt": captions, "eval_captions.txt": held_out, "choosing_captions.txt": choose}
    for name, lines in files.items():
        (ASSETS / name).write_text("".join(f"{line}\n" for line in lines))
        print(f"{len(lines):6d} captions -> assets/{name}")


if __name__ == "__main__":
    main()
