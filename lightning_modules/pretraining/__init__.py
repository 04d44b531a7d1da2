"""How the bundled models were trained, from captioned pictures: autoencoder, two CLIPs, diffusion model.

Each module writes an ordinary Hugging Face folder when ``fit`` ends, so what comes out needs nothing of this
project to be loaded. Batches come from :class:`datamodules.pictures.PictureDataModule`: ``pictures``
[B, 3, H, W] in [0, 1] and ``captions``. Step ``k`` draws its noise from (seed, k), so a resumed run follows
the uninterrupted one.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
)

from common.errors import UserError
from datamodules.pictures import EvaluationPictures
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.pipeline_folder import save_pipeline
from lightning_modules.pretraining.tokenizer import train_tokenizer
from lightning_modules.pretraining.tools import (
    Pretraining,
    augment,
    chunks,
    encode,
    preview_pictures,
    text_config,
    tokenize,
    training_captions,
)


class AutoencoderPretraining(Pretraining):
    """A KL autoencoder: L1 on pixels and on their differences (edges), a small pull towards a unit normal.

    Args:
        autoencoder: keywords of ``diffusers.AutoencoderKL``.
        initial: folder of an autoencoder to go on from, in place of random weights.
        train_encoder: false trains the decoder alone, so that the latents stay what they are.
        kl_weight: of the KL divergence, averaged over latent elements.
        edge_weight: of the L1 distance between horizontal and vertical pixel differences.
    """

    def __init__(
        self,
        output: str,
        autoencoder: dict[str, Any] | None = None,
        initial: str | None = None,
        train_encoder: bool = True,
        kl_weight: float = 2e-5,
        edge_weight: float = 1.0,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(output, learning_rate, warmup_steps, weight_decay, seed)
        self.save_hyperparameters()
        if initial is None:
            self.autoencoder = AutoencoderKL(**(autoencoder or {}))
        else:
            self.autoencoder = AutoencoderKL.from_pretrained(initial, torch_dtype=torch.float32)
        self.train_encoder = train_encoder
        self.autoencoder.encoder.requires_grad_(train_encoder)
        self.autoencoder.quant_conv.requires_grad_(train_encoder)
        self.kl_weight, self.edge_weight = kl_weight, edge_weight

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        pictures = batch["pictures"] * 2 - 1
        posterior = self.autoencoder.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        decoded = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        edges = sum(F.l1_loss(decoded.diff(dim=axis), pictures.diff(dim=axis)) for axis in (-1, -2))
        return {
            "l1": F.l1_loss(decoded, pictures),
            "edges": self.edge_weight * edges,
            "kl": self.kl_weight * kl,
        }

    @torch.no_grad()
    def preview(self) -> Tensor:
        pictures = preview_pictures(self.trainer)
        decoded = self.autoencoder.decode(encode(self.autoencoder, pictures)).sample
        return torch.cat([pictures, (decoded / 2 + 0.5).clamp(0, 1)])

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.train_encoder:
            keys = data.keys[:: max(1, len(data.keys) // 1024)]
            latents = [encode(self.autoencoder, data.source.composite(part)) for part in chunks(keys, 64)]
            self.autoencoder.register_to_config(scaling_factor=round(1 / torch.cat(latents).std().item(), 5))
        self.autoencoder.half().save_pretrained(folder)
        self.autoencoder.float()


class CLIPPretraining(Pretraining):
    """A contrastive image-text model (Radford et al., 2021, arXiv 2103.00020) in transformers' CLIP format.

    Pictures are shifted, scaled, blurred, recoloured and made noisy at random, so that the score judges what
    is drawn rather than how exactly it is placed.

    Args:
        vision: keywords of ``transformers.CLIPVisionConfig``.
        text: keywords of ``transformers.CLIPTextConfig``; the tokenizer adds vocabulary and special tokens.
        projection_dim: width of the shared embedding.
        vocabulary_size: of the tokenizer, which is trained on the captions first.
    """

    def __init__(
        self,
        output: str,
        vision: dict[str, Any],
        text: dict[str, Any],
        projection_dim: int = 128,
        vocabulary_size: int = 1500,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__(output, learning_rate, warmup_steps, weight_decay, seed)
        self.save_hyperparameters()
        self.tokenizer = train_tokenizer(
            training_captions(), vocabulary_size, text["max_position_embeddings"]
        )
        torch.manual_seed(self.seed)
        config = CLIPConfig(
            text_config=text_config(text, self.tokenizer), vision_config=vision, projection_dim=projection_dim
        )
        self.clip = CLIPModel(config)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        pixels = (augment(batch["pictures"], generator) - 0.5) / 0.5
        tokens = tokenize(self.tokenizer, batch["captions"], self.device)
        logits = self.clip(pixel_values=pixels, **tokens).logits_per_image.float()
        target = torch.arange(len(logits), device=logits.device)
        accuracy = (logits.argmax(dim=1) == target).float().mean()
        self.log("train/accuracy", accuracy, prog_bar=True)
        return {"images": F.cross_entropy(logits, target) / 2, "texts": F.cross_entropy(logits.T, target) / 2}

    def on_train_batch_start(self, *_: Any) -> None:
        self.clip.logit_scale.data.clamp_(max=math.log(100))  # as in the paper, section 2.5

    def export(self, folder: Path) -> None:
        size = self.clip.config.vision_config.image_size
        processor = CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        for part in (self.clip.half(), self.tokenizer, processor):
            part.save_pretrained(folder)
        self.clip.float()


class LatentDiffusionPretraining(Pretraining):
    """What text-to-image models on the latents of a frozen autoencoder have in common.

    A subclass builds its networks and overrides ``denoise`` and ``pipeline``. Every caption is emptied with
    probability ``prompt_dropout``, so that classifier-free guidance works. Samples are weighted as min(SNR,
    gamma) on x0 (Hang et al., 2023, arXiv 2303.09556, eq. 8): min(SNR, gamma) / SNR on the noise, min(SNR,
    gamma) / (SNR + 1) on the velocity.

    Args:
        autoencoder: folder of a trained autoencoder.
        scheduler: noise schedule and prediction type (``epsilon`` or ``v_prediction``), or rectified flow,
            which has its own loss.
        snr_gamma: the weighting's gamma; infinity weighs all timesteps of the noise loss alike.

    Raises:
        UserError: another prediction type.
    """

    sampling: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 25, "guidance_scale": 4.5, "output_type": "pt",
    }  # fmt: skip

    def __init__(
        self, autoencoder: str, scheduler: Any, prompt_dropout: float, snr_gamma: float, **base: Any
    ) -> None:
        super().__init__(**base)
        if (kind := scheduler.config.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction_type is {kind!r}: it must be epsilon or v_prediction")
        self.scheduler, self.prompt_dropout, self.snr_gamma = scheduler, prompt_dropout, snr_gamma
        self.autoencoder = AutoencoderKL.from_pretrained(autoencoder, torch_dtype=torch.float32)
        self.autoencoder.requires_grad_(False)

    def denoise(self, x_t: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        """Raw prediction [B, C, h, w] at x_t [B, C, h, w], t [B], for B captions."""
        raise TypeError(f"{type(self).__name__} defines no denoise")

    def pipeline(self) -> DiffusionPipeline:
        """The model as a stock pipeline that shares its weights."""
        raise TypeError(f"{type(self).__name__} defines no pipeline")

    def on_fit_start(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        parts = [encode(self.autoencoder, data.source.composite(part)) for part in chunks(data.keys, 64)]
        config = self.autoencoder.config
        self.latents = (torch.cat(parts).cpu() - (config.shift_factor or 0.0)) * config.scaling_factor

    def clean(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The batch's latents x0 and noise to mix with them, both [B, C, h, w]."""
        x0 = self.latents[batch["index"].cpu()].to(self.device)
        return x0, torch.randn(x0.shape, generator=generator).to(x0)

    def captions(self, batch: dict[str, Any], generator: torch.Generator) -> list[str]:
        """The batch's captions, some emptied."""
        dropped = torch.rand(len(batch["captions"]), generator=generator) < self.prompt_dropout
        return ["" if drop else text for drop, text in zip(dropped, batch["captions"], strict=True)]

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        x0, noise = self.clean(batch, generator)
        steps = self.scheduler.config.num_train_timesteps
        t = torch.randint(0, steps, (len(x0),), generator=generator).to(self.device)
        captions = self.captions(batch, generator)
        predicted = self.denoise(self.scheduler.add_noise(x0, noise, t), t, captions).float()
        alpha_squared = self.scheduler.alphas_cumprod.to(self.device)[t]
        snr = alpha_squared / (1 - alpha_squared)
        if self.scheduler.config.prediction_type == "epsilon":
            name, target, scale = "epsilon_mse", noise, snr
        else:
            name, target, scale = "v_mse", self.scheduler.get_velocity(x0, noise, t), snr + 1
        weight = snr.clamp(max=self.snr_gamma) / scale
        return {name: (weight * (predicted - target).square().mean(dim=(1, 2, 3))).mean()}

    @torch.no_grad()
    def preview(self) -> Tensor:
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        noise = torch.randn((32, *self.latents.shape[1:]), generator=torch.Generator().manual_seed(0))
        captions = EvaluationPictures(self.trainer.datamodule.data_dir).captions[:32]  # type: ignore[attr-defined]
        return pipe(captions, latents=noise.to(self.device), **self.sampling).images.float()

    def export(self, folder: Path) -> None:
        save_pipeline(self.pipeline().to(torch.float16), folder)
        self.float()


class DiffusionPretraining(LatentDiffusionPretraining):
    """A Stable Diffusion: UNet and CLIP text encoder, on the scaled-linear schedule.

    Args:
        unet: keywords of ``diffusers.UNet2DConditionModel``.
        text: keywords of ``transformers.CLIPTextConfig``.
        initial: folder of a Stable Diffusion to go on from, in place of ``unet`` and ``text``; its text
            encoder is kept as it is.
        prediction_type: what the UNet predicts, ``epsilon`` or ``v_prediction``.

    Raises:
        UserError: neither ``initial`` nor both of ``unet`` and ``text`` are given; another prediction type.
    """

    def __init__(
        self,
        output: str,
        autoencoder: str,
        unet: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        initial: str | None = None,
        prediction_type: str = "epsilon",
        vocabulary_size: int = 1500,
        prompt_dropout: float = 0.1,
        snr_gamma: float = 5.0,
        learning_rate: float = 1e-3,
        warmup_steps: int = 200,
        weight_decay: float = 0.01,
        seed: int | None = None,
    ) -> None:
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing",
            prediction_type=prediction_type,
        )  # fmt: skip
        super().__init__(
            autoencoder, scheduler, prompt_dropout, snr_gamma, output=output, learning_rate=learning_rate,
            warmup_steps=warmup_steps, weight_decay=weight_decay, seed=seed,
        )  # fmt: skip
        self.save_hyperparameters()
        if initial is not None:
            parts = load_parts(initial)
            self.tokenizer, self.text_encoder = parts.tokenizers[0], parts.text_encoders[0]
            self.unet = parts.denoiser
            self.text_encoder.requires_grad_(False)
            self.unet.requires_grad_(True)
        elif unet is not None and text is not None:
            self.tokenizer = train_tokenizer(
                training_captions(), vocabulary_size, text["max_position_embeddings"]
            )
            torch.manual_seed(self.seed)
            self.text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(text, self.tokenizer)))
            self.unet = UNet2DConditionModel(**unet)
        else:
            raise UserError("DiffusionPretraining needs unet and text, or initial: set them in the config")

    def denoise(self, x_t: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        embeddings = self.text_encoder(tokenize(self.tokenizer, captions, self.device)["input_ids"])[0]
        return self.unet(x_t, t, embeddings).sample

    def pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            self.autoencoder, self.text_encoder, self.tokenizer, self.unet, self.scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
