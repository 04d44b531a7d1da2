"""`encode-prompts` and training from its cache: the same as encoding on the fly, for every family."""

import functools
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel

from cli import main
from common.errors import UserError
from lightning_modules.networks import prompt_cache
from lightning_modules.networks.backbones.calling import run_network
from lightning_modules.networks.backbones.prompt_encoder import PromptEncoder
from lightning_modules.networks.backbones.stable_diffusion import ClipPromptEncoder
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.prompt_cache import PromptCache, text_identity, use_prompt_cache
from lightning_modules.optimization import RoleOptimization
from lightning_modules.trainer_settings import cast_frozen
from tests.backbones import write_backbone
from tests.conftest import TOKENS
from tests.tiny_distillation import PROMPTS, Pull, distillation, fit, snapshot

NEGATIVES = ["blurry", "a dog on a dog"]


@pytest.fixture(scope="module", params=["sd21_v", "sdxl", "pixart_1024"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One family's folder after another."""
    return write_backbone(request.param, tmp_path_factory.mktemp("models") / request.param)


class Sources(NamedTuple):
    """Prompts in three files of three kinds, with repeats."""

    files: list[Path]
    negatives: Path


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    texts, rows, negatives = tmp_path / "a.txt", tmp_path / "b.jsonl.gz", tmp_path / "negative.txt"
    texts.write_text("\n".join([*PROMPTS[:5], PROMPTS[0], ""]))
    with gzip.open(rows, "wt") as file:
        file.writelines(json.dumps({"caption": text}) + "\n" for text in PROMPTS[4:])
    negatives.write_text("\n".join(NEGATIVES))
    return Sources([texts, rows], negatives)


def encode(model: Path, sources: Sources, output: Path, *options: str, dtype: str = "float32") -> None:
    main([
        "encode-prompts", "--model", str(model), "--prompts", *map(str, sources.files),
        "--negative-prompts", str(sources.negatives), "--output", str(output), "--dtype", dtype, *options,
    ])  # fmt: skip


def encoder_of(model: Path) -> PromptEncoder:
    parts = load_parts(model)
    return parts.backbone.prompt_encoder(parts)


def cached_encoder(model: Path, cache: Path) -> PromptEncoder:
    """One whose text encoders were never loaded."""
    parts = load_parts(model, without=("text_encoders",))
    assert all(parameter.is_meta for network in parts.text_encoders for parameter in network.parameters())
    encoder = parts.backbone.prompt_encoder(parts)
    use_prompt_cache(encoder, parts, cache)
    return encoder


def unmasked(embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
    """With zeros for masked tokens, which networks do not see."""
    if (mask := embeddings.get("encoder_attention_mask")) is None:
        return embeddings
    return embeddings | {"encoder_hidden_states": embeddings["encoder_hidden_states"] * mask[..., None]}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=atol, msg=name)


def test_cached_embeddings_are_those_on_the_fly(
    model: Path, sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(model, sources, tmp_path / "cache")
    assert "12 different texts, 0 of them encoded already. The rest takes" in capsys.readouterr().out
    texts = ["", *PROMPTS, *NEGATIVES]
    assert len(PromptCache(tmp_path / "cache")) == len(texts)
    fresh, cached = encoder_of(model), cached_encoder(model, tmp_path / "cache")
    assert not list(cached.text_encoders.parameters())
    wanted = fresh.embed(texts)
    assert_close(cached.embed(texts), unmasked(wanted))  # one batch as in the command: bit for bit
    assert_close(cached.null(), unmasked(fresh.null()), atol=1e-6)
    some = [texts[11], texts[3], texts[3]]
    assert_close(cached.embed(some), unmasked(fresh.embed(some)), atol=1e-6)


@pytest.mark.parametrize(
    "model", ["sd21_v", "sdxl", "pixart_1024", "sana", "zimage", "klein", "qwen"], indirect=True
)
def test_the_network_sees_no_difference(
    model: Path, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is told of no prompt; nothing is encoded again."""
    encode(model, sources, tmp_path / "cache")
    monkeypatch.setattr(PromptCache, "_encode", None)
    parts = load_parts(model)
    torch.manual_seed(0)
    noise, t = torch.randn(2, *parts.latent_shape), torch.tensor([10, 500])
    encoders = encoder_of(model), cached_encoder(model, tmp_path / "cache")
    conditions = [encoder.encode([PROMPTS[0], ""]) for encoder in encoders]
    with torch.no_grad():
        outputs = [run_network(parts.denoiser, noise, t, condition) for condition in conditions]
        nulls = [run_network(parts.denoiser, noise, t, condition.without_text()) for condition in conditions]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    torch.testing.assert_close(*nulls, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_and_comes_back_as_wanted(
    tiny_sd: Path, sources: Sources, tmp_path: Path, dtype: str
) -> None:
    encode(tiny_sd, sources, tmp_path / "cache", dtype=dtype)
    wanted = encoder_of(tiny_sd).embed(["", *PROMPTS, *NEGATIVES])
    cached = cached_encoder(tiny_sd, tmp_path / "cache")
    kept = {name: x.to(getattr(torch, dtype)) for name, x in wanted.items()}
    texts = ["", *PROMPTS, *NEGATIVES]
    assert_close(cached.embed(texts), {name: x.float() for name, x in kept.items()})
    cast_frozen([cached], torch.bfloat16)  # as in a bf16 run on a GPU
    assert_close(cached.embed(texts), {name: x.bfloat16() for name, x in kept.items()})
    assert cached.null()["encoder_hidden_states"].dtype == torch.bfloat16


def test_an_interrupted_run_goes_on(
    tiny_sd: Path, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, seen = ClipPromptEncoder.embed_texts, list[str]()

    def watched(stop_at: int) -> Callable[[PromptEncoder, list[str]], dict[str, Tensor]]:
        def embed_texts(self: Any, prompts: list[str]) -> dict[str, Tensor]:
            if len(seen) >= stop_at:
                raise KeyboardInterrupt
            seen.extend(prompts)
            return whole(self, prompts)

        return embed_texts

    with monkeypatch.context() as patch:
        patch.setattr(ClipPromptEncoder, "embed_texts", watched(20))  # 14 of the estimate
        with pytest.raises(KeyboardInterrupt):
            encode(tiny_sd, sources, tmp_path / "cache", "--batch-size", "3")
    assert "The same command goes on where this one ended" in capsys.readouterr().err
    kept = len(PromptCache(tmp_path / "cache"))
    assert kept == len(seen) - 14 == 6
    with monkeypatch.context() as patch:
        patch.setattr(ClipPromptEncoder, "embed_texts", watched(100))
        encode(tiny_sd, sources, tmp_path / "cache", "--batch-size", "3")
    assert "12 different texts, 6 of them encoded already" in capsys.readouterr().out
    texts = ["", *PROMPTS, *NEGATIVES]
    assert set(seen) == set(texts) and len(seen) == 14 + 6 + 14 + 6
    cached = cached_encoder(tiny_sd, tmp_path / "cache")
    assert_close(cached.embed(texts), encoder_of(tiny_sd).embed(texts), atol=1e-6)


def test_too_small_a_disk_is_told_before_anything_is_encoded(
    tiny_sd: Path, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2048))
    with pytest.raises(UserError, match=r"takes about 0\.0 MiB of 0\.0 MiB free .*make room"):
        encode(tiny_sd, sources, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_training_from_a_cache_is_the_training_on_the_fly(
    tiny_sd: Path, sources: Sources, tmp_path: Path
) -> None:
    encode(tiny_sd, sources, tmp_path / "cache")
    # large gradients and plain descent keep rounding small, which Adam would not
    descent = RoleOptimization(functools.partial(torch.optim.SGD, lr=1e-2))
    trained = []
    for cache in (None, str(tmp_path / "cache")):
        module = distillation(tiny_sd, Pull(1.0), prompt_cache=cache, student=descent, fake_score=descent)
        fit(module, tmp_path, 2)
        assert ("text encoders" in module.memory_parts()) == (cache is None)
        trained.append(snapshot(module.student))
    assert all(parameter.is_meta for parameter in module.parts.text_encoders[0].parameters())
    start = snapshot(load_parts(tiny_sd).denoiser)
    assert max(float((trained[0][name] - start[name]).abs().max()) for name in start) > 1e-3
    assert_close(trained[1], trained[0], atol=1e-6)


def test_a_prompt_outside_the_cache_is_encoded_on_the_cpu(
    tiny_sd: Path, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(tiny_sd, sources, tmp_path / "cache")
    loads, load = [], prompt_cache.load_parts
    monkeypatch.setattr(prompt_cache, "load_parts", lambda *a, **k: loads.append(a) or load(*a, **k))
    cached = cached_encoder(tiny_sd, tmp_path / "cache")
    cached.embed(PROMPTS)
    assert loads == []
    texts = ["a green mouse", PROMPTS[0], "a mouse"]
    with pytest.warns(UserWarning, match=r"'a green mouse' is not in the cache .*on the CPU.*encode-prompts"):
        found = cached.embed(texts)
    assert_close(found, encoder_of(tiny_sd).embed(texts), atol=1e-6)
    cached.embed(["a third mouse"])  # neither loaded nor told again
    assert len(loads) == 1
    assert not list(cached.text_encoders.parameters())


def test_a_cache_of_another_encoder_is_refused(
    tiny_sd: Path, own_sd: Path, sources: Sources, tmp_path: Path
) -> None:
    encode(tiny_sd, sources, tmp_path / "cache")
    encoder = CLIPTextModel.from_pretrained(own_sd / "text_encoder")
    next(encoder.parameters()).data[0, 0] += 1
    encoder.save_pretrained(own_sd / "text_encoder")
    message = rf"was made with the text encoder of {tiny_sd} \(.*that of {own_sd} \("
    with pytest.raises(UserError, match=message):  # and not by what Lightning does after an error
        fit(distillation(own_sd, prompt_cache=str(tmp_path / "cache")), tmp_path, 1)
    with pytest.raises(UserError, match=message):
        encode(own_sd, sources, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no cache of prompts .*encode-prompts"):
        fit(distillation(own_sd, prompt_cache=str(tmp_path / "empty")), tmp_path, 1)


def identity(folder: Path, **changes: Any) -> str:
    parts = load_parts(folder, without=("denoiser", "vae", "text_encoders"))
    for name, value in changes.items():
        setattr(parts.tokenizers[0], name, value)
    parts.tokenizers[0](["a call", "that pads"], padding=True, truncation=True, max_length=4)
    return text_identity(parts, parts.backbone.prompt_encoder(parts))["hash"]


def test_an_encoder_is_known_by_what_it_does(tiny_sd: Path, own_sd: Path) -> None:
    """Not by how it was saved: in pieces, with remarks in its settings, beside a variant."""
    first = identity(tiny_sd)
    encoder = CLIPTextModel.from_pretrained(own_sd / "text_encoder")
    shutil.rmtree(own_sd / "text_encoder")
    encoder.save_pretrained(own_sd / "text_encoder", max_shard_size="5KB")
    assert len(list((own_sd / "text_encoder").glob("*.safetensors"))) > 1
    (own_sd / "text_encoder" / "model.fp16.safetensors").write_bytes(b"a variant")
    config = own_sd / "text_encoder" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "transformers_version": "1.0", "_name_or_path": "x"}))
    assert identity(own_sd) == first
    parts = load_parts(tiny_sd)  # loaded or not
    assert text_identity(parts, parts.backbone.prompt_encoder(parts))["hash"] == first
    assert identity(own_sd, model_max_length=TOKENS - 1) != first
    config.write_text(json.dumps({**settings, "hidden_act": "gelu"}))
    assert identity(own_sd) != first
    config.write_text(json.dumps(settings))
    tokenizer = own_sd / "tokenizer" / "tokenizer.json"
    rules = json.loads(tokenizer.read_text())
    words = rules["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    tokenizer.write_text(json.dumps(rules))
    assert identity(own_sd) != first


def test_a_batch_of_nothing_is_refused(tiny_sd: Path, sources: Sources, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--batch-size 0: must be"):
        encode(tiny_sd, sources, tmp_path / "cache", "--batch-size", "0")


def test_a_variant_is_an_encoder_of_its_own(own_sd: Path) -> None:
    encoder = CLIPTextModel.from_pretrained(own_sd / "text_encoder")
    encoder.half().save_pretrained(own_sd / "text_encoder", variant="fp16")
    plain, half = identity(own_sd), identity(Path(f"{own_sd}#fp16"))
    assert plain != half
    (own_sd / "text_encoder" / "model.safetensors").unlink()
    assert identity(Path(f"{own_sd}#fp16")) == half  # its weights alone count
