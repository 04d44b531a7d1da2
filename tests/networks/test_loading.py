"""Reading a Stable Diffusion folder, and what is said when something is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file

from common import files
from common.errors import UserError
from lightning_modules.networks.loading import asset_path, load_parts, noise_schedule


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_parts_are_complete_and_ready(tiny_sd: Path) -> None:
    parts = load_parts(tiny_sd)
    assert parts.latent_shape == (4, 8, 8) and parts.path == str(tiny_sd)
    for module in (parts.denoiser, parts.vae, parts.text_encoders[0]):
        assert not module.training and {p.dtype for p in module.parameters()} == {torch.float32}


def test_half_precision_files_are_read_as_float32(tiny_sd: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half")
    parts = load_parts(tmp_path / "half")
    for module in (parts.denoiser, parts.vae, parts.text_encoders[0]):
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_given_unet_takes_the_folders_place(own_sd: Path) -> None:
    unet = load_parts(own_sd).denoiser
    shutil.rmtree(own_sd / "unet")
    assert load_parts(own_sd, denoiser=unet).denoiser is unet


def test_relative_paths_are_sought_here_then_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, repository = tmp_path / "here", tmp_path / "repository"
    for folder in (here / "both", repository / "both", repository / "bundled"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(files, "ROOT", repository)
    assert asset_path("both") == Path("both")
    assert asset_path("bundled") == repository / "bundled"
    assert asset_path("nowhere") == Path("nowhere")


def test_schedule_is_read_from_the_folder(own_sd: Path) -> None:
    edit_json(own_sd / "scheduler/scheduler_config.json", beta_end=0.02, num_train_timesteps=500)
    schedule = noise_schedule(load_parts(own_sd).scheduler)
    betas = torch.linspace(0.00085**0.5, 0.02**0.5, 500, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0)[torch.tensor([0, 250, 499])]
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0, 250, 499]))
    torch.testing.assert_close(alpha.double(), expected.sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(sigma.double(), (1 - expected).sqrt(), rtol=1e-4, atol=0)
    assert schedule.num_timesteps == 500


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_read(kind: str) -> None:
    assert noise_schedule(EulerDiscreteScheduler(prediction_type=kind)).prediction_type == kind


def test_unknown_prediction_type_is_named(own_sd: Path) -> None:
    edit_json(own_sd / "scheduler/scheduler_config.json", prediction_type="velocity")
    with pytest.raises(
        UserError, match=r"'velocity' in scheduler/scheduler_config.json.*epsilon, v_prediction"
    ):
        noise_schedule(load_parts(own_sd).scheduler)


def test_schedulers_of_another_kind_are_refused() -> None:
    with pytest.raises(
        UserError, match="EDMEulerScheduler .*has no table of alphas and is none of rectified"
    ):
        noise_schedule(EDMEulerScheduler())


def drop_a_weight(folder: Path) -> None:
    """Remove one tensor from the UNet's file."""
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file)


def truncate(name: str) -> Callable[[Path], None]:
    """Cut a file to half its size."""

    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


LOST = r"'text_encoder' is missing 2 of its files of weights, model-2-of-3\.\w+ first"


def write_index(part: Path, suffix: str) -> None:
    """Name three files as those of a network."""
    shards = {f"weight{i}": f"model-{i}-of-3{suffix}" for i in (1, 2, 3)}
    (part / f"model{suffix}.index.json").write_text(json.dumps({"weight_map": shards}))


def lose_shards(part: Path, suffix: str = ".safetensors") -> None:
    """Leave one file of three."""
    write_index(part, suffix)
    (part / "model.safetensors").rename(part / f"model-1-of-3{suffix}")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda d: (d / "model_index.json").unlink(), "model_index.json is missing in"),
    "broken index": (truncate("model_index.json"), "model_index.json can't be read as JSON"),
    "index without vae": (lambda d: edit_json(d / "model_index.json", vae=None), "part 'vae' is missing in"),
    "null text encoder": (
        lambda d: edit_json(d / "model_index.json", text_encoder=[None, None]),
        "part 'text_encoder' is missing in",
    ),
    "unknown scheduler": (
        lambda d: edit_json(d / "model_index.json", scheduler=["diffusers", "NoScheduler"]),
        "'scheduler' in .* can't be loaded: .*NoScheduler",
    ),
    **{
        f"no {part}": (lambda d, part=part: shutil.rmtree(d / part), f"The part '{part}' is missing")
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    },
    "no unet weights": (
        lambda d: (d / "unet/diffusion_pytorch_model.safetensors").unlink(),
        "'unet' is missing its weights",
    ),
    "half a download": (lambda d: lose_shards(d / "text_encoder"), LOST),
    "half a download in the old format": (lambda d: lose_shards(d / "text_encoder", ".bin"), LOST),
    "no vocabulary": (
        lambda d: (d / "tokenizer/tokenizer.json").unlink(),
        "'tokenizer' is missing its vocabulary",
    ),
    "cut unet": (truncate("unet/diffusion_pytorch_model.safetensors"), "'unet' in .* can't be loaded"),
    "cut text encoder": (truncate("text_encoder/model.safetensors"), "'text_encoder' in .* can't be loaded"),
    "cut vae config": (truncate("vae/config.json"), "'vae' in .* can't be loaded"),
    "unet lacks a tensor": (
        drop_a_weight,
        r"'unet' in .* (lacks the weights \['conv_in.weight'\]|can't be loaded)",
    ),
    "other latents": (
        lambda d: edit_json(d / "vae/config.json", latent_channels=4) or widen_text(d),
        "do not fit",
    ),
    "long tokenizer": (
        lambda d: edit_json(d / "tokenizer/tokenizer_config.json", model_max_length=77),
        "'tokenizer' in .* model_max_length 77",
    ),
}


def widen_text(folder: Path) -> None:
    """Put a text encoder of another width into the folder."""
    from transformers import CLIPTextModel

    config = CLIPTextModel.config_class.from_pretrained(folder / "text_encoder")
    config.hidden_size = 32
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(own_sd: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(own_sd)
    with pytest.raises(UserError, match=message):
        load_parts(own_sd)


def test_an_index_that_nobody_reads_does_no_harm(own_sd: Path) -> None:
    plain = load_parts(own_sd).text_encoders[0].state_dict()
    for suffix in (".safetensors", ".fp16.safetensors", ".bin"):
        write_index(own_sd / "text_encoder", suffix)
    again = load_parts(own_sd).text_encoders[0].state_dict()
    assert plain.keys() == again.keys() and all(torch.equal(again[name], x) for name, x in plain.items())


def test_missing_paths_and_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_parts(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"assets/nothing does not exist\. Check"):
        load_parts("assets/nothing")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a model folder"):
        load_parts(tmp_path / "file")

    def offline(name: str) -> str:
        raise OSError(f"no network for {name}\nLong advice\nof the hub's client")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", offline)
    with pytest.raises(UserError, match=r"owner/model does not exist here.*hub.*no network") as caught:
        load_parts("owner/model")
    assert "\n" not in str(caught.value) and "advice" not in str(caught.value)


def test_a_slip_in_a_local_path_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models/sd` looks like owner/model, but the folder `models` is here: nothing is asked of the hub."""
    asked: list[str] = []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", asked.append)
    monkeypatch.setattr(files, "ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    for folder in ("models", "repository/bundled"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("models/sd", "bundled/sd"):
        with pytest.raises(UserError, match=f"The model folder {name} does not exist. Check the path"):
            load_parts(name)
    assert not asked


def test_hub_names_are_fetched(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str) -> str:
        asked.append(name)
        return str(tiny_sd)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert load_parts("owner/model").path == str(tiny_sd)
    assert asked == ["owner/model"]


def test_scheduler_class_is_the_folders(tiny_sd: Path) -> None:
    assert type(load_parts(tiny_sd).scheduler) is DDIMScheduler
