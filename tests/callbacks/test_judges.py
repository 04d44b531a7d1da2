"""PickScore, ImageReward and the aesthetic score against computations of their own, on miniatures."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
from transformers.image_utils import PILImageResampling

from callbacks.metrics import judges
from callbacks.metrics.aesthetic import HEAD, Aesthetic
from callbacks.metrics.base import ImageMetric
from callbacks.metrics.clip_score import ClipScore
from callbacks.metrics.extractors import FeatureExtractor
from callbacks.metrics.geneval import GenEvalAccuracy
from callbacks.metrics.image_reward import ImageReward
from callbacks.metrics.pick_score import PickScore
from common.errors import UserError
from tests.callbacks.judge_files import blip_towers, judges_folder
from tests.callbacks.networks import pictures, pil

PROMPTS = ["a red dog", "number 1", "a number a dog"]


@pytest.fixture(scope="module")
def folder(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges_folder(tiny_clip, tmp_path_factory.mktemp("judges"))


def value(metric: ImageMetric, images: torch.Tensor) -> float:
    metric.bind()
    metric.update(images, PROMPTS)
    return float(metric.result()["value"])


def test_pick_score_is_the_authors_formula(folder: Path, tiny_clip: Path) -> None:
    images, model = pictures(3, height=20, width=16), CLIPModel.from_pretrained(folder / "PickScore_v1")
    tokens = AutoTokenizer.from_pretrained(tiny_clip)(
        PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    pixels = CLIPImageProcessor.from_pretrained(tiny_clip)([pil(i) for i in images], return_tensors="pt")
    with torch.no_grad():
        found = model(**tokens, **pixels)
    logits = found.logits_per_image  # exp(3) × cosine
    assert value(PickScore(judges=str(folder)), images) == pytest.approx(
        float(logits.diag().mean()), rel=1e-5
    )


def test_aesthetic_is_its_layers_one_after_the_other(folder: Path, tiny_clip: Path) -> None:
    images, model = pictures(3), CLIPModel.from_pretrained(tiny_clip)
    pixels = CLIPImageProcessor.from_pretrained(tiny_clip)([pil(i) for i in images], return_tensors="pt")
    head = nn.Sequential(nn.Linear(16, 6), nn.Dropout(), nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 1))
    stored = torch.load(folder / HEAD, weights_only=True)
    head.load_state_dict({name.removeprefix("layers."): weight for name, weight in stored.items()})
    with torch.no_grad():
        features = model.get_image_features(**pixels).pooler_output
        rating = head.eval()(features / features.norm(dim=-1, keepdim=True)).mean()
    assert value(Aesthetic(judges=str(folder)), images) == pytest.approx(float(rating), rel=1e-5)


def test_image_reward_is_blip_and_its_head(folder: Path) -> None:
    images, (eye, reader) = pictures(3, height=40, width=32), blip_towers()
    stored = torch.load(folder / "ImageReward.pt", weights_only=True)
    head = nn.Sequential(nn.Linear(128, 8), nn.Dropout(), nn.Linear(8, 1))
    head.load_state_dict({n.removeprefix("mlp.layers."): w for n, w in stored.items() if n.startswith("mlp")})
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=PILImageResampling.BICUBIC
    )
    words = AutoTokenizer.from_pretrained(folder / "bert-base-uncased")(
        PROMPTS, padding=True, return_tensors="pt"
    )
    assert words.input_ids[1].tolist() == [2, 6, 10, 3, 0, 0]  # [CLS] number 1 [SEP] and padding
    with torch.no_grad():
        seen = eye(**processor([pil(image) for image in images], return_tensors="pt")).last_hidden_state
        read = reader(words.input_ids, words.attention_mask, encoder_hidden_states=seen).last_hidden_state
        # mean and deviation as in the authors' package (THUDM/ImageReward)
        rewards = (head.eval()(read[:, 0]) - 0.16717362830052426) / 1.0333394966054072
    assert value(ImageReward(judges=str(folder)), images) == pytest.approx(float(rewards.mean()), rel=1e-4)


def test_metrics_of_one_network_see_each_batch_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, images = [], pictures(3)
    metrics = [Aesthetic(judges=str(folder)), PickScore(judges=str(folder)), Aesthetic(judges=str(folder))]
    for metric in metrics:
        metric.bind()
    first = metrics[0].extractor
    through = type(first)._image_features
    monkeypatch.setattr(
        type(first), "_image_features", lambda self, batch: (passes.append(1), through(self, batch))[1]
    )
    for metric in metrics:
        metric.update(images, PROMPTS)
    assert metrics[2].extractor is first and len(passes) == 1
    assert isinstance(first, FeatureExtractor) and ClipScore.name == "clip_score"


@pytest.mark.parametrize(
    ("metric", "lacking", "message"),
    [
        (PickScore, "PickScore_v1", "pick_score: PickScore_v1 is missing; looked for {0}/PickScore_v1. Get "
         "it with `hf download yuvalkirstain/PickScore_v1 --local-dir {0}/PickScore_v1`"),
        (PickScore, "CLIP-ViT-H-14-laion2B-s32B-b79K", "CLIP-ViT-H-14-laion2B-s32B-b79K is missing"),
        (Aesthetic, HEAD, "is missing; looked for {0}/sac+logos+ava1-l14-linearMSE.pth. Get it with `curl"),
        (Aesthetic, "clip-vit-large-patch14", "hf download openai/clip-vit-large-patch14"),
        (ImageReward, "ImageReward.pt", "hf download zai-org/ImageReward ImageReward.pt --local-dir"),
        (ImageReward, "bert-base-uncased", "hf download google-bert/bert-base-uncased"),
        (GenEvalAccuracy, "mask2former-swin-small-coco-instance",
         "Get it with `hf download facebook/mask2former-swin-small-coco-instance --local-dir {0}/mask"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_how_to_get_it(
    metric: type[ImageMetric], lacking: str, message: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(judges, "try_to_load_from_cache", lambda *names: None)
    for path in folder.iterdir():
        if path.name != lacking:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError) as caught:
        metric(judges=str(tmp_path)).bind()  # type: ignore[call-arg]
    assert message.format(tmp_path) in str(caught.value)


def test_damaged_and_foreign_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "head.pth"
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match="aesthetic: .*head.pth can't be read as weights"):
        Aesthetic(str(file), judges=str(folder)).bind()
    for shape, message in [((1, 768), "takes 768 numbers where 16 come"), ((2, 16), "gives 2 numbers")]:
        torch.save({"weight": torch.zeros(shape), "bias": torch.zeros(shape[0])}, file)
        with pytest.raises(UserError, match=message):
            Aesthetic(str(file), judges=str(folder)).bind()
    torch.save({"blip.visual_encoder.cls_token": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="are not those of ImageReward 1.0"):
        ImageReward(str(file), judges=str(folder)).bind()
    shutil.copy(folder / "ImageReward.pt", file)
    assert value(ImageReward(str(file), judges=str(folder)), pictures(3)) != 0
