"""The regression on given pictures."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import UserError
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.image_pairs import ImagePairs, PairRegression, ddim_inversion
from lightning_modules.networks.loading import load_parts, noise_schedule
from lightning_modules.networks.student import load_student
from tests.tiny_distillation import Hooks, adam, distillation, fit
from tests.tiny_judges import NoDistillation


class GaussianTeacher:
    """The exact teacher of latents ~ N(0, deviation^2)."""

    def __init__(self, schedule: NoiseSchedule, deviation: float) -> None:
        self.schedule, self.variance = schedule, deviation**2

    def teacher(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> Prediction:
        alpha, sigma = (value[:, None, None, None] for value in self.schedule.alpha_sigma(t))
        epsilon = sigma * x_t / (alpha**2 * self.variance + sigma**2)
        return Prediction(epsilon, "epsilon", x_t, *self.schedule.alpha_sigma(t))


def test_inversion_of_gaussian_data(tiny_sd: Path) -> None:
    """The ODE scales x0 by the ratio of deviations: z = x0 sqrt(alpha_T^2 s^2 + sigma_T^2) / s."""
    schedule = noise_schedule(load_parts(tiny_sd).scheduler)
    x0 = 2.5 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    nothing = Condition({"none": torch.zeros(3, 1)}, {"none": torch.zeros(1, 1)})
    noise = ddim_inversion(x0, GaussianTeacher(schedule, 2.5), nothing, 400)  # type: ignore[arg-type]
    torch.testing.assert_close(noise, x0 / 2.5, rtol=0.05, atol=0.02)


@pytest.fixture
def pictures(tmp_path: Path) -> ImagePairs:
    """Five pictures, not square, with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(5):
        Image.new("RGB", (24, 20), (40 * number, 10, 200)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "caption": f"a blue cup {number}"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return ImagePairs(str(folder), str(tmp_path / "captions.jsonl"), "file", weight=2.0, inversion_steps=3)


def test_term_and_its_gradient(tiny_sd: Path, pictures: ImagePairs) -> None:
    module = distillation(tiny_sd, image_pairs=pictures)
    module.configure_model()
    assert module.pair_regression is not None
    term = module.pair_regression
    random = StepRandom(0, 3, term.places(0))
    loss = term.loss(module.generator, module.scores, random)
    chosen = (random.uniform("image_pair") * 5).long().tolist()
    condition = module.generator.prompt_encoder.encode([f"a blue cup {i}" for i in chosen])
    colours = torch.tensor([[40 * i, 10, 200] for i in chosen]) / 255
    images = colours[:, :, None, None].expand(-1, -1, 16, 16)
    vae = module.parts.vae
    with torch.no_grad():
        target = vae.encode(images * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
        noise = ddim_inversion(target, module.scores, condition, 3)
    expected = 2.0 * (module.generator.latents(noise, condition) - target).square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in module.scores.parameters())
    assert module.student is not None and any(p.grad is not None for p in module.student.parameters())


def test_shares_of_processes_are_the_whole(tiny_sd: Path, pictures: ImagePairs) -> None:
    """The mean over two processes is the one process's term."""
    module = distillation(tiny_sd)
    module.configure_model()
    values = []
    for processes in (1, 2):
        term = PairRegression(pictures, module.parts, processes)
        parts = [
            term.loss(module.generator, module.scores, StepRandom(0, 1, term.places(rank)))
            for rank in range(processes)
        ]
        values.append(torch.stack(parts).mean())
    torch.testing.assert_close(values[0], values[1])
    with pytest.raises(UserError, match="batch_size is 4: it must be a multiple of the 3 processes"):
        PairRegression(pictures, module.parts, 3)


def test_training_with_pictures_says_so(
    tiny_sd: Path, pictures: ImagePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss falls, and without pictures nothing is said."""
    module = distillation(tiny_sd, NoDistillation(), image_pairs=pictures, student=adam(1e-2))
    losses: list[float] = []
    hooks = Hooks(after_step=lambda m: losses.append(m.trainer.callback_metrics["train/student_pairs"]))
    fit(module, tmp_path, 8, hooks).save_checkpoint(tmp_path / "a.ckpt")
    card = load_student(tmp_path / "a.ckpt").facts
    assert card["trained_on"] == "prompts and 5 captioned pictures, so not image-free"
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    assert "This training is not image-free: it also sees 5 captioned pictures" in capsys.readouterr().out
    fit(distillation(tiny_sd), tmp_path, 1)
    assert "image-free" not in capsys.readouterr().out


def test_settings_that_cannot_be(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weight is 0"):
        ImagePairs("a", "b", weight=0.0)
    with pytest.raises(UserError, match="must be at least 1"):
        ImagePairs("a", "b", batch_size=0)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        (tmp_path / "captions.txt").write_text("a cup\n")
        PairRegression(ImagePairs("nowhere", str(tmp_path / "captions.txt")), load_parts(tiny_sd))
