"""NAME[@REVISION][#VARIANT]: folders, variants of weights, and models of the hub without a network."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from lightning_modules.networks.backbones import BACKBONES
from lightning_modules.networks.interpolation import stored_dtype
from lightning_modules.networks.loading import load_parts, model_hash, pipeline_folder
from lightning_modules.networks.lora import LoraSettings, StudentAdapter, StudentBase, lora_card
from lightning_modules.networks.model_names import ModelName, model_name
from lightning_modules.networks.student import architecture, load_student
from lightning_modules.pipelines import load_any_pipeline


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty; nothing is asked of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def offline(name: str, **options: Any) -> str:
        raise OSError(f"no network for {name} {options}")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", offline)
    return tmp_path / "hub"


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("plain", "a@b#c"):
        (tmp_path / folder).mkdir()
    cases = {
        "owner/model": ModelName("owner/model"),
        "owner/model@v1.0": ModelName("owner/model", "v1.0"),
        "owner/model#fp16": ModelName("owner/model", None, "fp16"),
        "owner/model@refs/pr/1#fp16": ModelName("owner/model", "refs/pr/1", "fp16"),
        "plain#fp16": ModelName("plain", None, "fp16"),
        "a@b#c": ModelName("a@b#c"),
        "a@b#c#fp16": ModelName("a@b#c", None, "fp16"),
    }
    assert {given: model_name(given) for given in cases} == cases
    assert cases["owner/model@refs/pr/1#fp16"].options == {"revision": "refs/pr/1", "variant": "fp16"}
    mistakes = {
        "owner/model@": "no revision behind the @",
        "plain#": "no variant behind",
        "plain@v1#fp16": r"^plain is a folder here, which has no revisions\. Leave @v1 out\.$",
    }
    for given, message in mistakes.items():
        with pytest.raises(UserError, match=message):
            model_name(given)


def weights(network: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def moved(folder: Path, by: float) -> Any:
    """The folder's UNet with every weight moved by a number."""
    unet = load_parts(folder).denoiser
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += by
    return unet


def test_variants(own_sd: Path) -> None:
    """In shards and half precision; parts without the variant keep their plain weights."""
    plain = weights(load_parts(own_sd).denoiser)
    half = moved(own_sd, 0.5).half()
    half.save_pretrained(own_sd / "unet", variant="fp16", max_shard_size="60KB")
    assert len(list((own_sd / "unet").glob("*.fp16-0000*.safetensors"))) > 1
    named = f"{own_sd}#fp16"
    torch.testing.assert_close(weights(load_parts(named).denoiser), plain + 0.5, rtol=0, atol=1e-3)
    assert torch.equal(weights(load_parts(own_sd).denoiser), plain)
    assert stored_dtype(named) == torch.float16 and stored_dtype(str(own_sd)) == torch.float32
    again = load_student(named)
    assert again.start_timestep == 999 and again.parts.path == named and pipeline_folder(named) == own_sd
    hashes = {model_hash(named), model_hash(own_sd)}
    moved(own_sd, 1.0).half().save_pretrained(own_sd / "unet", variant="fp16", max_shard_size="60KB")
    hashes |= {model_hash(named), model_hash(own_sd)}
    assert len(hashes) == 4  # pictures of one are never taken for another's
    torch.testing.assert_close(weights(load_parts(named).denoiser), plain + 1, rtol=0, atol=1e-3)
    (own_sd / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="part 'unet' has weights of a variant only, .*: NAME#fp16"):
        load_parts(own_sd)
    shutil.rmtree(own_sd / "unet")
    with pytest.raises(UserError, match=r"no weights of the variant 'fp16'. Leave #fp16 behind"):
        load_parts(named)


def test_a_stock_pipeline_takes_the_variant(own_sd: Path) -> None:
    """A class that is not drawn with here goes through diffusers' own loader."""
    moved(own_sd, 0.5).save_pretrained(own_sd / "unet", variant="half")
    found = [weights(load_any_pipeline(name).unet) for name in (str(own_sd), f"{own_sd}#half")]
    torch.testing.assert_close(found[1], found[0] + 0.5)


def put_into_cache(cache: Path, model: Path, revision: str, commit: str) -> Path:
    """A model of the hub's cache, in huggingface_hub's layout."""
    repository = cache / "models--owner--model"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    shutil.copytree(model, repository / "snapshots" / commit)
    return repository / "snapshots" / commit


def test_cached_models_are_read_without_the_hub(cache: Path, tiny_sd: Path, own_sd: Path) -> None:
    moved(own_sd, 0.5).save_pretrained(own_sd / "unet", variant="half")
    main = put_into_cache(cache, tiny_sd, "main", "1" * 40)
    put_into_cache(cache, own_sd, "v2", "2" * 40)
    plain = weights(load_parts(tiny_sd).denoiser)
    assert load_parts("owner/model").path == str(main)
    torch.testing.assert_close(weights(load_parts("owner/model@v2").denoiser), plain)
    torch.testing.assert_close(weights(load_parts("owner/model@v2#half").denoiser), plain + 0.5)
    commit = f"owner/model@{'2' * 40}#half"
    torch.testing.assert_close(weights(load_parts(commit).denoiser), plain + 0.5)


def test_a_checkpoint_names_its_teachers_revision(cache: Path, tiny_sd: Path, tmp_path: Path) -> None:
    put_into_cache(cache, tiny_sd, "v2", "2" * 40)
    unet = load_parts("owner/model@v2").denoiser
    one_step = {"teacher": "owner/model@v2", "start_timestep": 625, "architecture": architecture(unet)}
    state = {f"student.{name}": p for name, p in unet.state_dict().items()}
    torch.save({"state_dict": state, "one_step": one_step}, tmp_path / "a.ckpt")
    student = load_student(tmp_path / "a.ckpt")
    assert student.facts["teacher"] == "owner/model@v2"
    assert torch.equal(weights(student.parts.denoiser), weights(unet))


def test_what_is_missing_is_named(cache: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And fetched, with the revision and variant asked for, where there is a network."""
    with pytest.raises(UserError, match=r"no network.*not in the local .*: hf download owner/model$"):
        load_parts("owner/model")
    snapshot = put_into_cache(cache, tiny_sd, "v2", "2" * 40)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    message = r"part 'unet' is missing its weights.*: hf download owner/model --revision v2$"
    with pytest.raises(UserError, match=message):
        load_parts("owner/model@v2")
    with pytest.raises(UserError, match=r"no weights of the variant 'fp16'.*hf download"):
        load_parts("owner/model@v2#fp16")
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tiny_sd)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert load_parts("owner/model@v2").path == str(tiny_sd)
    assert asked == [("owner/model", {"revision": "v2"})]


def test_half_a_download_is_fetched_again(
    cache: Path, own_sd: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("plain", "half"):
        mark = {} if kind == "plain" else {"variant": "half"}
        moved(own_sd, 0.5).save_pretrained(own_sd / "unet", max_shard_size="60KB", **mark)
        if kind == "plain":
            (own_sd / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    snapshot = put_into_cache(cache, own_sd, "main", "1" * 40)
    plain, half = (sorted((snapshot / "unet").glob(f"*model{mark}-0*.safetensors")) for mark in ("", ".half"))
    assert len(plain) == len(half) > 2
    for name, shards in (("owner/model", plain), ("owner/model#half", half)):
        assert load_parts(name).path  # whole
        for shard in shards[1:]:
            shard.unlink()
        first = shards[1].name
        message = rf"part 'unet' is missing {len(plain) - 1} of its files of weights, {first} .*: hf download"
        with pytest.raises(UserError, match=message):
            load_parts(name)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda *_, **__: str(tiny_sd))
    assert load_parts("owner/model").path == str(tiny_sd)


def test_a_loras_card_names_its_base() -> None:
    adapter = StudentAdapter(StudentBase("owner/model@v2#fp16", "0"), LoraSettings(rank=4, alpha=2.0), {})
    card = lora_card(adapter, BACKBONES[0], "out", "num_inference_steps=1")
    assert 'from_pretrained("owner/model", revision="v2", variant="fp16", torch_dtype=torch.float32)' in card
    assert "right at scale 1 in diffusers" in card and 'pipe.load_lora_weights("out/lora")' in card
