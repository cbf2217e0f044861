"""Make a vocabulary from text, or of the 256 bytes, for models without one."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llmos_jax.data.marks import END_OF_TEXT
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.errors import ConfigError

# Words, numbers of up to three digits and punctuation as in Llama 3's published
# tokenizer.json; a line's end takes the indentation of the next line with it, since
# half of the text here is code (3.86 bytes a token with 4096 tokens on held-out
# python-docs, against 3.80 for Llama 3's and 3.74 for GPT-2's).
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|"
    r"[ \t]*[\r\n]+[ \t]*(?=\S)|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: the end mark, all 256 bytes, then merges.

    The same texts give the same tokenizer. Little text may give fewer tokens than
    asked.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"a byte-level tokenizer needs at least 257 tokens (256 bytes and an end "
            f"mark), but the model's vocabulary is {vocab_size}."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


def train_words(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Take whole words, in small letters, that occur at least twice: the end mark, one
    token for all other words, then words by how often they occur.

    For classifiers of few texts: what a word seen once meant is learnt by heart, and
    its pieces mislead. It gives no text back.
    """
    inner = tokenizers.Tokenizer(models.WordLevel(vocab={}, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase()]
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # words, and runs of punctuation
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST_OFTEN,
        special_tokens=[END_OF_TEXT, UNKNOWN],
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


UNKNOWN = "<unk>"
LEAST_OFTEN = 2
"""On TREC an LSTM classifier had 89 % of the test set right with words seen at least
twice, and 84 % with pieces of words (tools/bench/classify.py)."""


def bytes_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids are the 256 bytes, and 256 for the end mark."""
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner)


def _byte_symbols() -> list[str]:
    """Return the printable symbol of each byte, in byte order (GPT-2's encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
