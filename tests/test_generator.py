"""The one-step generator against closed forms and the stock pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler

from common.errors import UserError
from lightning_modules.generator import OneStepGenerator, load_generator, make_generator
from lightning_modules.guidance.methods import Nasa
from lightning_modules.networks.loading import load_parts
from lightning_modules.pipelines import multistep_images, multistep_scheduler

PROMPTS = ["a red cat", "a dog", "", "a cat on a dog", "red"]
SEEDS = [7, 3, 2**40 + 1, 0, 11]


def generator_of(path: Path, start: int = 999) -> OneStepGenerator:
    return make_generator(load_parts(path), start)


def alpha_bar(t: int) -> float:
    """Stable Diffusion's schedule (scaled linear), computed on its own in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)[t].item()


@pytest.mark.parametrize("start", [999, 625])
def test_epsilon_students_start_as_in_the_paper(tiny_sd: Path, start: int) -> None:
    generator = generator_of(tiny_sd, start).double()
    condition = generator.prompt_encoder.encode(PROMPTS)
    z = generator.noise(SEEDS)
    with torch.no_grad():
        x0 = generator.latents(z, condition)
        t = torch.full((5,), start)
        epsilon = generator.student(z.double(), t, condition.tensors["encoder_hidden_states"]).sample
    a = alpha_bar(start)
    torch.testing.assert_close(x0, (z - (1 - a) ** 0.5 * epsilon) / a**0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [999, 625])
def test_v_students_use_their_own_conversion(tiny_sd_v: Path, start: int) -> None:
    generator = generator_of(tiny_sd_v, start).double()
    condition = generator.prompt_encoder.encode(PROMPTS)
    z = generator.noise(SEEDS)
    with torch.no_grad():
        x0 = generator.latents(z, condition)
        t = torch.full((5,), start)
        v = generator.student(z.double(), t, condition.tensors["encoder_hidden_states"]).sample
    a = alpha_bar(
        start
    )  # v = alpha eps - sigma x0 and x_t = alpha x0 + sigma eps give x0 = alpha x_t - sigma v
    torch.testing.assert_close(x0, a**0.5 * z - (1 - a) ** 0.5 * v, rtol=1e-5, atol=1e-5)


def test_noise_is_unscaled_and_each_pictures_own(tiny_sd: Path) -> None:
    generator = generator_of(tiny_sd, 625)
    noise = generator.noise(SEEDS)
    for row, seed in zip(noise, SEEDS, strict=True):
        assert torch.equal(row, torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(generator.noise(SEEDS[2:3])[0], noise[2])


def test_pictures_do_not_depend_on_the_batch(tiny_sd: Path) -> None:
    generator = generator_of(tiny_sd).double()
    whole = generator.images(PROMPTS, SEEDS)
    # float64 inside; pictures are float32, of which 1e-6 is some units in the last place
    for size in (1, 2, 5):
        torch.testing.assert_close(
            generator.images(PROMPTS, SEEDS, batch_size=size), whole, rtol=0, atol=1e-6
        )
    assert whole.shape == (5, 3, 16, 16) and whole.dtype == torch.float32
    assert (whole[0] - whole[1]).abs().max() > 0.01
    # In float32 other batch sizes sum in another order; 1 / alpha_T = 14.6 amplifies what that changes.
    single = generator.float().images(PROMPTS, SEEDS, batch_size=1)
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-3)


def test_the_prompt_matters(tiny_sd: Path) -> None:
    generator = generator_of(tiny_sd)
    a, b = generator.images(["a red cat", "a dog"], [0, 0])
    assert (a - b).abs().max() > 1e-4


def test_gradients_reach_the_student_only(tiny_sd: Path) -> None:
    generator = generator_of(tiny_sd)
    condition = generator.prompt_encoder.encode(PROMPTS)
    generator.latents(generator.noise(SEEDS), condition).square().mean().backward()
    assert all(p.grad is not None for p in generator.student.parameters())
    assert {n.split(".")[0] for n, p in generator.named_parameters() if p.grad is not None} == {"student"}
    assert not generator.images(["a cat"], [0]).requires_grad


def test_guidance_is_in_kappa_form(tiny_sd: Path) -> None:
    generator = generator_of(tiny_sd, 625).double()
    encode, z = generator.prompt_encoder.encode, generator.noise([1, 2])
    condition, negative = encode(["a cat", "a dog"]), encode(["red"])
    with torch.no_grad():
        with_text = generator.latents(z, condition)
        for away, options in ((encode(["", ""]), {}), (encode(["red", "red"]), {"negative": negative})):
            without = generator.latents(z, away)
            guided = generator.latents(z, condition, 1.5, **options)
            torch.testing.assert_close(guided, without + 1.5 * (with_text - without), rtol=1e-5, atol=1e-5)
    plain, guided = (
        generator.images(["a cat"], [0], guidance_scale=k, negative_prompt="red") for k in (1.0, 3.0)
    )
    assert torch.equal(plain, generator.images(["a cat"], [0])) and not torch.equal(plain, guided)


@pytest.mark.parametrize("method", [None, Nasa(0.5)])
def test_one_negative_prompt_for_all_is_encoded_once(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, method: Nasa | None
) -> None:
    generator = generator_of(tiny_sd).double()
    options = {"guidance_scale": 1.0 if method else 3.0, "negative_method": method}
    each = generator.images(PROMPTS, SEEDS, 2, negative_prompt=["a dog"] * 5, **options)
    asked: list[list[str]] = []
    encode = generator.prompt_encoder.encode
    monkeypatch.setattr(
        generator.prompt_encoder, "encode", lambda texts: asked.append(list(texts)) or encode(texts)
    )
    shared = generator.images(PROMPTS, SEEDS, 2, negative_prompt="a dog", **options)
    assert asked == [["a dog"], PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    torch.testing.assert_close(shared, each, rtol=0, atol=1e-6)
    assert (shared - generator.images(PROMPTS, SEEDS)).abs().max() > 1e-3


def test_state_dict_holds_the_student_only(tiny_sd: Path) -> None:
    generator = generator_of(tiny_sd)
    names = {f"student.{name}" for name in load_parts(tiny_sd).denoiser.state_dict()}
    assert generator.state_dict().keys() == names
    generator.load_state_dict(generator.state_dict())


@pytest.mark.parametrize("batch_size", [None, 2])
def test_multistep_pictures_are_the_stock_pipelines(tiny_sd: Path, batch_size: int | None) -> None:
    pictures = multistep_images(load_parts(tiny_sd), PROMPTS, SEEDS, steps=4, batch_size=batch_size)
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.set_progress_bar_config(disable=True)
    latents = generator_of(tiny_sd).noise(SEEDS)
    expected = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=4.5, latents=latents, output_type="pt"
    ).images
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-4)  # batches of 2 sum in another order
    unguided = multistep_images(load_parts(tiny_sd), PROMPTS, SEEDS, steps=4, guidance_scale=1.0)
    assert (unguided - pictures).abs().max() > 1e-3


def test_one_multistep_step_is_the_generator(tiny_sd: Path) -> None:
    parts = load_parts(tiny_sd)
    pictures = multistep_images(parts, PROMPTS, SEEDS, steps=1, guidance_scale=1.0)
    torch.testing.assert_close(pictures, generator_of(tiny_sd).images(PROMPTS, SEEDS), rtol=0, atol=1e-4)


def test_the_teachers_sampler_is_ddim_with_its_constants(tiny_sd: Path) -> None:
    own = load_parts(tiny_sd).scheduler
    assert multistep_scheduler(own).config == own.config and multistep_scheduler(own) is not own
    pndm = PNDMScheduler(
        beta_start=0.001, beta_end=0.01, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    sampler = multistep_scheduler(pndm)
    assert isinstance(sampler, DDIMScheduler) and torch.equal(sampler.alphas_cumprod, pndm.alphas_cumprod)
    assert sampler.config.prediction_type == "v_prediction" and not sampler.config.clip_sample
    assert sampler.config.timestep_spacing == "trailing"


def test_any_stable_diffusion_folder_loads_as_a_generator(tiny_sd: Path) -> None:
    generator = load_generator(tiny_sd)
    assert generator.start_timestep == 999
    assert torch.equal(generator.images(PROMPTS, SEEDS), generator_of(tiny_sd).images(PROMPTS, SEEDS))


def test_bad_arguments_are_refused(tiny_sd: Path) -> None:
    with pytest.raises(UserError, match="start_timestep 1000 .* 0 to 999"):
        generator_of(tiny_sd, 1000)
    generator = generator_of(tiny_sd)
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        generator.images(["a", "b"], [0])
    with pytest.raises(ValueError, match="at least one"):
        generator.images([], [])
    with pytest.raises(UserError, match="is a folder, which has one set"):
        load_generator(tiny_sd, "ema")
