"""Pretraining on made-up artwork: two steps of each, the exported folder in stock libraries, resuming."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from callbacks.preview import Preview
from common.errors import UserError
from datamodules.pictures import PictureDataModule
from lightning_modules.networks.loading import load_parts
from lightning_modules.pretraining import (
    AutoencoderPretraining,
    CLIPPretraining,
    DiffusionPretraining,
)
from lightning_modules.pretraining.tools import (
    Pretraining,
    augment,
    chunks,
    encode,
    tokenize,
    training_captions,
)
from tests.fake_emoji import make_artwork

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "max_position_embeddings": 24}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
AUTOENCODER = {
    "latent_channels": 4, "block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "sample_size": 16,
}  # fmt: skip
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": [8, 16], "cross_attention_dim": 16, "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip


@pytest.fixture(scope="module")
def artwork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `data/emoji` in it, where the captions of tokenizers come from."""
    folder = tmp_path_factory.mktemp("work")
    make_artwork(folder / "data" / "emoji")
    return folder


@pytest.fixture(autouse=True)
def working_folder(artwork: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artwork)


def trainer(folder: Path, steps: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, gradient_clip_val=1.0,
        callbacks=list(callbacks),
    )  # fmt: skip


def train(module: Pretraining, folder: Path, steps: int = 2) -> PictureDataModule:
    data = PictureDataModule(batch_size=4)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer(folder, steps).fit(module, data)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(module.get_parameter(name).requires_grad for name in moved)
    return data


@pytest.fixture(scope="module")
def autoencoder_folder(artwork: Path) -> Path:
    """The folder of an autoencoder of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(artwork)
        torch.manual_seed(0)
        train(AutoencoderPretraining(str(artwork / "vae"), AUTOENCODER, warmup_steps=1), artwork)
    return artwork / "vae"


def test_autoencoder_opens_and_its_latents_have_unit_deviation(autoencoder_folder: Path) -> None:
    model = AutoencoderKL.from_pretrained(autoencoder_folder)
    data = PictureDataModule()
    data.setup()
    pictures = data.source.composite(data.keys)
    latents = encode(model, pictures) * model.config.scaling_factor
    assert latents.std().item() == pytest.approx(1.0, abs=0.01)  # half precision, rounded factor
    assert torch.isfinite(model.decode(encode(model, pictures[:2])).sample).all()


def test_decoder_alone_can_be_trained_further(autoencoder_folder: Path, tmp_path: Path) -> None:
    module = AutoencoderPretraining(
        str(tmp_path / "vae"), initial=str(autoencoder_folder), train_encoder=False, warmup_steps=1
    )
    train(module, tmp_path)
    before, after = (AutoencoderKL.from_pretrained(path) for path in (autoencoder_folder, tmp_path / "vae"))
    pictures = torch.rand(2, 3, 16, 16)
    assert torch.equal(encode(before, pictures), encode(after, pictures))
    assert before.config.scaling_factor == after.config.scaling_factor
    latents = encode(before, pictures)
    assert not torch.equal(before.decode(latents).sample, after.decode(latents).sample)


def test_clip_opens_in_stock_transformers(tmp_path: Path) -> None:
    module = CLIPPretraining(str(tmp_path / "clip"), VISION, TEXT, 8, vocabulary_size=700, warmup_steps=1)
    data = train(module, tmp_path)
    model = CLIPModel.from_pretrained(tmp_path / "clip", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "clip")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "clip")
    pictures = data.source.composite(data.keys[:3])
    pixels = processor(list((pictures * 255).round().byte()), return_tensors="pt").pixel_values
    # the processor's picture is the one that training saw
    torch.testing.assert_close(pixels, (pictures - 0.5) / 0.5, rtol=0, atol=0.02)
    texts = ["a cat", "an egg, noto style"]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(tokens.input_ids, tokenize(module.tokenizer, texts, torch.device("cpu"))["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    assert logits.logits_per_image.shape == (3, 2) and torch.isfinite(logits.logits_per_image).all()


def test_diffusion_opens_as_a_stock_pipeline(autoencoder_folder: Path, tmp_path: Path) -> None:
    module = DiffusionPretraining(
        str(tmp_path / "sd"), str(autoencoder_folder), UNET, TEXT, vocabulary_size=700, warmup_steps=1
    )
    train(module, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "sd")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    pictures = pipeline(
        ["a cat", "an egg"], num_inference_steps=2, guidance_scale=4.5, output_type="pt"
    ).images
    assert pictures.shape == (2, 3, 16, 16) and torch.isfinite(pictures).all()
    assert (
        pipeline.scheduler.config.timestep_spacing == "trailing" and not pipeline.scheduler.config.clip_sample
    )
    assert pipeline.tokenizer.model_max_length == 24


def test_loss_weights_of_the_diffusion_model(autoencoder_folder: Path, tmp_path: Path) -> None:
    """min(SNR, gamma) / SNR: the loss grows with gamma up to the plain squared error."""
    losses = []
    for gamma in (0.01, 5.0, math.inf):
        module = DiffusionPretraining(
            str(tmp_path), str(autoencoder_folder), UNET, TEXT, vocabulary_size=700, snr_gamma=gamma
        )
        module.latents = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        batch = {"index": torch.arange(32), "captions": ["a cat"] * 32}
        with torch.no_grad():
            losses.append(module.loss(batch, torch.Generator().manual_seed(1))["epsilon_mse"].item())
    assert losses[0] < losses[1] < losses[2]
    t = torch.Generator().manual_seed(1)
    noise = torch.randn(32, 4, 8, 8, generator=t)
    steps = torch.randint(0, 1000, (32,), generator=t)
    dropped = torch.rand(32, generator=t) < 0.1
    texts = ["" if drop else "a cat" for drop in dropped]
    with torch.no_grad():
        tokens = tokenize(module.tokenizer, texts, torch.device("cpu"))["input_ids"]
        x_t = module.scheduler.add_noise(module.latents, noise, steps)
        predicted = module.unet(x_t, steps, module.text_encoder(tokens)[0]).sample
    assert losses[2] == pytest.approx((predicted - noise).square().mean().item(), rel=1e-5)


def test_velocity_and_noise_loss_weigh_the_same_error_alike(
    autoencoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that say the same x0, one as noise and one as velocity, have the same min-SNR loss."""
    first = DiffusionPretraining(
        str(tmp_path / "sd"), str(autoencoder_folder), UNET, TEXT, vocabulary_size=700, warmup_steps=1
    )
    train(first, tmp_path)
    second = DiffusionPretraining(
        str(tmp_path / "v"), str(autoencoder_folder), initial=str(tmp_path / "sd"),
        prediction_type="v_prediction",
    )  # fmt: skip
    text_before = {name: x.clone() for name, x in second.text_encoder.state_dict().items()}
    train(second, tmp_path)
    assert all(torch.equal(x, text_before[name]) for name, x in second.text_encoder.state_dict().items())
    assert load_parts(tmp_path / "v").scheduler.config.prediction_type == "v_prediction"

    def velocity_of_no_noise(x_t: Tensor, t: Tensor, *_: Any) -> SimpleNamespace:
        ratio = (1 / second.scheduler.alphas_cumprod[t] - 1).sqrt()[:, None, None, None]  # sigma / alpha
        return SimpleNamespace(sample=-ratio * x_t)

    monkeypatch.setattr(first.unet, "forward", lambda x_t, *_: SimpleNamespace(sample=torch.zeros_like(x_t)))
    monkeypatch.setattr(second.unet, "forward", velocity_of_no_noise)
    losses = []
    for module in (first, second):
        module.latents = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        batch = {"index": torch.arange(32), "captions": ["a cat"] * 32}
        losses += module.loss(batch, torch.Generator().manual_seed(1)).values()
    assert losses[0] == pytest.approx(losses[1].item(), rel=1e-4) and losses[0] > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "or initial"), ({"unet": UNET, "text": TEXT, "prediction_type": "x0"}, "epsilon or v_prediction")],
)
def test_unusable_diffusion_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiffusionPretraining("sd", "vae", **arguments)


class Watch(L.Callback):
    """Notes the batches, and stops a run before its last step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: list[tuple[int, list[str]]] = []
        self.stop_at = stop_at

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int
    ) -> None:
        self.seen.append((batch["step"], batch["captions"]))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.stop_at


def test_resumed_pretraining_sees_the_same_batches_and_learns_the_same(tmp_path: Path) -> None:
    def start(
        stop_at: int | None, checkpoint: Path | None = None
    ) -> tuple[CLIPPretraining, Watch, L.Trainer]:
        module = CLIPPretraining(str(tmp_path / "clip"), VISION, TEXT, 8, vocabulary_size=700, warmup_steps=2)
        watch = Watch(stop_at)
        run = trainer(tmp_path, 4, watch)
        run.fit(module, PictureDataModule(batch_size=4), ckpt_path=checkpoint)
        return module, watch, run

    _, first, run = start(2)
    assert not (tmp_path / "clip").exists()  # only a finished run is written
    run.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed, second, _ = start(None, tmp_path / "half.ckpt")
    whole, every, _ = start(None)
    assert first.seen + second.seen == every.seen and [step for step, _ in every.seen] == [0, 1, 2, 3]
    assert (tmp_path / "clip" / "model.safetensors").is_file()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_preview_is_saved_every_few_steps(tmp_path: Path) -> None:
    class Drawing(CLIPPretraining):
        def preview(self) -> torch.Tensor:
            return torch.rand(4, 3, 16, 16)

    module = Drawing(str(tmp_path / "clip"), VISION, TEXT, 8, vocabulary_size=700)
    trainer(tmp_path, 4, Preview(every_n_steps=2)).fit(module, PictureDataModule(batch_size=2))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_2.png", "step_4.png"]
    with pytest.raises(TypeError, match="leave the Preview callback out"):
        CLIPPretraining(str(tmp_path), VISION, TEXT, 8, vocabulary_size=700).preview()


@pytest.mark.parametrize(
    ("warmup", "total", "expected"),
    [(2, 6, [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0]), (2, 2, [0.5, 1, 1]), (0, 2, [1, 0.5, 0])],
)
def test_learning_rates(warmup: int, total: int, expected: list[float]) -> None:
    module = CLIPPretraining("unused", VISION, TEXT, 8, vocabulary_size=700, warmup_steps=warmup)
    assert [module._rate(step, total) for step in range(len(expected))] == pytest.approx(expected, abs=1e-6)


def test_pretraining_needs_an_end(tmp_path: Path) -> None:
    module = CLIPPretraining(str(tmp_path), VISION, TEXT, 8, vocabulary_size=700)
    with pytest.raises(UserError, match="needs trainer.max_steps"):
        trainer(tmp_path, -1).fit(module, PictureDataModule(batch_size=2))


@pytest.mark.parametrize("output", ["file", "file/inside"])
def test_an_output_that_cannot_be_written_is_refused_before_training(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module = CLIPPretraining(str(tmp_path / output), VISION, TEXT, 8, vocabulary_size=700)
    watch = Watch()
    with pytest.raises(UserError, match=r"file is a file.*model\.init_args\.output"):
        trainer(tmp_path, 1, watch).fit(module, PictureDataModule(batch_size=2))
    assert not watch.seen


class Small(Pretraining):
    """One number, written into two files; the second may fail."""

    def __init__(self, output: Path, fails: bool = False) -> None:
        super().__init__(str(output), 1e-2, 0, 0.0, 0)
        self.number, self.fails = torch.nn.Parameter(torch.zeros(())), fails

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"square": (self.number - 1) ** 2}

    def export(self, folder: Path) -> None:
        for part in ("unet", "text_encoder"):
            if self.fails and part == "text_encoder":
                raise KeyboardInterrupt
            (folder / part).mkdir(parents=True)
            (folder / part / "weights").write_text("new")


def test_an_interrupted_export_leaves_the_former_files(tmp_path: Path) -> None:
    """Parts that the export doesn't write (the autoencoder's) stay in any case."""
    output = tmp_path / "sd"
    for part in ("vae", "unet"):
        (output / part).mkdir(parents=True)
        (output / part / "weights").write_text("old")
    exported = ["new text_encoder", "new unet", "old vae"]
    for fails, expected in ((True, ["old unet", "old vae"]), (False, exported)):
        run, data = trainer(tmp_path, 1), PictureDataModule(batch_size=2)
        try:
            run.fit(Small(output, fails), data)
        except (KeyboardInterrupt, SystemExit):
            assert fails
        found = [f"{file.read_text()} {file.parent.name}" for file in output.glob("*/*")]
        assert sorted(found) == sorted(expected)
        assert [entry.name for entry in tmp_path.iterdir() if "sd" in entry.name] == ["sd"]


def test_augmentation_keeps_range_and_depends_on_the_generator() -> None:
    pictures = torch.rand(3, 3, 16, 16)
    first, again, other = (augment(pictures, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == pictures.shape and 0 <= first.min() <= first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    flat = torch.full((2, 3, 16, 16), 0.5)
    assert (augment(flat, torch.Generator().manual_seed(0)).mean() - 0.5).abs() < 0.1


def test_chunks_and_captions() -> None:
    assert chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert training_captions() == training_captions() and len(training_captions()) > 100
