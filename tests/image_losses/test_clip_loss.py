"""The clamped CLIP loss and the networks it sees with."""

import builtins
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.metrics.clip_features import ClipExtractor
from common.errors import UserError
from lightning_modules.image_losses.clip import ClipLoss
from lightning_modules.image_losses.hps import HpsLoss
from lightning_modules.networks.clip_models import OpenClip, load_clip
from tests.tiny_judges import open_clip_network

PROMPTS = ["a red cat", "a blue dog", "a green cup", "a red cup"]


def images(side: int = 24) -> torch.Tensor:
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))


def loaded(loss: ClipLoss) -> ClipLoss:
    loss.load()
    return loss


def test_cosine_is_the_scoring_extractors(tiny_clip: Path) -> None:
    """An independent path to the same numbers, at the CLIP's own size, where only 8-bit rounding differs."""
    scorer = ClipExtractor(tiny_clip)
    pixels = (images(16) * 255).round() / 255
    expected = torch.cosine_similarity(scorer.image_features(pixels), scorer.text_features(PROMPTS))
    loss = loaded(ClipLoss(str(tiny_clip), tau=0.9))
    torch.testing.assert_close(loss(pixels, PROMPTS), 0.9 - expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss.diagnostics["cosine"], expected, rtol=0, atol=1e-5)


def test_the_clamp_is_per_sample_and_not_of_the_mean(tiny_clip: Path) -> None:
    """tau between the cosines: the better samples have loss and gradient zero, the others are pulled."""
    pictures = images().requires_grad_()
    cosine = (0.5 - loaded(ClipLoss(str(tiny_clip), tau=0.5, clamp=False))(pictures, PROMPTS)).detach()
    tau = cosine.sort().values[1:3].mean().item()
    loss = loaded(ClipLoss(str(tiny_clip), tau=tau))
    values = loss(pictures, PROMPTS)
    torch.testing.assert_close(values, torch.relu(tau - cosine))
    gradient = torch.autograd.grad(values.sum(), pictures)[0].flatten(1).norm(dim=1)
    below = cosine < tau
    assert below.sum() == 2
    assert torch.equal(gradient > 0, below) and torch.equal(loss.diagnostics["below_tau"].bool(), below)
    # naive: every sample has a gradient, and values may be negative
    naive = loaded(ClipLoss(str(tiny_clip), tau=tau, clamp=False))(pictures, PROMPTS)
    torch.testing.assert_close(naive, tau - cosine)
    assert (torch.autograd.grad(naive.sum(), pictures)[0].flatten(1).norm(dim=1) > 0).all()


def test_going_downhill_raises_the_cosine(tiny_clip: Path) -> None:
    loss = loaded(ClipLoss(str(tiny_clip), tau=1.0))
    pictures = images().requires_grad_()
    loss(pictures, PROMPTS).sum().backward()
    assert pictures.grad is not None
    before = loss.diagnostics["cosine"]
    with torch.no_grad():
        loss((pictures - 0.5 * pictures.grad).clamp(0, 1), PROMPTS)
    assert (loss.diagnostics["cosine"] > before).all()
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())
    assert loss.state_dict() == {}


def test_long_prompts_are_cut_and_counted(tiny_clip: Path) -> None:
    loss = loaded(ClipLoss(str(tiny_clip)))
    long = ["a red cat " * 20, "a red cat " * 21, "a blue dog", "a cup"]
    with pytest.warns(UserWarning, match="more than the 16 tokens.*told once"):
        loss(images(), long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(images(), long)
    assert loss.truncated_prompts == 4


# --- what can't be used


def test_folder_without_an_image_tower(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text_encoder has no image tower.*clip_text_model"):
        load_clip(str(tiny_sd / "text_encoder"))
    no_processor = tmp_path / "clip"
    shutil.copytree(tiny_clip, no_processor)
    (no_processor / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="can't be loaded.*image processor"):
        load_clip(str(no_processor))
    for path in ("missing", "assets/missing"):  # no hub names: nothing is asked for over the network
        with pytest.raises(UserError, match=f"the CLIP {path} can't be loaded: there is no such folder"):
            load_clip(path)


def test_clip_that_lacks_weights(tiny_clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks the weights vision_model"):
        load_clip(str(folder))


@pytest.mark.parametrize("tau", [float("nan"), 2.0, -1.0])
def test_tau_is_a_cosine(tau: float) -> None:
    with pytest.raises(UserError, match="tau of the clip loss"):
        ClipLoss("folder", tau=tau)


# --- open_clip


def test_open_clip_network(tmp_path: Path) -> None:
    """Against open_clip's own preprocessing of a PNG and its own features."""
    name, file = open_clip_network(tmp_path)
    clip = load_clip(f"open_clip:{name}/{file}")
    assert isinstance(clip, OpenClip) and clip.max_length == 16
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(file))
    model.eval()
    pixels = (images(16) * 255).round() / 255
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(to_pil_image(image)) for image in pixels]))
        texts = model.encode_text(open_clip.get_tokenizer(name)(PROMPTS))
    torch.testing.assert_close(clip.image_features(pixels), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clip.text_features(PROMPTS), texts, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="more than the 16 tokens"):
        clip.text_features(["a red cat " * 20, "a cat"])
    assert clip.truncated_prompts == 1


def test_hps_loss(tmp_path: Path) -> None:
    name, file = open_clip_network(tmp_path)
    loss = loaded(HpsLoss(str(file), "v2.1", tau=0.9, architecture=name))
    pictures = images().requires_grad_()
    values = loss(pictures, PROMPTS)
    cosine = torch.cosine_similarity(
        loss.network.image_features(pictures), loss.network.text_features(PROMPTS)
    )
    torch.testing.assert_close(values, torch.relu(0.9 - cosine))
    assert torch.autograd.grad(values.sum(), pictures)[0].abs().max() > 0
    assert loss.name == "hps" and loss.version == "v2.1" and loss.state_dict() == {}
    with pytest.raises(UserError, match="HPSv2.0 checkpoint .* does not exist: get it .* HPS_v2_compressed"):
        HpsLoss(str(tmp_path / "no.pt"), "v2.0", tau=0.3).load()
    with pytest.raises(UserError, match="choose one of v2.0, v2.1"):
        HpsLoss("x.pt", "2", tau=0.3)
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="can't load"):
        HpsLoss(str(tmp_path / "bad.pt"), "v2.0", tau=0.3, architecture=name).load()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:ViT-B-32", "names no weights"),
        ("open_clip:no-such-network/openai", "can't load"),
        ("open_clip:ViT-B-32/no-such-weights", "can't load"),
    ],
)
def test_open_clip_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_clip(spec)


def test_open_clip_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "open_clip":
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'pip install -e "\.\[openclip\]"'):
        load_clip("open_clip:ViT-B-32/openai")
