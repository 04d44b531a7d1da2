"""Measures of negative prompts: against the plain CLIP score, painted backgrounds and a choice by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.metrics.clip_features import ClipExtractor
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.negative import (
    ClipScoreNegative,
    NegativeRemovalRate,
    background_colours,
    read_cases,
)
from common.errors import UserError
from datamodules.pictures import BACKGROUNDS

PROMPTS, NEGATIVES = ["a red cat", "a dog", "the sun"], ["a dog", "a hill", "red"]


@pytest.fixture(scope="module")
def extractor(tiny_clip: Path) -> ClipExtractor:
    return ClipExtractor(tiny_clip)


def noise(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def painted(colours: list[str]) -> Tensor:
    """Noise on plain backgrounds, a little off the named colours."""
    images = noise(len(colours))
    for image, colour in zip(images, colours, strict=True):
        rgb = torch.tensor(BACKGROUNDS[colour])[:, None, None] / 255
        for edge in (image[:, :5], image[:, -5:], image[:, :, :5], image[:, :, -5:]):
            edge[:] = (rgb + 0.03).clamp(0, 1)
        image[:, 0, 0] = 0.5
    return images


def write_cases(path: Path, cases: list[dict[str, Any]]) -> str:
    path.write_text("\n\n".join(json.dumps(case) for case in cases))
    return str(path)


def case(prompt: str, negative: str, unwanted: str, *alternatives: str) -> dict[str, Any]:
    detector = "zero_shot" if alternatives else "background"
    entry = {"prompt": prompt, "negative_prompt": negative, "detector": detector, "unwanted": unwanted}
    return {**entry, "alternatives": list(alternatives)} if alternatives else entry


def test_negative_clip_score_is_the_score_of_the_negative_prompts(
    extractor: ClipExtractor, tmp_path: Path
) -> None:
    images = noise(3)
    expected = ClipScore()
    expected.bind(extractor)
    expected.update(images, NEGATIVES)
    table = tmp_path / "pairs.csv"
    lines = [f"{a},{b}" for a, b in zip(PROMPTS, NEGATIVES, strict=True)]
    table.write_text("\n".join(["prompt,negative_prompt", *lines]))
    named, told = ClipScoreNegative(str(table)), ClipScoreNegative()
    named.bind(extractor)
    named.update(images, PROMPTS)
    told.bind(extractor)
    told.prepare([*PROMPTS, PROMPTS[0]], negatives=[*NEGATIVES, "again"])
    padded = torch.cat([images, noise(1)])
    told.update(
        padded, [*PROMPTS, "x"], torch.tensor([False, False, False, True]), torch.tensor([0, 1, 2, 2])
    )
    result = expected.result()
    for metric in (named, told):
        assert metric.results()["clip_score_negative"]["value"] == pytest.approx(result["value"], abs=1e-7)
        assert metric.num_images == 3
    other = ClipScore()
    other.bind(extractor)
    other.update(images, PROMPTS)
    assert other.result()["value"] != pytest.approx(result["value"], abs=1e-3)
    with pytest.raises(UserError, match="no negative prompt for 'a tree'"):
        named.update(noise(1), ["a tree"])
    with pytest.raises(UserError, match="knows no negative prompt"):
        ClipScoreNegative().bind(extractor).update(images, PROMPTS)


def test_other_pairs_are_another_score(extractor: ClipExtractor, tmp_path: Path) -> None:
    scores = {}
    for name, negative in [("a", "a dog"), ("b", "the sun"), ("copy of a", "a dog")]:
        table = tmp_path / f"{name}.csv"
        table.write_text(f"prompt,negative_prompt\na red cat,{negative}\n")
        metric = scores[name] = ClipScoreNegative(str(table), prefix="no ")
        metric.bind(extractor)
        metric.update(noise(1), ["a red cat"])
    assert scores["a"].key() != scores["b"].key() and scores["a"].key() == scores["copy of a"].key()
    found = scores["b"].result()["details"]
    assert found["pairs_file"] == "b.csv" and found["pairs"] == scores["b"].key()["pairs"]
    assert found["prefix"] == scores["b"].key()["prefix"] == "no "
    none = ClipScoreNegative()
    none.bind(extractor)
    assert "pairs" not in none.key() and not {"pairs", "pairs_file"} & none.details().keys()


def test_backgrounds_are_named_by_their_pixels() -> None:
    names = list(BACKGROUNDS)
    assert background_colours(painted(names)) == names


def test_removal_by_background(extractor: ClipExtractor, tmp_path: Path) -> None:
    given = [case("a cat", "on white", "white"), case("a dog", "x", "red")]
    cases = write_cases(tmp_path / "cases.jsonl", given)
    metric = NegativeRemovalRate(cases)
    metric.bind(extractor)
    metric.update(painted(["white", "blue", "red"]), ["a cat", "a cat", "a dog"])
    padding = torch.tensor([False, True, False])
    metric.update(painted(["red", "white", "purple"]), ["a cat", "a cat", "a dog"], padding)
    result = metric.results()["negative_removal_rate"]
    assert result["value"] == pytest.approx(3 / 5) and result["num_images"] == 5
    assert result["details"]["rates"] == {"a cat | on white": pytest.approx(2 / 3), "a dog | x": 0.5}
    again = NegativeRemovalRate(cases)
    again.bind(extractor)
    again.restore(metric.snapshot())
    assert again.result()["value"] == result["value"]
    with pytest.raises(UserError, match="no negative prompt for 'a bee'"):
        metric.update(noise(1), ["a bee"])


def test_removal_by_zero_shot_choice_and_two_features_of_one_prompt(
    extractor: ClipExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a red cat", "a dog", "the sun"]
    described, wanted = extractor.text_features(texts), [0, 1, 1, 2, 0, 2, 2, 2]
    features = 3 * described[wanted] + 0.01 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(extractor, "image_features", lambda images: features)
    cases = [case("a cat", "red", *texts), case("a cat", "dog", texts[1], texts[0], texts[2])]
    metric = NegativeRemovalRate(write_cases(tmp_path / "cases.jsonl", cases))
    metric.bind(extractor)
    images = noise(8)
    with pytest.raises(UserError, match="2 negative prompts for 'a cat'"):
        metric.update(images, ["a cat"] * 8)
    metric.prepare(["a cat", "a cat"], negatives=["red", "dog"])
    metric.update(images, ["a cat"] * 8, positions=[0] * 8)
    metric.update(images, ["a cat"] * 8, positions=[1] * 8)
    rates = metric.result()["details"]["rates"]
    assert rates == {"a cat | red": 6 / 8, "a cat | dog": 6 / 8}
    assert metric.result()["value"] == 12 / 16
    metric.reset()
    metric.update(images[:], ["a cat"] * 8, torch.tensor([False] * 4 + [True] * 4), [1] * 8)
    assert metric.result()["value"] == 2 / 4  # of the first four, two look like a dog


def test_the_bundled_cases_are_enough(extractor: ClipExtractor) -> None:
    metric = NegativeRemovalRate()
    assert len(metric.cases) >= 6 and {case.detector for case in metric.cases} == {"background", "zero_shot"}
    metric.bind(extractor)
    for case_ in metric.cases:
        assert case_.unwanted not in case_.prompt and metric._partner(case_.prompt) == case_.negative_prompt


def test_bad_files_of_cases_are_refused(tmp_path: Path) -> None:
    good = case("a cat", "red", "red")
    broken: list[tuple[str, str]] = [
        ("\n \n", "holds no removal case"),
        ("{", "line 1"),
        (json.dumps(good) + "\n" + json.dumps({**good, "colour": 1}), "line 2.*colour"),
        (json.dumps(case("a cat", "pink", "pink")), "background 'pink' is none of"),
        (json.dumps({**good, "detector": "eye"}), "detector 'eye'"),
        (json.dumps({**good, "detector": "zero_shot"}), "needs alternatives"),
    ]
    path = tmp_path / "cases.jsonl"
    for content, message in broken:
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_cases(path)
    with pytest.raises(UserError, match="does not exist"):
        read_cases(tmp_path / "none")
