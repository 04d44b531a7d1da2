"""Decoding for image losses: which samples, what gradient, by which decoder, judged by whom."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.metrics.clip_features import ClipExtractor
from common.errors import UserError
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.image_losses.base import ImageLoss
from lightning_modules.image_losses.clip import ClipLoss
from lightning_modules.image_losses.schedules import LinearWeight
from lightning_modules.image_losses.terms import ImageLossSettings, ImageTerms, check_judges, chosen_samples
from lightning_modules.networks.loading import load_parts
from tests.tiny_judges import clip_settings, copied_clip, tiny_decoder

PROMPTS = ["a red cat", "a blue dog", "a green cup"]


class Brightness(ImageLoss):
    """All that a new loss needs."""

    name = "brightness"
    logged = ("mean",)

    def load(self) -> None:
        self.calls: list[int] = []

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.calls.append(len(images))
        assert len(images) == len(prompts) and images.min() >= 0 and images.max() <= 1
        mean = images.flatten(1).mean(1)
        self.diagnostics = {"mean": mean.detach()}
        self.truncated_prompts += 1  # of all updates; what is logged is that of one
        return mean


def latents(size: int = 3) -> Tensor:
    return torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def random(indices: list[int], step: int = 0) -> StepRandom:
    return StepRandom(0, step, torch.tensor(indices))


# --- which samples


@pytest.mark.parametrize(("size", "cap"), [(8, 3), (7, 7), (6, 1), (12, 5)])
def test_subset_is_small_unbiased_and_the_same_in_any_split(size: int, cap: int) -> None:
    values = torch.arange(size, dtype=torch.float64) ** 2
    sums, seen = [], torch.zeros(size)
    for step in range(600):
        rows, shares = chosen_samples(random(list(range(size)), step), size, cap)
        assert len(rows) == cap
        sums.append((shares * values[rows]).sum())
        seen[rows] += 1
        split: list[tuple[int, float]] = []
        for first in range(0, size, 3):  # micro-batches or processes of three
            part = list(range(first, min(first + 3, size)))
            inner, portions = chosen_samples(random(part, step), size, cap)
            assert len(inner) <= -(-3 * cap // size) + 1
            split += [(first + r, float(p) * len(part) / size) for r, p in zip(inner, portions)]
        assert [row for row, _ in split] == rows
        torch.testing.assert_close(torch.tensor([p for _, p in split], dtype=torch.float64), shares)
    assert (seen > 0).all()
    spread = torch.stack(sums).std() / 600**0.5
    assert abs(torch.stack(sums).mean() - values.mean()) <= 4 * spread + 1e-9


def test_without_cap_it_is_the_mean() -> None:
    rows, shares = chosen_samples(random([4, 5, 6]), 12, None)
    assert rows == [0, 1, 2] and shares.tolist() == pytest.approx([1 / 3] * 3)


def test_a_capped_micro_batch_may_hold_none(tiny_sd: Path) -> None:
    """Then nothing is decoded, the term is zero with a gradient of zero, and all names are there."""
    loss = Brightness(1.0)
    terms = ImageTerms(ImageLossSettings([loss], images_per_update=1), load_parts(tiny_sd))
    names, total = [], 0.0
    for row in range(3):
        x0 = latents()[row : row + 1].requires_grad_()
        found, numbers = terms.judge(x0, [PROMPTS[row]], random([row]), 3, 10)
        names.append(sorted(numbers))
        gradient = torch.autograd.grad(found["brightness"], x0)[0]
        assert bool(gradient.any()) == bool(found["brightness"] != 0)
        total += found["brightness"].item() / 3
    assert loss.calls == [1] and names[0] == names[1] == names[2]
    whole, _ = terms.judge(latents(), PROMPTS, random([0, 1, 2]), 3, 10)
    assert total == pytest.approx(float(whole["brightness"]), rel=1e-5)


# --- terms


def test_weights_follow_the_step_and_zero_decodes_nothing(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Brightness(LinearWeight(1.0, 0.0, steps=4))
    terms = ImageTerms(ImageLossSettings([loss]), load_parts(tiny_sd))
    decoded: list[int] = []
    decode = terms.decoder.decode
    monkeypatch.setattr(terms.decoder, "decode", lambda x: decoded.append(len(x)) or decode(x))  # type: ignore[func-returns-value]
    values = []
    for step in range(6):
        found, numbers = terms.judge(latents(), PROMPTS, random([0, 1, 2], step), 3, 100)
        assert numbers["weight_brightness"] == pytest.approx(max(0, 1 - step / 4))
        assert numbers.get("truncated_prompts_brightness", 0) == (step < 4)
        values.append(float(found.get("brightness", 0.0)))
        if step < 4:
            assert values[-1] == pytest.approx(float(numbers["mean_brightness"]) * (1 - step / 4), rel=1e-6)
    assert decoded == [3] * 4 == loss.calls and values[4:] == [0, 0] and values[0] > values[3] > 0


def test_gradient_at_the_latents_by_finite_differences(tiny_sd: Path, tiny_clip: Path) -> None:
    """Through decoder, resizing, normalisation and CLIP, in float64."""
    terms = ImageTerms(clip_settings(tiny_clip, images_per_update=2), load_parts(tiny_sd)).double()
    x0 = latents().double().requires_grad_()

    def value(x: Tensor) -> Tensor:
        return terms.judge(x, PROMPTS, random([0, 1, 2]), 3, 10)[0]["clip"]

    gradient = torch.autograd.grad(value(x0), x0)[0]
    way = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4)).double()
    with torch.no_grad():
        slope = (value(x0 + 1e-5 * way) - value(x0 - 1e-5 * way)) / 2e-5
    torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-4, atol=1e-9)
    assert gradient.abs().max() > 1e-4
    assert (gradient.flatten(1).norm(dim=1) > 0).sum() == 2
    assert all(p.grad is None and not p.requires_grad for p in terms.parameters())
    assert terms.state_dict() == {}
    assert not any(module.training for module in terms.train().modules())


# --- decoders


def test_tiny_decoder(tiny_sd: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd)
    folder = tiny_decoder(tmp_path / "taesd")
    terms = ImageTerms(ImageLossSettings([Brightness(1.0)], decoder=str(folder)), parts)
    assert type(terms.decoder.vae).__name__ == "AutoencoderTiny"
    x0 = latents().requires_grad_()
    expected = (terms.decoder.vae.decode(x0).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(terms.decoder.decode(x0), expected)
    found, _ = terms.judge(x0, PROMPTS, random([0, 1, 2]), 3, 1)
    assert torch.autograd.grad(found["brightness"], x0)[0].any()


def test_decoders_that_cannot_be(tiny_sd: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_sd)
    other = tiny_decoder(tmp_path / "eight", latent_channels=8)
    with pytest.raises(UserError, match=f"{other} has 8 latent channels, the teacher .* has 4"):
        ImageTerms(ImageLossSettings([Brightness()], decoder=str(other)), parts)
    for path in (tiny_sd / "unet", tmp_path / "nothing"):
        with pytest.raises(UserError, match=f"the decoder {path} can't be loaded"):
            ImageTerms(ImageLossSettings([Brightness()], decoder=str(path)), parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": []}, "at least one"),
        ({"losses": [Brightness(), Brightness()]}, "each once"),
        ({"losses": [Brightness()], "images_per_update": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageLossSettings(**settings)


# --- judges


def test_no_network_judges_what_it_trained(tiny_clip: Path, tmp_path: Path) -> None:
    """By content: a copy under another name is the same judge; another network is not."""
    copy = copied_clip(tiny_clip, tmp_path / "other")
    loss = ClipLoss(str(copy))
    loss.load()
    scorer = SimpleNamespace(extractor=ClipExtractor(tiny_clip))
    check_judges([loss], [SimpleNamespace(), scorer])
    (tmp_path / "renamed").symlink_to(copy)
    for judge in (
        SimpleNamespace(extractor=ClipExtractor(tmp_path / "renamed")),
        SimpleNamespace(metrics=[scorer, SimpleNamespace(extractor=ClipExtractor(copy))]),
    ):
        with pytest.raises(UserError, match="the clip loss uses the network by which SimpleNamespace scores"):
            check_judges([loss], [judge])
