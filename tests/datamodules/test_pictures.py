"""Captioned pictures: splits, captions, compositing, and batches that are functions of the step."""

import random
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datamodules.pictures import (
    BACKGROUNDS,
    STYLES,
    EmojiPictures,
    EvaluationPictures,
    PictureDataModule,
    PictureKey,
    caption,
)
from tests.fake_emoji import OBJECTS, make_artwork

MANY = [
    PictureKey(f"object {n}", style, back) for n in range(300) for style in STYLES for back in BACKGROUNDS
]


@pytest.fixture(scope="module")
def artwork(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_artwork(tmp_path_factory.mktemp("artwork") / "emoji"))


# Splits


def test_splits_are_disjoint_and_complete(artwork: str) -> None:
    source = EmojiPictures(artwork)
    parts = {split: source.keys(split) for split in ("held_out", "a", "b")}
    every = [key for keys in parts.values() for key in keys]
    assert len(every) == len(set(every)) == len(OBJECTS) * 2 * 8
    assert source.keys("a", "b") == [
        key for key in source.keys("held_out", "a", "b") if key.split != "held_out"
    ]


def test_a_combination_is_held_out_in_both_styles_and_in_a_fifth_of_cases() -> None:
    by_pair: dict[tuple[str, str], set[bool]] = {}
    for key in MANY:
        by_pair.setdefault((key.object, key.background), set()).add(key.split == "held_out")
    assert all(len(answers) == 1 for answers in by_pair.values())
    held_out = sum(True in answers for answers in by_pair.values()) / len(by_pair)
    assert held_out == pytest.approx(0.2, abs=0.03)  # 2,400 pairs: a standard deviation is 0.008
    trained = [key.split for key in MANY if key.split != "held_out"]
    assert trained.count("a") / len(trained) == pytest.approx(0.5, abs=0.04)


def test_split_is_a_function_of_the_names() -> None:
    """Bundled weights and captions were made with these very splits."""
    names = ["apple", "bear", "cat", "dog"]
    splits = [PictureKey(name, "noto", colour).split for name in names for colour in ("white", "red", "blue")]
    assert splits == ["held_out", "a", "a", "a", "held_out", "b", "held_out", "a", "b", "b", "held_out", "b"]


def test_training_data_never_hold_held_out_pictures(artwork: str) -> None:
    halves = {}
    for split in ("all", "a", "b"):
        data = PictureDataModule(artwork, split)
        data.setup()
        halves[split] = set(data.keys)
    held_out = set(EmojiPictures(artwork).keys("held_out"))
    assert halves["a"] | halves["b"] == halves["all"] and not halves["a"] & halves["b"]
    assert held_out and not held_out & halves["all"]


# Captions


def test_style_and_background_are_left_out_in_three_of_ten_captions() -> None:
    rng = random.Random(0)
    captions = [(key, caption(key, rng)) for key in MANY]
    styles = [f"{key.style} style" in text for key, text in captions]
    backgrounds = [f"on a {key.background} background" in text for key, text in captions]
    # 4,800 draws: a standard deviation is 0.007
    assert np.mean(styles) == pytest.approx(0.7, abs=0.03)
    assert np.mean(backgrounds) == pytest.approx(0.7, abs=0.03)
    both = np.mean([a and b for a, b in zip(styles, backgrounds, strict=True)])
    assert both == pytest.approx(0.49, abs=0.03)  # independently
    assert all(key.object in text for key, text in captions)
    other = {style: next(s for s in STYLES if s != style) for style in STYLES}
    assert not any(other[key.style] in text for key, text in captions)


def test_word_order_varies_and_articles_are_right() -> None:
    rng = random.Random(0)
    texts = {caption(PictureKey("apple", "noto", "red"), rng) for _ in range(300)}
    assert {"apple", "an apple, noto style, on a red background", "an apple, on a red background, noto style",
            "noto style, an apple, on a red background", "a picture of an apple"} <= texts  # fmt: skip
    assert not any("a apple" in text or text.startswith(",") or ",," in text for text in texts)
    assert "a bear" in {caption(PictureKey("bear", "noto", "red"), rng) for _ in range(100)}


# Pictures


def test_compositing_is_alpha_blending(artwork: str) -> None:
    keys = [PictureKey("cat", "noto", "red"), PictureKey("owl", "twemoji", "white")]
    pictures = EmojiPictures(artwork).composite(keys)
    assert pictures.shape == (2, 3, 16, 16) and pictures.dtype == torch.float32
    for key, picture in zip(keys, pictures, strict=True):
        rgba = np.asarray(Image.open(Path(artwork) / key.style / f"{key.object}.png"), dtype=np.float64) / 255
        alpha = rgba[..., 3:]
        expected = alpha * rgba[..., :3] + (1 - alpha) * np.array(BACKGROUNDS[key.background]) / 255
        np.testing.assert_allclose(picture.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_transparent_artwork_shows_the_background(tmp_path: Path) -> None:
    folder = make_artwork(tmp_path / "emoji", ["cat"], size=4)
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(folder / "noto" / "cat.png")
    picture = EmojiPictures(str(folder)).composite([PictureKey("cat", "noto", "yellow")])
    expected = torch.tensor(BACKGROUNDS["yellow"]).view(1, 3, 1, 1) / 255
    torch.testing.assert_close(picture, expected.expand(1, 3, 4, 4))


# Evaluation


def test_evaluation_pictures_are_held_out_and_fixed(artwork: str) -> None:
    first, second = EvaluationPictures(artwork, 20), EvaluationPictures(artwork, 12)
    assert len(first) == 20 and all(key.split == "held_out" for key in first.keys)
    assert len(set(first.keys)) == 20
    assert second.keys == first.keys[:12]
    assert first.captions == EvaluationPictures(artwork, 20).captions
    assert all(key.object in text for key, text in zip(first.keys, first.captions, strict=True))
    assert torch.equal(first.pictures(5, 9), first.source.composite(first.keys[5:9]))


def test_too_few_held_out_pictures(artwork: str) -> None:
    with pytest.raises(UserError, match="only .* held-out pictures .* 1024 wanted"):
        EvaluationPictures(artwork)


def test_missing_artwork_names_the_script(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run python scripts/fetch_emoji.py"):
        EmojiPictures(str(tmp_path))
    with pytest.raises(UserError, match="data.split is 'c'"):
        PictureDataModule(split="c")


# Batches


def batches(artwork: str, count: int, first: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """The first batches of a run that starts at step `first`."""
    data = PictureDataModule(artwork, batch_size=6, **settings)
    data.trainer = SimpleNamespace(global_step=first)  # type: ignore[assignment]
    data.setup()
    return list(islice(iter(data.train_dataloader()), count))


def test_batches_depend_on_seed_and_step_only(artwork: str) -> None:
    whole, tail = batches(artwork, 5), batches(artwork, 2, first=3)
    for batch, again in zip(whole[3:], tail, strict=True):
        assert batch["captions"] == again["captions"] and batch["step"] == again["step"]
        assert torch.equal(batch["pictures"], again["pictures"]) and torch.equal(
            batch["index"], again["index"]
        )
    assert [batch["step"] for batch in whole] == [0, 1, 2, 3, 4]
    assert len({tuple(batch["captions"]) for batch in whole}) == 5
    assert batches(artwork, 1, seed=1)[0]["captions"] != whole[0]["captions"]


def test_captions_and_pictures_belong_together(artwork: str) -> None:
    data = PictureDataModule(artwork, "a")
    data.setup()
    for batch in batches(artwork, 3, split="a"):
        keys = [data.keys[i] for i in batch["index"].tolist()]
        assert torch.equal(batch["pictures"], data.source.composite(keys))
        assert all(
            key.object in text and key.split == "a" for key, text in zip(keys, batch["captions"], strict=True)
        )
