"""Write the bundled caption files from the object names of the emoji artwork.

    python scripts/make_captions.py     # after scripts/fetch_emoji.py

``assets/captions.txt``: training captions, two of each picture that is not held out, without repeats
and without those that also describe a held-out picture (they name no background).
``assets/eval_captions.txt``: the captions of the 1,024 held-out evaluation pictures, in their order.
``assets/emoji_geneval.jsonl``: prompts of GenEval's twin, 24 of each task, on 40 objects. Where object and
background are both asked for, the two are a pair that no model has seen.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.pictures import BACKGROUNDS, STYLES, EmojiPictures, EvaluationPictures, PictureKey, caption
from datamodules.task_prompts import EMOJI_FILE, EMOJI_TASKS, emoji_prompt

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def geneval_lines(names: list[str], objects: int = 40, of_each_task: int = 24) -> list[str]:
    """The lines of ``emoji_geneval.jsonl``, from all names of objects."""
    rng = random.Random("geneval")
    chosen, lines = rng.sample(names, objects), dict[str, None]()
    for task in EMOJI_TASKS:
        fields, wanted = task.split("_"), len(lines) + of_each_task
        while len(lines) < wanted:
            key = PictureKey(rng.choice(chosen), rng.choice(STYLES), rng.choice(list(BACKGROUNDS)))
            if len(fields) > 1 and "background" in fields and key.split != "held_out":
                continue
            named = {
                field: getattr(key, field) if field in fields else None for field in ("style", "background")
            }
            entry = {"tag": task, "prompt": emoji_prompt(key.object, **named), "object": key.object, **named}
            lines[json.dumps(entry)] = None
    return list(lines)


def main() -> None:
    rng = random.Random("captions")
    EMOJI_FILE.write_text("".join(f"{line}\n" for line in geneval_lines(EmojiPictures().objects)))
    held_out = EvaluationPictures().captions
    training = {caption(key, rng): None for key in EmojiPictures().keys("a", "b") for _ in range(2)}
    captions = [text for text in training if text not in set(held_out)]
    rng.shuffle(captions)
    for name, lines in {"captions.txt": captions, "eval_captions.txt": held_out}.items():
        (ASSETS / name).write_text("".join(f"{line}\n" for line in lines))
        print(f"{len(lines):6d} captions -> assets/{name}")


if __name__ == "__main__":
    main()
