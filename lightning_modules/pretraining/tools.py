"""What the pretraining modules share: base class, captions, tokens, augmentation, encoding."""

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from common.errors import UserError
from common.files import check_writable_folder, filled_at_once
from datamodules.pictures import EmojiPictures, EvaluationPictures, caption


class Pretraining(L.LightningModule):
    """What all of them have in common: AdamW, warm-up, then cosine decay to zero at ``trainer.max_steps``.

    Args:
        output: folder that is written when ``fit`` ends.
        learning_rate: peak value.
        warmup_steps: linear warm-up.
        weight_decay: of AdamW, on matrices and kernels only.
        seed: of the noise that the losses draw.
    """

    def __init__(
        self, output: str, learning_rate: float, warmup_steps: int, weight_decay: float, seed: int | None
    ) -> None:
        super().__init__()
        self.output = Path(output)
        self.learning_rate, self.warmup_steps, self.weight_decay, self.seed = (
            learning_rate, warmup_steps, weight_decay, seed or 0,
        )  # fmt: skip

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Named loss terms of one batch; their sum is minimised."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def preview(self) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] that show what has been learnt so far."""
        raise TypeError(f"{type(self).__name__} has no preview: leave the Preview callback out")

    def export(self, folder: Path) -> None:
        """Write the trained model into ``folder``, whose files are then moved to ``self.output``."""
        raise TypeError(f"{type(self).__name__} defines no export")

    def setup(self, stage: str) -> None:
        """Before hours of training: make sure that the result can be written.

        Raises:
            UserError: ``output`` is a file, or can't be written.
        """
        if stage == "fit":
            check_writable_folder(self.output, "model.init_args.output")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(batch["step"]))
        with plain_attention(self.device):
            terms = self.loss(batch, generator)
        total = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, prog_bar=True)
        return total

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.99))
        total = int(self.trainer.max_steps)
        if total <= 0:
            raise UserError("pretraining needs trainer.max_steps: the learning rate decays to zero there")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int, total: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * done))

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero and self.trainer.global_step >= self.trainer.max_steps:
            with filled_at_once(self.output.expanduser().resolve()) as folder:
                self.export(folder)
            print(f"written: {self.output}")


def training_captions() -> list[str]:
    """Captions to train a tokenizer on: a fixed function of the object names in the artwork's index."""
    source = EmojiPictures()
    rng = random.Random("tokenizer")
    return [caption(key, rng) for key in source.keys("a", "b") for _ in range(2)]


def text_config(keywords: dict[str, Any], tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """A text tower's keywords, completed from its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **keywords,
    }


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [B, L], padded to the model's length as Stable Diffusion does."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift (8 %), zoom and contrast (0.85 to 1.15), blur, brightness and noise, per picture."""
    count = len(pictures)

    def draw(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).to(pictures)

    zero = torch.zeros(count).to(pictures)
    zoom, right, down = draw(0.85, 1.15), draw(-0.16, 0.16), draw(-0.16, 0.16)
    matrix = torch.stack([torch.stack([zoom, zero, right], 1), torch.stack([zero, zoom, down], 1)], 1)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    drawn = (draw(0, 1), draw(0.85, 1.15), draw(-0.08, 0.08), draw(0, 0.08))
    blur, contrast, brightness, noise = (value[:, None, None, None] for value in drawn)
    mixed = torch.lerp(moved, blurred, blur)
    grain = torch.randn(mixed.shape, generator=generator).to(mixed)
    return (((mixed - 0.5) * contrast + 0.5) + brightness + noise * grain).clamp(0, 1)


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """Attention by plain matrix products on the CPU, as the bundled models were trained."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def preview_pictures(trainer: L.Trainer) -> Tensor:
    """The first 32 held-out pictures."""
    return EvaluationPictures(trainer.datamodule.data_dir).pictures(0, 32)  # type: ignore[attr-defined]


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive parts of at most ``size`` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Posterior means [B, C, h, w], unscaled, of pictures [B, 3, H, W] in [0, 1]."""
    weight = next(autoencoder.parameters())
    return autoencoder.encode(pictures.to(weight) * 2 - 1).latent_dist.mean.float()
