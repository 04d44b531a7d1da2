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
    tokenizer = _untrained()
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
    words, pairs = _learnt(tokenizer)
    for symbol in alphabet:  # so that no text at all is unknown, as in CLIP's own vocabulary
        words.setdefault(f"{symbol}</w>", len(words))
    return CLIPTokenizer(words, pairs, pad_token=END, model_max_length=max_length)


def _untrained() -> Tokenizer:
    """Byte-level BPE that splits text as CLIP does: lower case, words and punctuation apart."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _learnt(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Vocabulary and merges, in their order; the library hands them out as files only."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = (Path(path) for path in tokenizer.model.save(folder))
        lines = merges.read_text().splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#")]
        return json.loads(vocabulary.read_text()), pairs
