"""GenEval: whether the objects, counts, colours and places that a prompt names are in its picture.

Ghosh et al. 2023 (arXiv 2310.11513), section 3, by another implementation of the same detector.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from callbacks.metrics.detection import DetectorExtractor, Instance
from callbacks.metrics.task_accuracy import TaskAccuracy
from datamodules.task_prompts import GENEVAL_TASKS, Entry

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Least confidence of an object; counting needs more, so that nothing is counted twice."""
MOST = 16
"""Objects of a class that are looked at."""
OVERLAP = 0.1
"""Share of both objects' sizes by which their centres must lie apart, along each axis."""

Box = tuple[float, float, float, float]
Colours = Callable[[str, list[Instance]], list[str]]
"""The colours of some instances of a class."""


def relations(first: Box, second: Box) -> set[str]:
    """Where the first box lies from the second: left of, right of, above, below, two of these or none.

    The distance of the centres, less a tenth of the sum of the sizes along each axis, must be at least half
    of the whole distance along an axis.
    """
    offset, distance = [], 0.0
    for axis in (0, 1):
        between = (first[axis] + first[axis + 2] - second[axis] - second[axis + 2]) / 2
        sizes = abs(first[axis + 2] - first[axis]) + abs(second[axis + 2] - second[axis])
        reduced = max(abs(between) - OVERLAP * sizes, 0)
        offset.append(reduced if between > 0 else -reduced)
        distance += between**2
    if all(abs(part) < 1e-3 for part in offset):
        return set()
    right, down = (part / distance**0.5 for part in offset)
    names = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {name for name, part in names.items() if part > 0.5}


def shows(wanted: Entry, found: Mapping[str, Sequence[Instance]], colours: Colours) -> bool:
    """Whether a picture shows what its prompt asks for.

    Of each class the most confident instances count, as many as are asked for: all of them must have the
    colour, and lie where they should from all of the group that they are related to.

    Args:
        wanted: the benchmark's line. ``found``: instances by class, the most confident first.
        colours: tells their colours.
    """
    groups: list[list[Instance] | None] = []
    for one in wanted["include"]:
        some = list(found.get(one["class"], ()))[: one["count"]]
        right = len(some) == one["count"]
        if right and "color" in one:
            right = all(colour == one["color"] for colour in colours(one["class"], some))
        if right and "position" in one:
            relation, target = one["position"]
            others = groups[target]
            right = others is not None and all(
                relation in relations(a.box, b.box) for a in some for b in others
            )
        groups.append(some if right else None)
    too_many = any(len(found.get(one["class"], ())) >= one["count"] for one in wanted.get("exclude", ()))
    return None not in groups and not too_many


class GenEvalAccuracy(TaskAccuracy):
    """Share of right pictures in each task, and the mean over the six tasks. Higher is better.

    Args:
        prompts: the benchmark's ``evaluation_metadata.jsonl``.
        detector: folder of the detector (default: ``mask2former-swin-small-coco-instance`` in the folder of
            judges, or the hub's cache). ``clip``: of CLIP ViT-L/14 (default: there, too).
        judges: folder of judges.
        shortest, longest: sides of what the detector sees.
    """

    name = "geneval"
    version = 1
    tasks = GENEVAL_TASKS
    configuration = "configs/eval/geneval.yaml"

    def __init__(
        self,
        prompts: str | None = None,
        detector: str | None = None,
        clip: str | None = None,
        judges: str | None = None,
        shortest: int = 800,
        longest: int = 1333,
    ) -> None:
        super().__init__((DetectorExtractor, detector, clip, judges, shortest, longest), prompts)

    def judge(self, features: Tensor, wanted: list[Entry]) -> list[bool]:
        extractor = self.extractor
        assert isinstance(extractor, DetectorExtractor)
        verdicts = []
        for picture, entry in zip(features, wanted, strict=True):
            least = COUNTING_THRESHOLD if entry["tag"] == "counting" else THRESHOLD
            seen = extractor.detect(picture, least)
            names = {one["class"] for one in [*entry["include"], *entry.get("exclude", [])]}
            found = {name: seen.get(extractor.number_of(name), [])[:MOST] for name in names}

            def colours(name: str, some: list[Instance], picture: Tensor = picture) -> list[str]:
                return extractor.colours(picture, name, some)

            verdicts.append(shows(entry, found, colours))
        return verdicts

    def details(self) -> dict[str, Any]:
        """Thresholds, and what differs from the published protocol."""
        return super().details() | {
            "thresholds": {"object": THRESHOLD, "counting": COUNTING_THRESHOLD, "position": OVERLAP},
            "most_of_a_class": MOST,
            "differs": "detector: the weights of Mask2Former's authors in transformers, the benchmark takes "
            "mmdetection's (same architecture, trained again); CLIP by transformers in fp32",
        }  # fmt: skip
