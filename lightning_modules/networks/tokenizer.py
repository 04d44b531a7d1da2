"""A byte-pair tokenizer in CLIP's format, trained on captions."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], vocabulary_size: int, max_length: int) -> CLIPTokenizer:
    """Train byte-level BPE with CLIP's end-of-word mark; the same captions always give the same tokens.

    Args:
        captions: the text to learn from.
        vocabulary_size: number of tokens, the two special ones included.
        max_length: ``model_max_length`` of the result, start and end tokens included (CLIP itself: 77).
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    captions = list(captions)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = (
        tokenizer.pre_tokenizer.pre_tokenize_str(text)
        for text in map(tokenizer.normalizer.normalize_str, captions)
    )
    endings = sorted({f"{word[-1]}</w>" for words in pieces for word, _ in words})
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        # Letters and endings, too: the trainer would number the endings in another order each time, and with
        # them decide otherwise between pairs that are equally frequent.
        special_tokens=[START, END, *alphabet, *endings],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = (Path(path) for path in tokenizer.model.save(folder))
        words = json.loads(vocabulary.read_text())
        pairs = [
            tuple(line.split(" "))
            for line in merges.read_text().splitlines()
            if line and not line.startswith("#")
        ]
    for symbol in alphabet:  # so that no text at all is unknown, as in CLIP's own vocabulary
        words.setdefault(f"{symbol}</w>", len(words))
    return CLIPTokenizer(words, pairs, pad_token=END, model_max_length=max_length)
