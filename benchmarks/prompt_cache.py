"""Prompts a second into and out of a cache of text embeddings, by the process's own CPU time.

    python benchmarks/prompt_cache.py

Made with the bundled text encoder, and read again beside encoding on the fly; then with rows of Stable
Diffusion 2.1's size (77 x 1024, float16), random numbers, from a file that was just written.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.prompts import CAPTIONS, read_prompts
from lightning_modules.networks.loading import load_parts
from lightning_modules.networks.prompt_cache import (
    Layout,
    PromptCache,
    cache_writer,
    text_identity,
    text_keys,
    use_prompt_cache,
)

BATCH = 64


def rate(count: int, work: Callable[[], object]) -> str:
    """Prompts a second of CPU time."""
    begin = time.process_time()
    work()
    return f"{count / (time.process_time() - begin):,.0f}"


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    texts = list(dict.fromkeys(read_prompts(CAPTIONS)))
    texts = texts[: len(texts) // BATCH * BATCH]
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    shuffled = [[texts[place] for place in rng.integers(len(texts), size=BATCH)] for _ in batches]
    parts = load_parts("assets/emoji-sd", without=("denoiser", "vae"))
    encoder = parts.backbone.prompt_encoder(parts)
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout.of(encoder.embed_texts([""]), "float16")

        def write() -> None:
            with cache_writer(Path(folder, "emoji"), text_identity(parts, encoder), layout) as writer:
                for batch in batches:
                    writer.add(text_keys(batch), encoder.embed_texts(batch))

        print(f"bundled encoder, encoded and written: {rate(len(texts), write)}")
        on_the_fly = rate(len(texts), lambda: [encoder.embed_texts(batch) for batch in shuffled])
        use_prompt_cache(encoder, parts, Path(folder, "emoji"))
        print(f"read: {rate(len(texts), lambda: [encoder.embed(batch) for batch in shuffled])}")
        print(f"encoded on the fly: {on_the_fly}")

        large, keys = {"encoder_hidden_states": torch.randn(BATCH, 77, 1024)}, text_keys(texts[: 32 * BATCH])
        sd21 = Path(folder, "sd21")

        def write_large() -> None:
            made_by = {"model": "random", "hash": ""}
            with cache_writer(sd21, made_by, Layout.of(large, "float16")) as writer:
                for start in range(0, len(keys), BATCH):
                    writer.add(keys[start : start + BATCH], large)

        print(f"rows of Stable Diffusion 2.1, written: {rate(len(keys), write_large)}")
        cache = PromptCache(sd21)
        rows = cache.find(rng.choice(keys, (32, BATCH)).reshape(-1)).reshape(32, BATCH)
        print(f"read: {rate(rows.size, lambda: [cache.take(batch) for batch in rows])}")


if __name__ == "__main__":
    main()
