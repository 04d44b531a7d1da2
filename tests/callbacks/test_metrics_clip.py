"""``clip_score`` against open_clip and transformers, ``hpsv2`` against the formula of its repository."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from callbacks.metrics.clip_features import ClipExtractor, OpenClipExtractor
from callbacks.metrics.clip_score import PRESETS, ClipScore
from callbacks.metrics.hpsv2 import HPSv2
from callbacks.metrics.inception import InceptionExtractor
from common.errors import UserError
from lightning_modules.networks.clip_models import HPS_FILES, OpenClip
from tests.callbacks.networks import inception_file, open_clip_file, pictures, pil

LONG = "a very long prompt about a dog " * 20
PROMPTS = ["a red cat", "A dog, on a hill", "the sun", LONG, "cup", "bee & key"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return open_clip_file(tmp_path_factory.mktemp("open_clip"))


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(48, 48), (40, 64)])
def test_clip_score_is_open_clips(height: int, width: int, network: tuple[str, Path]) -> None:
    images = pictures(6, height=height, width=width)
    model, preprocess = open_clip.create_model_from_pretrained(network[0], pretrained=str(network[1]))
    image_features = model.encode_image(torch.stack([preprocess(pil(image)) for image in images]))
    texts = open_clip.get_tokenizer(network[0])(["A photo depicts " + prompt for prompt in PROMPTS])
    assert texts[3, -1] == 49407  # the long prompt keeps its end token
    text_features = model.encode_text(texts)
    expected = torch.nn.functional.cosine_similarity(image_features, text_features).mean().item()
    metric = ClipScore(network[0], str(network[1]), prefix="A photo depicts ", scale=100).bind()
    metric.update(images[:4], PROMPTS[:4])
    metric.update(images[4:], PROMPTS[4:])
    result = metric.result()
    assert result["value"] == pytest.approx(100 * expected, abs=1e-4) and abs(expected) > 1e-3
    assert result["details"]["truncated_prompts"] == 1 and result["details"]["scale"] == 100
    assert metric.key()["prefix"] == "A photo depicts "


def test_presets_are_the_papers(network: tuple[str, Path]) -> None:
    for preset in PRESETS.values():
        assert preset.pretrained in open_clip.list_pretrained_tags_by_model(preset.model)
    metric = ClipScore("clip_vitg14_photo", pretrained=str(network[1]))
    assert (metric.prefix, metric.scale) == ("A photo depicts ", 1)
    assert metric.spec == (OpenClipExtractor, "ViT-g-14", str(network[1]))
    assert ClipScore("clip_vitb32").prefix == ""
    with pytest.raises(UserError, match="can't load the model 'tiny-open-clip' with the weights 'no-tag'"):
        ClipScore(network[0], "no-tag").bind()
    with pytest.raises(UserError, match="no model is named"):
        ClipScore(pretrained="openai")
    with pytest.raises(UserError, match="scale is 2.5"):
        ClipScore(scale=2.5)


def test_cut_prompts_are_counted_and_keep_their_end(tiny_clip: Path, tmp_path: Path) -> None:
    metric, extractor = ClipScore().bind(ClipExtractor(tiny_clip)), ClipExtractor(tiny_clip)
    metric.update(pictures(6), PROMPTS)
    tokens = AutoTokenizer.from_pretrained(tiny_clip)
    lengths = [len(tokens(prompt).input_ids) for prompt in PROMPTS]
    assert metric.result()["details"]["truncated_prompts"] == sum(n > extractor.max_length for n in lengths)
    assert 0 < metric.num_truncated < 6
    assert "prefix" not in metric.key() and metric.result()["details"]["prefix"] == ""
    with pytest.raises(UserError, match="needs a CLIP, and Inception .* reads no texts"):
        ClipScore().bind(InceptionExtractor(inception_file(tmp_path))).update(pictures(1), ["x"])


def hps_preprocess(image: Tensor, size: int) -> Tensor:
    """HPSv2's transform of one picture: [0, 1], longest side to ``size``, padded, normalised."""
    tensor = F.to_tensor(pil(image))
    scale = size / float(max(tensor.shape[1:]))
    height, width = (round(side * scale) for side in tensor.shape[1:])
    tensor = F.resize(tensor, [height, width], F.InterpolationMode.BICUBIC)
    down, across = size - height, size - width
    tensor = F.pad(tensor, [across // 2, down // 2, across - across // 2, down - down // 2])
    return F.normalize(tensor, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(32, 32), (48, 48), (40, 65), (50, 20)])
def test_hpsv2_is_the_repositorys_formula(height: int, width: int, network: tuple[str, Path]) -> None:
    images = pictures(60, height=height, width=width)
    styles = ["anime"] * 20 + ["photo"] * 40
    prompts = [f"{style} number {i} of {PROMPTS[i % 6]}" for i, style in enumerate(styles)]
    model = open_clip.create_model(network[0], pretrained=str(network[1]), output_dict=True).eval()
    pixels = torch.stack([hps_preprocess(image, 32) for image in images])
    output = model(pixels, open_clip.get_tokenizer(network[0])(prompts))
    scores = torch.diagonal(output["image_features"] @ output["text_features"].T).tolist()
    expected = {}
    for style, part, group in [("anime", scores[:20], 2), ("photo", scores[20:], 4)]:
        means = [np.mean(part[i : i + group]) * 100 for i in range(0, len(part), group)]
        expected[style] = np.mean(means), np.std(means)
    metric = HPSv2("v2.1", str(network[1]), network[0]).bind()
    metric.prepare(prompts, styles)
    for places in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(13):
        metric.update(images[places], [prompts[i] for i in places], positions=places)
    results = metric.results()
    for style, (mean, spread) in expected.items():
        found = results[f"hpsv2/{style}"]
        assert found["value"] == pytest.approx(mean, abs=1e-4)
        assert found["details"]["spread"] == pytest.approx(spread, abs=1e-4) and spread > 0.01
    overall = (expected["anime"][0] + expected["photo"][0]) / 2  # of the styles, whatever their sizes
    assert results["hpsv2"]["value"] == pytest.approx(overall, abs=1e-4)
    assert [r["num_images"] for r in results.values()] == [60, 20, 40]
    assert results["hpsv2"]["details"]["hps_version"] == "v2.1"


def test_hpsv2_without_styles_is_one_mean(network: tuple[str, Path]) -> None:
    images = pictures(6, height=32, width=32)
    metric = HPSv2("v2.0", str(network[1]), network[0]).bind()
    metric.update(images, PROMPTS)
    alone = metric.results()
    assert list(alone) == ["hpsv2"] and alone["hpsv2"]["details"]["spread"] is None
    key = metric.key()
    metric.prepare(PROMPTS)
    assert metric.key() == key  # caches find a value whether or not the prompts have been told
    with pytest.raises(ValueError, match="needs their positions"):
        metric.update(images, PROMPTS)
    with pytest.raises(ValueError, match="6 pictures, but 6 prompts and 5 positions"):
        metric.update(images, PROMPTS, positions=range(5))
    metric.update(images, PROMPTS, positions=range(6))
    assert metric.results()["hpsv2"]["value"] == pytest.approx(alone["hpsv2"]["value"], rel=1e-9)
    snapshot = metric.snapshot()
    metric.reset()
    metric.restore(snapshot)
    assert metric.results()["hpsv2"]["num_images"] == 6
    with pytest.raises(KeyError, match="totals"):
        metric.restore({name: value for name, value in snapshot.items() if name != "totals"})


def test_missing_or_wrong_hps_checkpoints(
    network: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="version 'v2' is unknown: choose one of v2.0, v2.1"):
        HPSv2("v2")
    monkeypatch.setenv("HPS_ROOT", str(tmp_path / "hps"))
    with pytest.raises(UserError, match="looked for .*hps/HPS_v2.1_compressed.pt and the hub.*hf download"):
        HPSv2("v2.1").bind()
    with pytest.raises(UserError, match="looked for .*mine.pt. Get it with"):
        HPSv2("v2.1", str(tmp_path / "mine.pt")).bind()
    (tmp_path / "hps").mkdir()
    shutil.copy(network[1], tmp_path / "hps" / HPS_FILES["v2.0"])
    found = HPSv2("v2.0", architecture=network[0]).bind()
    assert found.extractor.path == tmp_path / "hps" / HPS_FILES["v2.0"]
    with pytest.raises(UserError, match="open_clip can't load the model 'tiny-other'"):
        HPSv2("v2.0", architecture="tiny-other").bind()


def test_weights_trained_with_quick_gelu_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's were, and the library only warns of the other activation."""
    forced: list[bool] = []

    def create(name: str, **options: Any) -> None:
        forced.append(options["force_quick_gelu"])
        raise RuntimeError("no weights here")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    for weights in ("openai", "laion2b_s34b_b79k"):
        with pytest.raises(UserError, match="no weights here"):
            OpenClip("ViT-B-32", weights)
    assert forced == [True, False]
