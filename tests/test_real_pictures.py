"""Real pictures in a training, and the regression on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datamodules.prompts import PromptDataModule
from datamodules.real_pictures import RealPictures, RealPictureSource
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.prediction import Prediction
from lightning_modules.diffusion.randomness import StepRandom
from lightning_modules.diffusion.schedule import NoiseSchedule
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.networks.loading import load_parts, noise_schedule
from lightning_modules.networks.student import load_student
from lightning_modules.objectives.base import REAL_PICTURES, Networks, StudentSample, Terms
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.pair_regression import PairRegression, ddim_inversion
from lightning_modules.objectives.sid_lsg import SiDLSG
from tests.tiny_distillation import PROMPTS, Hooks, adam, distillation, fit, trainer, watch_updates
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
def pictures(tmp_path: Path) -> RealPictures:
    """Five pictures, not square, with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(5):
        Image.new("RGB", (24, 20), (40 * number, 10, 200)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "caption": f"a blue cup {number}"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return RealPictures(str(folder), str(tmp_path / "captions.jsonl"), "file")


def train(
    module: OneStepDistillation, folder: Path, steps: int, real: RealPictures | None, **more: Any
) -> Any:
    """A run with real pictures in its data."""
    L.seed_everything(0, verbose=False)
    data = PromptDataModule(
        PROMPTS, batch_size=4, eval_captions=PROMPTS, eval_size=2, real=real,
        micro_batch_size=more.pop("micro_batch_size", None),
    )  # fmt: skip
    run = trainer(folder, steps, more.pop("callbacks", ()), **more)
    run.fit(module, data)
    return run


@pytest.mark.parametrize("micro", [None, 2])
def test_term_and_its_gradient(
    micro: int | None, tiny_sd: Path, pictures: RealPictures, tmp_path: Path
) -> None:
    """The update's gradient is that of the term on the pictures that the step's random numbers choose."""
    settings = PairRegression(weight=2.0, inversion_steps=3)
    module = distillation(tiny_sd, NoDistillation(), pair_regression=settings)
    compared: list[float] = []

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        if role != "student":
            return update()
        random = StepRandom(0, module.student_steps, torch.arange(4))
        chosen = (random.uniform("image_pair") * 5).long().tolist()
        condition = module.generator.prompt_encoder.encode([f"a blue cup {i}" for i in chosen])
        colours = torch.tensor([[40 * i, 10, 200] for i in chosen], dtype=torch.float64) / 255
        images = colours[:, :, None, None].expand(-1, -1, 16, 16)
        vae = module.parts.vae
        with torch.no_grad():
            target = vae.encode(images * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
            noise = ddim_inversion(target, module.networks, condition, 3)
        loss = 2.0 * (module.generator.latents(noise, condition) - target).square().mean()
        expected = torch.autograd.grad(loss, list(module.student.parameters()))
        for (name, p), gradient in zip(module.student.named_parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)
        assert all(p.grad is None for p in module.scores.parameters())
        compared.append(max(gradient.abs().max().item() for gradient in expected))
        return update()

    watch_updates(module, watcher)
    start = Hooks(on_start=lambda m: m.double())
    run = train(module, tmp_path, 2, pictures, callbacks=[start], micro_batch_size=micro)
    assert len(compared) == 2 and min(compared) > 1e-4 and run.callback_metrics["train/student_pairs"] > 0


def test_shares_of_processes_and_passes_are_the_whole(pictures: RealPictures) -> None:
    whole = pictures.places().tolist()
    assert whole == [0, 1, 2, 3]
    shares = [pictures.places(rank, 2, at, 2).tolist() for rank in (0, 1) for at in (0, 1)]
    assert sum(shares, []) == whole and {len(share) for share in shares} == {1}
    with pytest.raises(UserError, match="batch_size is 4: it must be a multiple of the 3 processes"):
        pictures.places(0, 3)
    with pytest.raises(UserError, match="multiple of the 2 processes times 4 micro-batches"):
        pictures.places(0, 2, 0, 4)


def test_training_with_pictures_says_so(
    tiny_sd: Path, pictures: RealPictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss falls, and without pictures nothing is said."""
    settings = PairRegression(weight=2.0, inversion_steps=3)
    module = distillation(tiny_sd, NoDistillation(), pair_regression=settings, student=adam(1e-2))
    losses: list[float] = []
    hooks = Hooks(after_step=lambda m: losses.append(m.trainer.callback_metrics["train/student_pairs"]))
    train(module, tmp_path, 8, pictures, callbacks=[hooks]).save_checkpoint(tmp_path / "a.ckpt")
    card = load_student(tmp_path / "a.ckpt").facts
    assert card["trained_on"] == "prompts and 5 captioned pictures, so not image-free"
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    assert "This training is not image-free: it also sees 5 captioned pictures" in capsys.readouterr().out
    fit(distillation(tiny_sd), tmp_path, 1)
    assert "image-free" not in capsys.readouterr().out


class NearReal(NoDistillation):
    """An objective that needs real pictures."""

    needs = frozenset([REAL_PICTURES])

    def student_loss(self, sample: StudentSample, networks: Networks, random: StepRandom) -> Terms:
        assert sample.real is not None and len(sample.real.x0) == sample.real.condition.batch_size == 4
        self.seen = sample.real.x0
        return Terms({"near": (sample.x0 - sample.real.x0).square().mean()})


def test_an_objective_sees_them_as_latents(tiny_sd: Path, pictures: RealPictures, tmp_path: Path) -> None:
    module = distillation(tiny_sd, NearReal())
    run = train(module, tmp_path, 1, pictures)
    source = RealPictureSource(pictures, 16)
    uniform = StepRandom(0, 0, torch.arange(4)).uniform("image_pair")
    images, captions, _ = source.take(uniform)
    assert images.shape == (4, 3, 16, 16) and captions[0].startswith("a blue cup")
    with torch.no_grad():
        torch.testing.assert_close(module.objective.seen, module.generator.decoder.encode(images))
    assert run.callback_metrics["train/student_near"] > 0


NEEDED = "real pictures are needed .* set data.real, to captioned pictures or to the teacher's own samples"


@pytest.mark.parametrize(
    ("with_pictures", "regression", "objective", "message"),
    [
        (False, PairRegression(), NoDistillation, NEEDED),
        (False, None, NearReal, NEEDED),
        (False, None, lambda: DMD2(discriminator=Discriminator(["mid_block"])), NEEDED),
        (False, None, lambda: SiDLSG(discriminator=Discriminator(["mid_block"], heads=0)), NEEDED),
        (True, None, DMD2, "data.real is set, and neither DMD2 nor pair_regression uses it"),
        (True, None, NoDistillation, "data.real is set, and neither NoDistillation nor pair_regression uses"),
    ],
)
def test_pictures_and_their_use_go_together(
    with_pictures: bool, regression: Any, objective: Any, message: str,
    tiny_sd: Path, pictures: RealPictures, tmp_path: Path,
) -> None:  # fmt: skip
    module = distillation(tiny_sd, objective(), pair_regression=regression)
    with pytest.raises(UserError, match=message):
        train(module, tmp_path, 1, pictures if with_pictures else None)


def test_settings_that_cannot_be(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weight is 0"):
        PairRegression(weight=0.0)
    with pytest.raises(UserError, match="inversion_steps is 0: it must be at least 1"):
        PairRegression(inversion_steps=0)
    with pytest.raises(UserError, match="must be at least 1"):
        RealPictures("a", "b", batch_size=0)
    (tmp_path / "captions.txt").write_text("a cup\n")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        RealPictureSource(RealPictures("nowhere", str(tmp_path / "captions.txt")), 16)
