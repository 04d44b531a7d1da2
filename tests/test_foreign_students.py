"""One- and few-step models that others trained: LCM, SDXL Turbo, DMD2, SDXL-Lightning, Hyper-SD, Flash."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

import cli
from common.errors import UserError
from lightning_modules.diffusion.steps import Steps
from lightning_modules.drawing import Recipe, model_drawer
from lightning_modules.generator import load_generator
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.student import load_network_file, load_student
from lightning_modules.networks.weights import own_weights
from tests.backbones import moved, private_copy, stock_pipeline_of

PROMPTS, SEEDS = ["a red cat", "a dog"], [5, 6]
TIMES = [999, 749, 499, 249]
Folder = Callable[[str], Path]


def call(command: str, *words: Any) -> None:
    """Run a command line."""
    cli.main([command, *(str(word) for word in words)])


def stock_images(pipe: Any, **options: Any) -> Tensor:
    """Pictures of a stock pipeline's call from seeded noise."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images: Tensor = pipe(PROMPTS, generator=generators, output_type="pt", **options).images
    return images


def pixels(file: Path) -> Tensor:
    """Picture [3, H, W] in [0, 1]."""
    image = Image.open(file).convert("RGB")
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, 3).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("name", "options"),
    [("lcm", {}), ("sd_turbo", {"guidance_scale": 0.0}), ("sdxl_turbo", {"guidance_scale": 0.0})],
)
def test_they_draw_by_their_own_pipeline(
    name: str, options: dict[str, Any], backbone_folder: Folder, tmp_path: Path
) -> None:
    """As their cards say: an LCM keeps its pipeline's guidance, which is an input of its network."""
    folder = backbone_folder(name)
    expected = stock_images(stock_pipeline_of(folder), num_inference_steps=1, **options)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    call("generate", "--model", folder, *prompts, "--seed", SEEDS[0], "--output", tmp_path / "out")
    for i, picture in enumerate(expected):
        assert (pixels(tmp_path / f"out/000{i}.png") - picture).abs().max() <= 0.51 / 255
    drawer = model_drawer(Recipe(str(folder)), PROMPTS, SEEDS, None, torch.device("cpu"))
    torch.testing.assert_close(drawer.draw([0, 1]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "klein", "qwen"])
def test_a_network_alone_where_the_shift_depends_on_the_resolution(
    name: str, backbone_folder: Folder, tmp_path: Path
) -> None:
    base = backbone_folder(name)
    network = moved(base, 2)
    save_file(network.state_dict(), tmp_path / "student.safetensors")
    loaded = load_network_file(tmp_path / "student.safetensors", str(base), Steps((999,)))
    state = loaded.parts.denoiser.state_dict()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "scheduler", "settings"),
    [
        ("lcm", None, {}),
        ("sd_turbo", None, {}),
        ("sdxl_turbo", None, {}),
        ("sdxl", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),  # SDXL-Lightning
        ("sdxl", "DDIMScheduler", {"timestep_spacing": "trailing"}),  # Hyper-SD
        ("sd15", "TCDScheduler", {}),  # Hyper-SD, TCD
        ("sdxl", "LCMScheduler", {"timestep_spacing": "trailing"}),  # Flash, LCM-LoRA
    ],
)
def test_they_draw_in_their_own_steps(
    name: str, scheduler: str | None, settings: dict[str, Any], backbone_folder: Folder, tmp_path: Path
) -> None:
    """A folder with the scheduler that the model's card names, as `save_pretrained` writes it."""
    pipe: Any = stock_pipeline_of(backbone_folder(name))
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    pipe.save_pretrained(tmp_path / "model")
    guidance = {} if name == "lcm" else {"guidance_scale": 0.0}
    expected = stock_images(pipe, num_inference_steps=4, **guidance)
    drawer = model_drawer(Recipe(str(tmp_path / "model"), 4), PROMPTS, SEEDS, None, torch.device("cpu"))
    torch.testing.assert_close(drawer.draw([0, 1]), expected, rtol=0, atol=1e-4)
    assert ", 4 steps" in drawer.title


def test_half_precision_files_are_drawn_in_float32(backbone_folder: Folder, tmp_path: Path) -> None:
    folder = private_copy(backbone_folder("lcm"), tmp_path / "half")
    CLIPTextModel.from_pretrained(folder / "text_encoder").half().save_pretrained(folder / "text_encoder")
    halves = CLIPTextModel.from_pretrained(folder / "text_encoder")
    assert halves.dtype == torch.float16
    pipe = stock_pipeline_of(folder, text_encoder=halves.float())
    for steps in (1, 2):
        expected = stock_images(pipe, num_inference_steps=steps)
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        output = tmp_path / f"{steps}"
        call(
            "generate", "--model", folder, *prompts, "--seed", SEEDS[0], "--steps", steps, "--output", output
        )
        for i, picture in enumerate(expected):
            assert (pixels(output / f"000{i}.png") - picture).abs().max() <= 0.51 / 255
        drawer = model_drawer(Recipe(str(folder), steps), PROMPTS, SEEDS, None, torch.device("cpu"))
        torch.testing.assert_close(drawer.draw([0, 1]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lcm", "sdxl_turbo"])
def test_they_merge(name: str, backbone_folder: Folder, tmp_path: Path) -> None:
    first, second = backbone_folder(name), private_copy(backbone_folder(name), tmp_path / "second")
    moved(first, 1).save_pretrained(second / "unet")
    call("merge", "--first", first, "--second", second, "--weight", 0.5, "--output", tmp_path / "merged")
    ours = load_generator(tmp_path / "merged")
    assert ours.start_timestep == 999
    guidance = 8.5 if name == "lcm" else 1.0
    assert f"guidance_scale={guidance})" in (tmp_path / "merged/README.md").read_text()
    pipe = stock_pipeline_of(tmp_path / "merged")
    drawn = stock_images(pipe, num_inference_steps=1, guidance_scale=guidance)
    torch.testing.assert_close(drawn, ours.images(PROMPTS, SEEDS), rtol=0, atol=1e-4)
    if name == "lcm":  # the scale matters
        other = stock_images(pipe, num_inference_steps=1, guidance_scale=2.0)
        assert (other - drawn).abs().max() > 1e-3


def test_a_network_alone(backbone_folder: Folder, tmp_path: Path) -> None:
    """DMD2's SDXL: its card puts the UNet into SDXL and takes one LCM step from timestep 399."""
    base = backbone_folder("sdxl")
    unet = moved(base, 2)
    save_file(unet.state_dict(), tmp_path / "dmd2.safetensors")
    torch.save({name: value.half() for name, value in unet.state_dict().items()}, tmp_path / "half.bin")
    pipe: Any = stock_pipeline_of(base, unet=unet)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    expected = stock_images(pipe, num_inference_steps=1, guidance_scale=0, timesteps=[399])
    place = ("--base", base, "--start-timestep", 399)
    call("export", "--checkpoint", tmp_path / "dmd2.safetensors", *place, "--output", tmp_path / "out")
    drawn = load_generator(tmp_path / "out").images(PROMPTS, SEEDS)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    exported = stock_images(stock_pipeline_of(tmp_path / "out"), num_inference_steps=1, guidance_scale=1.0)
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-4)
    facts = json.loads((tmp_path / "out/one_step.json").read_text())
    assert (facts["start_timestep"], facts["network"]) == (399, "dmd2.safetensors")
    call("export", "--checkpoint", tmp_path / "half.bin", *place, "--output", tmp_path / "half")
    halves = load_student(tmp_path / "half").parts.denoiser.state_dict()
    torch.testing.assert_close(halves["conv_in.weight"], unet.conv_in.weight.half().float())


@pytest.mark.parametrize("noise", ["fresh", "none"])
def test_a_network_alone_of_four_steps(noise: str, backbone_folder: Folder, tmp_path: Path) -> None:
    """DMD2's SDXL by the LCM scheduler at the timesteps of its card; SDXL-Lightning's by Euler, trailing."""
    base = backbone_folder("sdxl")
    unet = moved(base, 2)
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    pipe: Any = stock_pipeline_of(base, unet=unet)
    if noise == "fresh":
        pipe.scheduler, how = LCMScheduler.from_config(pipe.scheduler.config), {"timesteps": TIMES}
    else:
        config = pipe.scheduler.config
        pipe.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
        how = {"num_inference_steps": 4}
    expected = stock_images(pipe, guidance_scale=0, **how)
    place = ("--base", base, "--timesteps", TIMES, "--step-noise", noise)
    call("export", "--checkpoint", tmp_path / "unet.safetensors", *place, "--output", tmp_path / "out")
    drawer = model_drawer(Recipe(str(tmp_path / "out")), PROMPTS, SEEDS, None, torch.device("cpu"))
    # Euler's start is sigma_T times the noise, ours the noise
    torch.testing.assert_close(drawer.draw([0, 1]), expected, rtol=0, atol=1e-4 if noise == "fresh" else 5e-3)
    facts = json.loads((tmp_path / "out/one_step.json").read_text())
    assert (facts["timesteps"], facts["step_noise"]) == (TIMES, noise)


def test_a_network_alone_needs_a_base_that_fits(backbone_folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "network.safetensors"
    save_file(load_parts(backbone_folder("sd15")).denoiser.state_dict(), file)
    (tmp_path / "cut.bin").write_bytes(b"no weights")
    start, base = ("--start-timestep", 399), ("--base", backbone_folder("sdxl"))
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((file,), "is a network alone: give --base MODEL and --start-timestep T, or --timesteps"),
        ((file, *base), "give --base MODEL and --start-timestep T"),
        ((file, *base, *start, "--timesteps", TIMES), "give --base MODEL and --start-timestep T"),
        ((file, *base, *start, "--step-noise", "none"), "--step-noise has no effect with one step"),
        ((file, *base, *start, "--weights", "ema"), "one set of weights"),
        ((file, *base, *start), "does not hold the network of .* Give another --base"),
        ((tmp_path / "cut.bin", *base, *start), "cut.bin can't be read"),
        ((tmp_path / "gone.bin", *base, *start), "gone.bin does not exist"),
        (("last", *base), "are for a network alone"),
    ]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            call("export", "--checkpoint", *words, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="is a network alone. Make a model folder of it first: export"):
        load_student(file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by", ["option", "file"])
def test_a_network_that_predicts_something_else_than_its_base(
    by: str, backbone_folder: Folder, tmp_path: Path
) -> None:
    """SDXL-Lightning's one-step UNet predicts x0, its base the noise."""
    base = backbone_folder("sdxl")
    unet = moved(base, 2)
    save_file(unet.state_dict(), tmp_path / "x0.safetensors")
    config = json.loads((base / "scheduler/scheduler_config.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(config | {"prediction_type": "sample"}))
    how = ("--prediction-type", "sample") if by == "option" else ("--schedule", tmp_path / "own.json")
    place = ("--base", base, "--start-timestep", 999, *how)
    call("export", "--checkpoint", tmp_path / "x0.safetensors", *place, "--output", tmp_path / "out")
    pipe: Any = stock_pipeline_of(base, unet=unet)
    config = pipe.scheduler.config
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        config, timestep_spacing="trailing", prediction_type="sample"
    )
    expected = stock_images(pipe, num_inference_steps=1, guidance_scale=0)
    drawn = load_generator(tmp_path / "out").images(PROMPTS, SEEDS)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=5e-3)


def test_a_network_in_wrappings_is_found(backbone_folder: Folder, tmp_path: Path) -> None:
    expected = load_parts(backbone_folder("sd15")).denoiser.state_dict()
    cases: list[Any] = [
        {"module." + name: value for name, value in expected.items()},
        {"_orig_mod.module." + name: value for name, value in expected.items()},
        {"state_dict": {"unet." + name: value for name, value in expected.items()}, "step": torch.ones(())},
        {"model": expected, "step": 3},
        {**{"unet." + n: v for n, v in expected.items()}, "vae.encoder.conv_in.weight": torch.ones(1)},
    ]
    for content in cases:
        found = own_weights(content, expected, tmp_path)
        assert found.keys() == expected.keys() and all(found[n] is v for n, v in expected.items())
    for name, message in {
        "lora_unet_down.lora_down.weight": "is a LoRA", "unet.to_q.lora_A.weight": "is a LoRA",
        "model.diffusion_model.input_blocks.0.0.weight": "single-file checkpoint",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            own_weights({name: torch.ones(1)}, expected, tmp_path)


def test_inputs_that_the_family_does_not_give_are_named(backbone_folder: Folder, tmp_path: Path) -> None:
    folder = private_copy(backbone_folder("sd15"), tmp_path / "own")
    file = folder / "unet/config.json"
    config = json.loads(file.read_text())
    for changes, message in (
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'.*takes inputs beside the prompt"),
        ({"num_class_embeds": 10}, "num_class_embeds 10"),
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
          "projection_class_embeddings_input_dim": 64}, "addition_embed_type 'text_time'"),
        ({"sample_size": None}, "names no picture size"),
    ):  # fmt: skip
        file.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            load_parts(folder, without=("denoiser", "vae", "text_encoders"))
