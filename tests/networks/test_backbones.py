"""Every family: prompts, network calls and start of the student as in the stock pipeline or closed form."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from lightning_modules.build import NetworkSettings, build_networks, teacher_facts
from lightning_modules.diffusion.condition import Condition
from lightning_modules.diffusion.steps import Steps
from lightning_modules.generator import make_generator
from lightning_modules.guidance import negative_attention
from lightning_modules.guidance.methods import Nasa
from lightning_modules.guidance.prompting import pipeline_network
from lightning_modules.networks import loading
from lightning_modules.networks.backbones.calling import GUIDANCE, run_network
from lightning_modules.networks.backbones.codec import codes_of, latents_of
from lightning_modules.networks.backbones.flux import pack, unpack
from lightning_modules.networks.backbones.stable_diffusion_3 import CountedLastToken, attend_counted
from lightning_modules.networks.decoder import LatentDecoder
from lightning_modules.networks.loading import load_parts, noise_schedule
from lightning_modules.networks.lora import LoraSettings, StudentLoraSettings, inject_adapter
from lightning_modules.networks.pipeline_folder import one_step_scheduler
from lightning_modules.objectives.discriminator import Discriminator
from lightning_modules.objectives.swiftbrush import SwiftBrush
from tests.backbones import FLOWS, SCHEDULERS, call_options, private_copy, stock_pipeline_of, without_t5
from tests.conftest import make_tokenizer

PROMPTS = ["a Red cat ", "", "two green cups of tea " * 30]  # the last one is cut
pytestmark = pytest.mark.filterwarnings("ignore:A prompt has more than")

Folder = Callable[[str], Path]


def encode(folder: Path, prompts: list[str] = PROMPTS) -> Condition:
    parts = load_parts(folder)
    return parts.backbone.prompt_encoder(parts).encode(prompts)


@pytest.mark.parametrize("name", ["sd15", "sd21_v", "sdxl", "pixart", "pixart_1024", *FLOWS])
def test_conditions_are_the_pipelines(name: str, backbone_folder: Folder) -> None:
    pipe: Any = stock_pipeline_of(backbone_folder(name))
    texts = PROMPTS
    with torch.no_grad():
        if name == "sdxl":
            text, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, device="cpu")
            expected = {"encoder_hidden_states": (text, null), "text_embeds": (pooled, null_pooled)}
        elif name == "sd3":
            text, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, None, None, device="cpu")
            expected = {"encoder_hidden_states": (text, null), "pooled_projections": (pooled, null_pooled)}
        elif name == "flux":
            (text, pooled, _), (null, null_pooled, _) = (pipe.encode_prompt(x, None) for x in (PROMPTS, [""]))
            null, null_pooled = null.expand_as(text), null_pooled.expand_as(pooled)
            expected = {"encoder_hidden_states": (text, null), "pooled_projections": (pooled, null_pooled)}
        elif name == "zimage":
            rows = pipe.encode_prompt(list(PROMPTS))
            text, null = (torch.stack([F.pad(x, (0, 0, 0, 512 - len(x))) for x in side]) for side in rows)
            expected = {"encoder_hidden_states": (text, null)}
        elif name == "klein":
            expected = {"encoder_hidden_states": tuple(pipe.encode_prompt(x)[0] for x in (PROMPTS, [""]))}
        elif name == "qwen":
            sides = [pipe.encode_prompt(x, max_sequence_length=512) for x in (PROMPTS, [" "])]
            text, null = (F.pad(x, (0, 0, 0, 512 - x.shape[1])) for x, _ in sides)
            mask = F.pad(sides[0][1], (0, 512 - sides[0][0].shape[1]))
            null_mask = (torch.arange(512) < sides[1][0].shape[1]).long()[None]
            expected = {"encoder_hidden_states": (text, null), "encoder_attention_mask": (mask, null_mask)}
        elif name == "sana":
            texts = [text or "a" for text in PROMPTS]  # the pipeline has an instruction for an empty prompt
            default = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
            text, mask, null, null_mask = pipe.encode_prompt(texts, complex_human_instruction=default)
            expected = {"encoder_hidden_states": (text, null), "encoder_attention_mask": (mask, null_mask)}
        elif name.startswith("pixart"):
            text, mask, null, null_mask = pipe.encode_prompt(PROMPTS, device="cpu", clean_caption=False)
            expected = {"encoder_hidden_states": (text, null), "encoder_attention_mask": (mask, null_mask)}
        else:
            expected = {"encoder_hidden_states": pipe.encode_prompt(PROMPTS, "cpu", 1, True)}
    condition = encode(backbone_folder(name), texts)
    for key, (given, without) in expected.items():
        torch.testing.assert_close(condition.tensors[key], given, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(condition.null[key].expand_as(without), without, rtol=1e-6, atol=1e-6)
    assert condition.tensors.keys() - expected.keys() == {
        "sdxl": {"time_ids"}, "zimage": {"encoder_attention_mask"},
        "pixart_1024": {"resolution", "aspect_ratio"},
    }.get(name, set())  # fmt: skip


def test_no_prompt_of_sdxl_is_zero_and_not_the_empty_prompt(backbone_folder: Folder, tmp_path: Path) -> None:
    condition = encode(backbone_folder("sdxl"))
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
    assert torch.equal(condition.null["time_ids"], sizes)
    for key in ("encoder_hidden_states", "text_embeds"):
        assert not condition.null[key].any() and condition.tensors[key][1].abs().max() > 0.1
    other = private_copy(backbone_folder("sdxl"), tmp_path / "other")
    index = (other / "model_index.json").read_text()
    (other / "model_index.json").write_text(index.replace('empty_prompt": true', 'empty_prompt": false'))
    assert torch.equal(encode(other, [""]).null["text_embeds"], encode(other, [""]).tensors["text_embeds"])


@pytest.mark.parametrize("name", ["sd15", "sd21_v", "lcm", "sdxl", "pixart", "pixart_1024", *FLOWS])
def test_the_network_is_called_as_the_pipeline_calls_it(name: str, backbone_folder: Folder) -> None:
    """Guided: both halves, so that what stands for no prompt is in it; LCM takes the scale as an input."""
    pipe: Any = stock_pipeline_of(backbone_folder(name))
    network: Any = pipeline_network(pipe)
    calls: list[tuple[Any, Any, Tensor]] = []
    forward = network.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        x_t, *args = args or [kwargs["hidden_states"]]
        taken = [torch.stack(x) if isinstance(x, list) else x for x in (x_t, output[0])]
        calls.append((taken[0], kwargs.get("timestep", args[0] if args else None), taken[1]))
        return output

    network.forward = recorded
    torch.manual_seed(0)
    texts = [text or "a" for text in PROMPTS]
    guidance = (
        {"true_cfg_scale": 8.5, "negative_prompt": [" "] * 3} if name == "qwen" else {"guidance_scale": 8.5}
    )
    pipe(prompt=list(texts), num_inference_steps=3, output_type="latent", **guidance, **call_options(pipe))
    condition = encode(backbone_folder(name), texts)
    if name == "flux":  # the scale is an input; packed tokens, and times from 0 to 1
        scale = torch.full((len(PROMPTS),), 8.5)
        condition = Condition({**condition.tensors, GUIDANCE: scale}, {**condition.null, GUIDANCE: scale[:1]})
        calls = [(unpack(x_t, 8, 8), t * 1000, unpack(output, 8, 8)) for x_t, t, output in calls]
    elif name != "lcm":
        condition = condition.without_text().concat(condition)
    if name in ("klein", "qwen"):  # two calls, and as FLUX
        pairs = zip(calls[1::2], calls[::2], strict=True)
        calls = [tuple(torch.cat(both) for both in zip(*pair, strict=True)) for pair in pairs]
        side = (lambda x: unpack(x, 8, 8)) if name == "qwen" else (lambda x: x.mT.unflatten(2, (4, 4)))
        calls = [(side(x_t), t * 1000, side(output)) for x_t, t, output in calls]
    if name == "zimage":  # with text first; inverted time, negated output, of one frame
        calls = [
            (x_t.squeeze(2).roll(3, 0), 1000 - t * 1000, -output.squeeze(2).roll(3, 0))
            for x_t, t, output in calls
        ]
    if name == "sana":  # half the time, by its own scale
        calls = [(x_t, t * 2, output) for x_t, t, output in calls]
    parts = load_parts(backbone_folder(name))
    for x_t, t, expected in calls:
        with torch.no_grad():
            output = run_network(parts.denoiser, x_t, torch.as_tensor(t).expand(len(x_t)), condition)
        torch.testing.assert_close(output, expected[:, : output.shape[1]], rtol=1e-5, atol=1e-5)
    channels = {"pixart": 8, "pixart_1024": 8, "klein": 16}.get(name, 4)
    assert expected.shape[1] == channels and len(calls) >= 3
    assert parts.denoiser.config.get("time_cond_proj_dim") == (6 if name == "lcm" else None)
    if name in FLOWS:  # the scheduler's times, which the next test compares with ours
        times = torch.stack([torch.as_tensor(call[1]).flatten()[0] for call in calls])
        torch.testing.assert_close(times.float(), pipe.scheduler.timesteps.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_the_flow_schedule_is_the_pipelines(
    name: str, backbone_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All σ by the scheduler, shifted as in a call of the pipeline with its default number of steps."""
    pipe: Any = stock_pipeline_of(backbone_folder(name))
    scheduler, shift = pipe.scheduler, {}

    class Asked(Exception):
        """The pipeline has said by how much to shift."""

    @functools.wraps(scheduler.set_timesteps)
    def asked(*args: Any, **options: Any) -> None:
        shift.update(mu=options.get("mu"))
        raise Asked

    with monkeypatch.context() as patch, pytest.raises(Asked):
        patch.setattr(scheduler, "set_timesteps", asked)
        pipe(prompt=["a"], **call_options(pipe))
    if name == "sana":  # this one starts below 1, at 0.999
        scheduler.set_timesteps(999)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.001, 1000), **shift)
    parts = load_parts(backbone_folder(name))
    schedule = noise_schedule(parts.scheduler, parts.image_tokens, parts.backbone)
    sigma = scheduler.sigmas[:-1]  # without the 0 at the end
    torch.testing.assert_close(schedule.sigma[: len(sigma)].flip(0), sigma, rtol=1e-5, atol=1e-7)
    told = schedule.network_time(torch.arange(len(sigma))).flip(0)
    whole_numbers = scheduler.timesteps.dtype == torch.int64
    torch.testing.assert_close(told, scheduler.timesteps.float(), rtol=1e-5, atol=1.0 if whole_numbers else 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zimage", {"guidance_scale": 3.5}),
        ("klein", {"guidance_scale": 4.5}),
        ("qwen", {"true_cfg_scale": 4.5, "negative_prompt": [" ", " "]}),
    ],
)
def test_guidance_is_the_pipelines(name: str, options: dict[str, Any], backbone_folder: Folder) -> None:
    """One guided step: Z-Image counts from 0, Qwen-Image keeps the norm of each token."""
    parts = load_parts(backbone_folder(name))
    ours = make_generator(parts, 999).images(["a Red cat", "a dog"], [1, 2], guidance_scale=4.5)
    pipe: Any = stock_pipeline_of(backbone_folder(name))
    pipe.scheduler = one_step_scheduler(parts.scheduler, 999)
    options |= {"num_inference_steps": 1, "output_type": "pt", **call_options(pipe)}
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    stock = pipe(prompt=["a Red cat", "a dog"], generator=noise, **options).images
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
    z = torch.randn(2, *parts.latent_shape)
    codes = codes_of(parts.vae, z)
    assert (codes.flatten() - z.flatten()).abs().max() > 0.1
    torch.testing.assert_close(latents_of(parts.vae, codes), z, rtol=1e-5, atol=1e-5)
    assert LatentDecoder(parts.vae).encode(ours).shape == z.shape


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_gradient_checkpointing_changes_nothing(name: str, backbone_folder: Folder) -> None:
    parts = load_parts(backbone_folder(name))
    network: Any = parts.denoiser.train()
    condition = parts.backbone.prompt_encoder(parts).encode(["a red cat", "a dog"])
    x_t = torch.randn(2, 4, 8, 8)
    gradients = []
    for _ in range(2):
        run_network(network, x_t, torch.tensor([625, 20]), condition).square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        network.zero_grad()
        network.enable_gradient_checkpointing()
    assert sum(g.norm() for g in gradients[0]) > 0.01
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("method", ["sdxl", "pixart"])
def test_negative_prompts_are_attended_to_with_their_mask(method: str, backbone_folder: Folder) -> None:
    """PixArt's padding does not count; SDXL's counts, as in its own prompts."""
    parts = load_parts(backbone_folder(method))
    encoder = parts.backbone.prompt_encoder(parts)
    condition, negative = encoder.encode(["a red cat"]), encoder.encode(["a blue mat"])
    short = {name: x[:, :8] if name.startswith("encoder") else x for name, x in negative.tensors.items()}
    cut = Condition(short, {name: x[:1] for name, x in short.items()})
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([625])

    def output(text: Condition | None) -> Tensor:
        if text is None:
            return run_network(parts.denoiser, x_t, t, condition)
        with negative_attention(parts.denoiser, text, Nasa(0.5)):
            return run_network(parts.denoiser, x_t, t, condition)

    with torch.no_grad():
        whole, shortened, plain = output(negative), output(cut), output(None)
    assert (whole - plain).abs().max() > 1e-4
    if method == "pixart":
        mask = negative.tensors["encoder_attention_mask"]
        assert mask[0, 8:].sum() == 0 < mask[0, :8].sum() < 8
        torch.testing.assert_close(whole, shortened, rtol=1e-5, atol=1e-6)
    else:
        assert (whole - shortened).abs().max() > 1e-5


# --- files ------------------------------------------------------------------------------------------------


def test_vocab_and_merges_are_read(backbone_folder: Folder) -> None:
    first, second = load_parts(backbone_folder("sdxl")).tokenizers
    expected = make_tokenizer()(["a red cat", "Dog?"]).input_ids
    assert first(["a red cat", "Dog?"]).input_ids == expected == second(["a red cat", "Dog?"]).input_ids
    padded = [t("cat", padding="max_length")["input_ids"][-1] for t in (first, second)]
    assert first.convert_ids_to_tokens(padded) == ["<|endoftext|>", "!"]


def test_a_sentencepiece_model_is_read(backbone_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As published, without tokenizer.json; where the library is not installed, it is named."""
    folder = backbone_folder("pixart")
    assert not (folder / "tokenizer" / "tokenizer.json").exists()
    tokenizer = load_parts(folder).tokenizers[0]
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    for text in ("a red cat and the dog", "unknown Wörds, too"):
        assert tokenizer(text).input_ids == [*reference.encode(text), reference.eos_id()]
    assert tokenizer("a", padding="max_length", max_length=5).attention_mask[-1] == 0
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'spiece.model.*sentencepiece.*pip install -e "\.\[pixart\]"'):
        load_parts(folder)


# --- schedules --------------------------------------------------------------------------------------------


def test_schedules_are_the_published_ones(backbone_folder: Folder) -> None:
    """Stable Diffusion's alpha_bar 0.0047 at the end, PixArt's 4e-5, and none at zero SNR."""
    last = {
        name: float(noise_schedule(load_parts(backbone_folder(name)).scheduler).alphas_cumprod[-1])
        for name in ("sd15", "sdxl", "pixart", "zero_snr")
    }
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    linear = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    assert last["sd15"] == last["sdxl"] == pytest.approx(float((1 - betas).prod()), rel=1e-3)
    assert last["pixart"] == pytest.approx(float((1 - linear).prod()), rel=1e-3)
    assert last["zero_snr"] == 0


@pytest.mark.parametrize("name", ["sd21_v", "zero_snr"])
def test_v_students_start_from_the_right_x0(name: str, backbone_folder: Folder) -> None:
    """x0 = alpha_T z - sigma_T v, which is -v where alpha_T = 0 and sigma_T = 1."""
    parts = load_parts(backbone_folder(name))
    generator = make_generator(parts, 999)
    z, condition = generator.noise([1, 2]), generator.prompt_encoder.encode(["a cat", "a dog"])
    with torch.no_grad():
        v = run_network(parts.denoiser, z, torch.tensor([999, 999]), condition)
        x0 = generator.latents(z, condition)
    if name == "zero_snr":
        assert torch.equal(x0, -v)
        return
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    alpha_bar = float((1 - betas).prod())
    torch.testing.assert_close(x0, alpha_bar**0.5 * z - (1 - alpha_bar) ** 0.5 * v, rtol=1e-3, atol=1e-4)


def test_zero_snr_is_zero_whatever_the_scheduler_stores() -> None:
    """Euler's puts 2^-24 in its place; noise prediction has no x0 there and is refused."""
    settings = SCHEDULERS["zero_snr"][1]
    settings = {k: v for k, v in settings.items() if k not in ("clip_sample", "set_alpha_to_one")}
    schedule = noise_schedule(EulerDiscreteScheduler(**settings))
    assert schedule.alphas_cumprod[-1] == 0 and schedule.alpha[-1] == 0 and schedule.sigma[-1] == 1
    with pytest.raises(UserError, match="alpha 0 at its last timestep .*predicts epsilon"):
        noise_schedule(EulerDiscreteScheduler(**settings | {"prediction_type": "epsilon"}))


def test_packing_is_flux_own() -> None:
    x = torch.randn(2, 3, 4, 6)
    tokens = pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 3, 4, 6))
    assert torch.equal(unpack(tokens, 4, 6), x)


def test_published_sizes() -> None:
    """Full-size transformers: in bf16 4.5 GB of Stable Diffusion 3.5 medium, 23.8 GB of FLUX.1, 12.3 GB of
    Z-Image, 7.8 GB of FLUX.2 klein 4B, 40.9 GB of Qwen-Image.

    SANA's paper (arXiv 2410.10629) has 1604 and 590 million.
    """
    with torch.device("meta"):
        medium = SD3Transformer2DModel(
            sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
            pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
        )  # fmt: skip
        flux = FluxTransformer2DModel(guidance_embeds=True)
        z_image, qwen = ZImageTransformer2DModel(), QwenImageTransformer2DModel()
        klein = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
            guidance_embeds=False,
        )  # fmt: skip
        sana = SanaTransformer2DModel(caption_channels=2304)
        small_sana = SanaTransformer2DModel(
            num_layers=28, num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72,
            cross_attention_dim=1152, caption_channels=2304,
        )  # fmt: skip
    networks = (medium, flux, z_image, klein, qwen, sana, small_sana)
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes[:5] == [2_243_171_520, 11_901_408_320, 6_154_908_736, 3_875_544_576, 20_430_401_088]
    assert [round(size / 1e6) for size in sizes[5:]] == [1604, 592]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("sd3", "transformer_blocks.0.ff"), ("sana", "transformer_blocks.0"), ("zimage", "layers.0"),
        ("flux", "single_transformer_blocks.0.proj_mlp"),
        ("klein", "single_transformer_blocks.0"), ("qwen", "transformer_blocks.0.img_mlp"),
    ],
)  # fmt: skip
def test_features_of_transformers_for_a_discriminator(name: str, layer: str, backbone_folder: Folder) -> None:
    """Heads fit them (their shape is found without any values), and a gradient comes to the latents."""
    lora = LoraSettings(rank=2, alpha=4.0, targets=["to_q"])
    settings = NetworkSettings(
        str(backbone_folder(name)), Steps((999,)), lora, None,
        StudentLoraSettings(rank=2, alpha=4.0, targets=["to_q"]), None, False,
    )  # fmt: skip
    built = build_networks(settings, SwiftBrush())
    facts, discriminator = teacher_facts(built), Discriminator([layer], role="teacher")
    discriminator.build(facts)
    x = torch.randn(2, *built.parts.latent_shape, requires_grad=True)
    t, condition = torch.tensor([300, 700]), built.generator.prompt_encoder.encode(["a red cat", "a dog"])
    features = built.networks.teacher(x, t, condition, features=[layer]).features[layer]
    assert features.shape[0] == 2 and features.shape[-1] == facts.feature_shape(layer)[-1]
    if name != "flux":  # whose guidance is an input
        guided = built.networks.teacher(x, t, condition, 3.0, features=[layer]).features[layer]
        torch.testing.assert_close(guided, features, rtol=1e-4, atol=1e-4)
    logits = discriminator.logits(x, t, condition, built.networks)
    assert logits.shape == (2, 1)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert all(bool(one.any()) for one in gradient)


# --- Stable Diffusion 3 without T5 ------------------------------------------------------------------------


def test_zeros_in_the_place_of_t5_are_computed_once(backbone_folder: Folder, tmp_path: Path) -> None:
    """As the whole network: output, gradients of all weights and of an adapter's; also recomputed."""
    parts = load_parts(without_t5(backbone_folder("sd3"), tmp_path / "sd3"))
    network, ours = parts.denoiser, parts.denoiser.transformer_blocks[0].attn.processor
    stock = load_parts(backbone_folder("sd3")).denoiser.transformer_blocks[0].attn.processor
    assert type(ours) is CountedLastToken and type(stock) is JointAttnProcessor2_0
    targets = ["to_q", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.2", "context_embedder"]
    inject_adapter(network, LoraSettings(rank=2, alpha=4.0, targets=targets), "fake_score")
    torch.manual_seed(0)
    for parameter in network.requires_grad_(True).parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder = parts.backbone.prompt_encoder(parts)
    condition, negative = encoder.encode(["a red cat", "a dog"]), encoder.encode(["tea"])
    text = condition.tensors["encoder_hidden_states"]
    x, t, lengths = torch.randn(2, 4, 8, 8, requires_grad=True), torch.tensor([3.0, 700.0]), []
    network.context_embedder.register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[1]))

    def output(processor: Any, condition: Condition = condition) -> Tensor:
        network.set_attn_processor(processor)
        return run_network(network, x, t, condition)

    def with_gradients(processor: Any) -> list[Tensor]:
        y = output(processor)
        inputs = [x, *network.parameters()]
        return [y, *torch.autograd.grad(y.square().mean(), inputs, allow_unused=True, materialize_grads=True)]

    expected, found = with_gradients(stock), with_gradients(ours)
    network.enable_gradient_checkpointing()
    for one in (found, with_gradients(ours)):
        for given, wanted in zip(one, expected, strict=True):
            torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    short = text.shape[1] - 255
    assert lengths == [text.shape[1], short, short]
    with torch.no_grad():
        uncounted = network(x, text[:, :short], condition.tensors["pooled_projections"], t).sample
        assert (uncounted - expected[0]).abs().max() > 0.1
        lengths.clear()
        # all of them where they aren't zeros, where a negative prompt stands behind them, and beside dropout
        ended = F.pad(text[:, 1:], (0, 0, 0, 1), value=1)
        other = Condition({**condition.tensors, "encoder_hidden_states": ended}, condition.null)
        torch.testing.assert_close(output(ours, other), output(stock, other))
        pictures = []
        for processor in (ours, stock):
            network.set_attn_processor(processor)
            with negative_attention(network, negative, Nasa(0.5)):
                pictures.append(run_network(network, x, t, condition))
        assert torch.equal(*pictures)
        network.peft_config["fake_score"].lora_dropout = 0.1
        assert torch.equal(output(ours), output(stock))
        assert min(lengths) == text.shape[1]


def test_a_key_counted_by_a_bias_is_one_that_stands_there_so_often() -> None:
    query, key, value = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    outputs = [attend_counted(query, key, value, 256, by_bias) for by_bias in (True, False)]
    torch.testing.assert_close(*outputs)
