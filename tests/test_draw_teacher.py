"""Samples of the teacher: drawing them, and training with them as real pictures."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from safetensors import safe_open
from torch import nn

import cli
from commands import draw_teacher
from common.errors import UserError
from datamodules import teacher_samples
from datamodules.real_pictures import RealPictures
from lightning_modules.diffusion.randomness import StepRandom, seeded_noise
from lightning_modules.diffusion.steps import Steps
from lightning_modules.distillation import OneStepDistillation
from lightning_modules.generator import make_generator
from lightning_modules.networks.decoder import LatentDecoder
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.pipeline_folder import export_student
from lightning_modules.networks.student import load_student
from lightning_modules.objectives.base import Objective, TeacherFacts
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.dmd2 import DMD2
from lightning_modules.objectives.f_distill import FDistill
from lightning_modules.objectives.pair_regression import PairRegression
from lightning_modules.objectives.sid_lsg import SiDLSG
from lightning_modules.objectives.uni_instruct import UniInstruct
from lightning_modules.pipelines import multistep_images
from tests.conftest import make_vae
from tests.test_distributed import sgd
from tests.test_real_pictures import train
from tests.test_turns import check_processes, check_resume
from tests.tiny_distillation import PROMPTS, Hooks, adam, distillation, reached, watch_updates
from tests.tiny_judges import NoDistillation

COUNT = 11


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_samples, "SHARD", 4)
    monkeypatch.setattr(draw_teacher, "SHARD", 4)  # imported above: its own value is the one put back


def draw(teacher: Path, folder: Path, **more: Any) -> Path:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = {"count": COUNT, "steps": 3, "seed": 5, "batch-size": 3, **more}
    words = [f"--{name}={value}" for name, value in options.items()]
    cli.main(["draw-teacher", f"--model={teacher}", f"--prompts={prompts}", f"--output={folder}", *words])
    return folder


@pytest.fixture
def samples(tiny_sd: Path, tmp_path: Path) -> RealPictures:
    return RealPictures(str(draw(tiny_sd, tmp_path / "samples")), batch_size=6)


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {
        path.name: safe_open(path, "pt").get_tensor("latents")
        for path in sorted(folder.glob("*.safetensors"))
    }


def test_they_are_the_teachers_pictures(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One for each prompt and seed, from the start again after the last prompt; the same by two processes."""
    folder = draw(tiny_sd, tmp_path / "one")
    told = capsys.readouterr().out
    assert "11 samples in 3 files, 3 of them to be drawn here: about" in told
    latents = files(folder)
    assert [len(part) for part in latents.values()] == [4, 4, 3]
    parts = load_parts(tiny_sd)
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(COUNT)]
    expected = multistep_images(parts, texts, range(5, 5 + COUNT), steps=3, guidance_scale=4.5)
    with torch.no_grad():
        pictures = LatentDecoder(parts.vae).decode(torch.cat([*latents.values()]).float())
    torch.testing.assert_close(pictures, expected, rtol=0, atol=5e-3)
    for rank in ("0", "1"):
        with patch.dict(os.environ, {"RANK": rank, "WORLD_SIZE": "2"}):
            draw(tiny_sd, tmp_path / "two")
    other = files(tmp_path / "two")
    assert all(torch.equal(latents[name], other[name]) for name in latents)


def test_a_disk_that_is_too_small(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two bytes for each of a latent's 4 * 8 * 8 values, of the files that are not there; said beforehand."""
    for module in (teacher_samples, draw_teacher):
        monkeypatch.setattr(module, "SHARD", 100_000)
    (folder := tmp_path / "samples").mkdir()
    (folder / "samples-00000.safetensors").touch()
    usage, size = shutil.disk_usage(tmp_path), 150_000 * 512
    monkeypatch.setattr(draw_teacher, "keep_facts", Mock(side_effect=UserError("here it would draw")))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(UserError, match="take about 73.2 MiB of 73 MiB free in .*samples; make room, or"):
        draw(tiny_sd, folder, count=250_000)
    assert len([*folder.iterdir()]) == 1 and not capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    with pytest.raises(UserError, match="here it would draw"):
        draw(tiny_sd, folder, count=250_000)
    told = "250,000 samples in 3 files, 2 of them to be drawn here: about 73.2 MiB of 73 MiB free in "
    assert told in capsys.readouterr().out


def test_a_student_of_several_steps_stands_in(tiny_sd: Path, tmp_path: Path) -> None:
    """In its own steps, unguided; the start noise is that of the seed."""
    parts, steps = load_parts(tiny_sd), Steps((999, 749, 499, 249), "none")
    student = export_student(parts.denoiser, parts, steps, tmp_path / "out", card={"teacher": "tiny"})
    folder = draw(student, tmp_path / "samples")
    facts = teacher_samples.read_facts(folder)
    assert (facts["steps"], facts["guidance_scale"]) == (3, 1.0)  # `draw` asks for three of them
    generator = make_generator(parts, steps.fewer(3))
    condition = generator.prompt_encoder.encode([PROMPTS[i % len(PROMPTS)] for i in range(COUNT)])
    with torch.no_grad():
        expected = generator.latents(seeded_noise(range(5, 5 + COUNT), parts.latent_shape), condition)
    torch.testing.assert_close(torch.cat([*files(folder).values()]).float(), expected, rtol=2e-3, atol=2e-3)


def test_it_goes_on_where_it_ended(tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = draw(tiny_sd, tmp_path / "samples")
    before, lost = files(folder), folder / "samples-00001.safetensors"
    lost.unlink()
    with pytest.raises(UserError, match="lacks 1 of its 3 files of samples: give the same draw-teacher"):
        teacher_samples.TeacherSamples(RealPictures(str(folder)), "")
    capsys.readouterr()
    draw(tiny_sd, folder)
    assert "1 of them to be drawn here" in capsys.readouterr().out
    assert all(torch.equal(part, files(folder)[name]) for name, part in before.items())
    with pytest.raises(UserError, match="another guidance_scale .4.5, not 2.0.: give another --output"):
        draw(tiny_sd, folder, **{"guidance-scale": 2.0})
    lost.write_bytes(b"damaged")
    facts = teacher_samples.read_facts(folder)
    with pytest.raises(UserError, match="samples-00001.safetensors is damaged"):
        teacher_samples.TeacherSamples(RealPictures(str(folder)), facts["codec"]).take(torch.tensor([0.5]))
    with pytest.raises(UserError, match="holds no samples of a teacher"):
        teacher_samples.TeacherSamples(RealPictures(str(tmp_path)), "")


def test_samples_of_another_autoencoder(own_sd: Path, tmp_path: Path, samples: RealPictures) -> None:
    """In a run whose teacher has the same networks but for that."""
    make_vae().save_pretrained(own_sd / "vae")
    module = distillation(own_sd, DMD2(discriminator=Discriminator(["mid_block"])))
    with pytest.raises(UserError, match="autoencoder than this teacher's: they are of .*tiny_sd.*Draw them"):
        train(module, tmp_path, 1, samples)


class Watching(DMD2):
    """Keeps what it was given."""

    def fake_score_loss(self, sample: Any, networks: Any, random: Any) -> Any:
        self.seen = sample.real
        return super().fake_score_loss(sample, networks, random)


def test_training_sees_latents_with_their_noise(
    tiny_sd: Path, tmp_path: Path, samples: RealPictures, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step's random numbers choose them; heads and features learn by their own terms alone."""
    module = distillation(tiny_sd, Watching(fake_updates=1, discriminator=Discriminator(["mid_block"])))
    gradients: dict[str, set[str]] = {}

    def watcher(role: str, update: Callable[[], bool]) -> bool:
        gradients[role] = reached(module)
        return update()

    watch_updates(module, watcher)
    run = train(module, tmp_path, 1, samples, log_every_n_steps=1)
    places = (StepRandom(0, 0, torch.arange(6)).uniform("image_pair") * COUNT).long().tolist()
    whole = torch.cat([*files(Path(samples.folder)).values()]).float()
    assert torch.equal(module.objective.seen.x0, whole[places])
    noise = seeded_noise([5 + place for place in places], whole.shape[1:])
    assert torch.equal(module.objective.seen.noise, noise)
    assert gradients == {"student": {"student"}, "fake_score": {"scores", "objective"}}
    logged = run.callback_metrics
    assert "train/fake_score_detection" in logged and logged["gradient_at_output/adversarial"] > 0
    assert "sees 11 samples of" in (out := capsys.readouterr().out) and "no given pictures" in out
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert load_student(tmp_path / "a.ckpt").facts["trained_on"].endswith("so image-free")


def test_pairs_of_noise_and_sample(tiny_sd: Path, tmp_path: Path, samples: RealPictures) -> None:
    """DMD's regression: the student's answer to a sample's own noise comes near the sample."""
    fresh = distillation(tiny_sd)
    fresh.configure_model()
    module = distillation(tiny_sd, NoDistillation(), pair_regression=PairRegression(2.0), student=adam(1e-2))
    losses: list[float] = []

    def note(module: OneStepDistillation) -> None:
        losses.append(float(module.trainer.callback_metrics["train/student_pairs"]))

    uniform = StepRandom(0, 0, torch.arange(6)).uniform("image_pair")
    codec = teacher_samples.read_facts(Path(samples.folder))["codec"]
    latents, captions, seeds = teacher_samples.TeacherSamples(samples, codec).take(uniform)
    with torch.no_grad():
        noise = seeded_noise(seeds, latents.shape[1:])
        answer = fresh.generator.latents(noise, fresh.generator.prompt_encoder.encode(captions))
    train(module, tmp_path, 8, samples, callbacks=[Hooks(after_step=note)])
    assert losses[0] == pytest.approx(float(2.0 * (answer - latents).square().mean()), rel=1e-4)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])


class Steep(Discriminator):
    """Heads whose logits differ between samples, as new ones' hardly do: r spreads, and R1 is not near 0."""

    def build(self, facts: TeacherFacts) -> None:
        super().build(facts)
        for head in self.heads:
            weight: Any = head.layers[-1].weight  # type: ignore[union-attr, index]
            nn.init.normal_(weight, std=60.0)
            weight.data -= weight.data.mean()  # the channels have about the same mean: r stays in its range

    def log_ratio(self, *inputs: Any) -> torch.Tensor:
        found = super().log_ratio(*inputs)
        assert found.max() - found.min() > 0.1
        return found


HEADS = functools.partial(Steep, ["mid_block", "down_blocks.0"], weight=1.0, student_weight=0.1)
METHODS: dict[str, Callable[[], Objective]] = {
    "dmd2": lambda: DMD2(
        4.0, 2, student_share=0.1, discriminator=HEADS(heads=2, refresh=0.3, r1=10.0, r1_noise=0.5)
    ),
    # in two tenths of the schedule, so that samples share one; with this divergence both means matter
    "f_distill": lambda: FDistill(
        HEADS(role="teacher"), "jensen_shannon", guidance_scale=4.0, fake_updates=1, min_timestep=400,
        max_timestep=600,
    ),
    "sida": lambda: SiDLSG(teacher_guidance=4.0, discriminator=HEADS(heads=0)),
    "uni_instruct": lambda: UniInstruct(HEADS(), "jensen_shannon", teacher_guidance=4.0),
}  # fmt: skip


@pytest.mark.parametrize(("name", "more"), [("dmd2", {"lora": None}), ("sida", {})])
def test_resume_is_the_uninterrupted_run(
    name: str, more: dict[str, Any], tiny_sd: Path, tmp_path: Path, samples: RealPictures
) -> None:
    """Heads, those that begin anew, their optimizer, and the samples that are seen."""
    names = check_resume(tiny_sd, tmp_path, METHODS[name], real=samples, **more)
    assert ("objective.discriminator.heads.0.layers.0.weight" in names) == (name == "dmd2")


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("dmd2", "ddp"), ("dmd2", "shards"), ("f_distill", "ddp"), ("sida", "ddp"), ("uni_instruct", "shards")],
)
def test_two_processes_are_one(
    name: str, strategy: str, tiny_sd: Path, tmp_path: Path, samples: RealPictures
) -> None:
    more: dict[str, Any] = {role: sgd(1e-3) for role in ("student", "fake_score")}
    more |= {"lora": None} if name == "dmd2" else {}
    check_processes(tiny_sd, tmp_path, strategy, METHODS[name], real=samples, **more)
