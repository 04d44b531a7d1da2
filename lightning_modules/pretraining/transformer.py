"""How the bundled PixArt-alpha was trained: a diffusion transformer with a T5 text encoder."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from lightning_modules.pretraining import LatentDiffusionPretraining
from lightning_modules.pretraining.tools import training_captions


class PixArtPretraining(LatentDiffusionPretraining):
    """A miniature PixArt-alpha (Chen et al., arXiv 2310.00426) on its linear schedule, noise prediction.

    The transformer has PixArt's second half of output channels, for the variance; it is not trained here,
    as samplers drop it.

    Args:
        transformer: keywords of ``diffusers.PixArtTransformer2DModel``.
        text: keywords of ``transformers.T5Config``; the tokenizer adds vocabulary and special tokens.
        max_length: tokens of a caption in training; the stock pipeline pads to 120 and masks.
    """

    # sizes other than PixArt's own have no table of resolutions to choose from
    sampling: ClassVar[dict[str, Any]] = {
        **LatentDiffusionPretraining.sampling, "use_resolution_binning": False, "clean_caption": False,
    }  # fmt: skip

    def __init__(
        self,
        output: str,
        autoencoder: str,
        transformer: dict[str, Any],
        text: dict[str, Any],
        max_length: int = 24,
        prompt_dropout: float = 0.1,
        snr_gamma: float = 5.0,
        learning_rate: float = 1e-3,
        warmup_steps: int = 200,
        weight_decay: float = 0.01,
        seed: int | None = None,
    ) -> None:
        scheduler = DDIMScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False,
            set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing",
        )  # fmt: skip
        super().__init__(
            autoencoder, scheduler, prompt_dropout, snr_gamma, output=output, learning_rate=learning_rate,
            warmup_steps=warmup_steps, weight_decay=weight_decay, seed=seed,
        )  # fmt: skip
        self.save_hyperparameters()
        self.max_length = max_length
        self.tokenizer = word_tokenizer(training_captions())
        torch.manual_seed(self.seed)
        self.text_encoder = T5EncoderModel(T5Config(vocab_size=len(self.tokenizer), dropout_rate=0.0, **text))
        self.transformer = PixArtTransformer2DModel(**transformer)

    def denoise(self, x_t: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        lower = [caption.lower().strip() for caption in captions]  # as the stock pipeline does
        tokens = self.tokenizer(
            lower, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(self.device)
        embeddings = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        output = self.transformer(
            x_t, encoder_hidden_states=embeddings, timestep=t, encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip
        return output.chunk(2, dim=1)[0]

    def pipeline(self) -> PixArtAlphaPipeline:
        return PixArtAlphaPipeline(
            self.tokenizer, self.text_encoder, self.autoencoder, self.transformer, self.scheduler
        )


def word_tokenizer(captions: Iterable[str]) -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the words of the captions, and single characters for all others.

    T5's model is a unigram one: a piece's score is its log-probability, so whole words win over characters.
    """
    words = Counter(word for text in captions for word in text.lower().replace(",", " ").split())
    total = sum(words.values())
    pieces = [("\u2581" + word, math.log(count / total)) for word, count in sorted(words.items())]
    characters = sorted({"\u2581", *(chr(code) for code in range(33, 127))} - {piece for piece, _ in pieces})
    rare = math.log(0.1 / total)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces, *((c, rare) for c in characters)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)
