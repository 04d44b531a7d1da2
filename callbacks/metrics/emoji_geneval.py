"""GenEval's twin for the bundled models: whether object, style and background are those of the prompt.

The judge of object and style is the scoring CLIP, choosing among texts that differ in that one word; that of
the background is the colour of the corners.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from callbacks.metrics.clip_features import clip_network
from callbacks.metrics.clip_score import text_extractor
from callbacks.metrics.negative import SeesBackgrounds
from callbacks.metrics.task_accuracy import TaskAccuracy
from datamodules.pictures import STYLES
from datamodules.task_prompts import EMOJI_FILE, EMOJI_TASKS, Entry, emoji_prompt


class EmojiTaskAccuracy(SeesBackgrounds, TaskAccuracy):
    """Share of pictures that show all that their task is about, and the mean over the tasks.

    Args:
        prompts: JSON Lines file; None: the bundled one. Objects are chosen among those of this file.
        model, pretrained: the CLIP that decides, as for ``clip_score``.
    """

    name = "emoji_geneval"
    version = 1
    tasks = EMOJI_TASKS
    configuration = "configs/eval/emoji_geneval.yaml"

    def __init__(
        self, prompts: str | None = None, model: str | None = None, pretrained: str | None = None
    ) -> None:
        super().__init__(clip_network(model, pretrained), prompts or str(EMOJI_FILE))
        self._texts: dict[str, Tensor] = {}

    def judge(self, features: Tensor, wanted: list[Entry]) -> list[bool]:
        pictures = F.normalize(features.double().cpu(), dim=-1)
        return [
            all(
                self._backgrounds[i] == entry[field]
                if field == "background"
                else self._chosen(pictures[i], entry, field) == entry[field]
                for field in entry["tag"].split("_")
            )
            for i, entry in enumerate(wanted)
        ]

    def _chosen(self, picture: Tensor, entry: Entry, field: str) -> str:
        """The object or style whose description fits the picture's features [D] best."""
        options = STYLES if field == "style" else sorted({entry["object"] for entry in self.entries})
        named = {"thing": entry["object"], "style": entry.get("style"), "background": entry.get("background")}
        name = "thing" if field == "object" else field
        texts = [emoji_prompt(**(named | {name: option})) for option in options]
        if missing := [text for text in texts if text not in self._texts]:
            found = text_extractor(self.extractor, self.name).text_features(missing).double().cpu()
            self._texts |= dict(zip(missing, F.normalize(found, dim=-1)))
        scores = torch.stack([self._texts[text] for text in texts]) @ picture
        return str(options[int(scores.argmax())])
