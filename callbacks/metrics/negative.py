"""Whether negative prompts are heeded: ``clip_score_negative`` and ``negative_removal_rate``.

Both need the negative prompt of each picture. It is told by ``prepare(captions, negatives=…)`` for pictures
with positions, else looked up by the prompt in a file that names each prompt once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_features import clip_network
from callbacks.metrics.clip_score import ClipScore, cosines, text_extractor
from common.errors import UserError
from common.hashing import hash_json
from datamodules.pictures import BACKGROUNDS
from datamodules.tables import read_column
from lightning_modules.networks.model_names import asset_path

REMOVAL_CASES = "assets/removal_cases.jsonl"
CORNER = 4  # pixels


class _WithNegatives(ImageMetric):
    """Knows the negative prompt of each picture."""

    _pairs: Sequence[tuple[str, str]] = ()
    _told: Sequence[str] | None = None

    def prepare(
        self,
        captions: Sequence[str],
        groups: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
    ) -> None:
        """Learn the whole evaluation list: the negative prompt of each caption, if it has any."""
        self._told = negatives

    def _negatives(self, prompts: list[str], positions: list[int] | None) -> list[str]:
        if self._told is not None and positions is not None:
            return [self._told[place] for place in positions]
        return [self._partner(prompt) for prompt in prompts]

    def _partner(self, prompt: str) -> str:
        found = {negative for known, negative in self._pairs if known == prompt}
        if len(found) != 1:
            what = f"{len(found)} negative prompts" if found else "no negative prompt"
            raise UserError(
                f"{self.name} knows {what} for {prompt!r}: evaluate on prompt pairs, or name a file that has "
                "each prompt once"
            )
        return found.pop()


class ClipScoreNegative(_WithNegatives, ClipScore):
    """Mean cosine of image features and those of the negative prompt (NegOpt protocol). Lower is better.

    Args:
        pairs: table of prompt pairs with columns ``prompt`` and ``negative_prompt``, for evaluations that do
            not tell the negative prompts.
        model, pretrained, prefix, scale: as for ``clip_score``.
    """

    name = "clip_score_negative"
    version = 1

    def __init__(
        self,
        pairs: str | None = None,
        model: str | None = None,
        pretrained: str | None = None,
        prefix: str | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(model, pretrained, prefix, scale)
        self.pairs_path = pairs
        if pairs is not None:
            columns = (read_column(pairs, name) for name in ("prompt", "negative_prompt"))
            self._pairs = list(zip(*columns, strict=True))

    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        super()._add(features, self._negatives(prompts, positions), positions)

    def settings(self) -> dict[str, Any]:
        """Those of ``clip_score``, and the pairs of the file, by content."""
        return super().settings() | ({"pairs": hash_json({"pairs": self._pairs})} if self._pairs else {})

    def details(self) -> dict[str, Any]:
        """Those of ``clip_score``, and the name of the file of pairs."""
        named = {} if self.pairs_path is None else {"pairs_file": Path(self.pairs_path).name}
        return super().details() | named


@dataclass(frozen=True)
class RemovalCase:
    """An unwanted feature of the pictures of a prompt, and how it is seen.

    Attributes:
        prompt: does not ask for the feature, but draws it often.
        negative_prompt: names the feature.
        detector: ``background`` (by pixels) or ``zero_shot`` (by the scoring CLIP).
        unwanted: the background's colour, or a description of pictures that have the feature.
        alternatives: descriptions of pictures that do not have it; for ``zero_shot``, at least one.
    """

    prompt: str
    negative_prompt: str
    detector: str
    unwanted: str
    alternatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.detector == "background":
            if self.unwanted not in BACKGROUNDS:
                raise UserError(f"the background {self.unwanted!r} is none of {', '.join(BACKGROUNDS)}")
        elif self.detector != "zero_shot":
            raise UserError(f"the detector {self.detector!r} is neither 'background' nor 'zero_shot'")
        elif not self.alternatives:
            raise UserError(f"zero_shot for {self.prompt!r} needs alternatives to {self.unwanted!r}")


def read_cases(path: str | Path) -> list[RemovalCase]:
    """Cases of a JSON Lines file whose objects have the keys of ``RemovalCase``.

    Raises:
        UserError: the file is missing, empty or damaged (the line is named).
    """
    path, cases = asset_path(path), []
    if not path.is_file():
        raise UserError(f"the file of removal cases {path} does not exist")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            cases.append(RemovalCase(**{**entry, "alternatives": tuple(entry.get("alternatives", ()))}))
        except (ValueError, TypeError, AttributeError) as error:  # UserError is a ValueError
            raise UserError(f"{path}, line {number}: {error}") from error
    if not cases:
        raise UserError(f"{path} holds no removal case; write one JSON object a line into it")
    return cases


class SeesBackgrounds(ImageMetric):
    """Knows the background of each counted picture of the present batch, by its corners."""

    _backgrounds: list[str]

    def update(
        self,
        images: Tensor,
        prompts: list[str],
        is_padding: Tensor | None = None,
        positions: Sequence[int] | Tensor | None = None,
    ) -> None:
        """As ``ImageMetric.update``; the pixels are looked at, too."""
        counted = images if is_padding is None else images[~is_padding.to(images.device)]
        self._backgrounds = background_colours(counted)
        super().update(images, prompts, is_padding, positions)


class NegativeRemovalRate(SeesBackgrounds, _WithNegatives):
    """Share of pictures in which the feature that the negative prompt names is not to be seen.

    Args:
        cases: JSON Lines file of ``RemovalCase``; None: the bundled one, made for the bundled models.
        model, pretrained: the CLIP that decides, as for ``clip_score``.
    """

    name = "negative_removal_rate"
    version = 1

    removed: Tensor
    seen: Tensor

    def __init__(
        self, cases: str | None = None, model: str | None = None, pretrained: str | None = None
    ) -> None:
        super().__init__(clip_network(model, pretrained))
        self.cases = read_cases(cases or REMOVAL_CASES)
        self.rates: dict[str, float] = {}
        self._pairs = [(case.prompt, case.negative_prompt) for case in self.cases]

    def setup_states(self, width: int) -> None:
        """Pictures without the feature and pictures seen, for each case."""
        for name in ("removed", "seen"):
            self.add_sum(name, len(self.cases), dtype=torch.long)

    def _add(self, features: Tensor, prompts: list[str], positions: list[int] | None) -> None:
        pairs = list(zip(prompts, self._negatives(prompts, positions), strict=True))
        for pair in dict.fromkeys(pairs):
            if pair not in self._pairs:
                raise UserError(
                    f"{self.name} has no case for prompt and negative prompt {pair}: add one to `cases`"
                )
            number = self._pairs.index(pair)
            places = [i for i, other in enumerate(pairs) if other == pair]
            has_feature = self._detect(self.cases[number], features[places], places)
            self.removed[number] += int((~has_feature).sum())
            self.seen[number] += len(places)

    def _detect(self, case: RemovalCase, features: Tensor, places: list[int]) -> Tensor:
        """Which pictures have the feature, boolean."""
        if case.detector == "background":
            return torch.tensor([self._backgrounds[i] == case.unwanted for i in places])
        extractor = text_extractor(self.extractor, self.name)
        texts = extractor.text_features([case.unwanted, *case.alternatives])
        scores = [cosines(features, text.expand_as(features)) for text in texts]
        return torch.stack(scores).argmax(0) == 0

    def _value(self) -> Tensor:
        self.rates = {
            f"{case.prompt} | {case.negative_prompt}": int(removed) / int(seen)
            for case, removed, seen in zip(self.cases, self.removed, self.seen, strict=True)
            if seen
        }
        return self.removed.sum().double() / self.seen.sum()

    def settings(self) -> dict[str, Any]:
        """What was looked for."""
        return {"cases": hash_json({"cases": [vars(case) for case in self.cases]})}

    def details(self) -> dict[str, Any]:
        """The rate of each case that was seen, too."""
        return super().details() | {"rates": self.rates}


def background_colours(images: Tensor) -> list[str]:
    """Name of the nearest background of each picture [B, 3, H, W] in [0, 1], by the median of its corners."""
    ends = slice(CORNER), slice(-CORNER, None)
    corners = torch.cat([images[..., y, x].flatten(2) for y in ends for x in ends], 2)
    colours = torch.tensor(list(BACKGROUNDS.values())).double() / 255
    nearest = torch.cdist(corners.double().cpu().median(2).values, colours).argmin(1)
    return [list(BACKGROUNDS)[i] for i in nearest.tolist()]
