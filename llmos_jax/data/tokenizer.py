"""Turn text into token ids and back.

One class wraps the `tokenizers` library, whether the vocabulary was trained here, is
the 256 bytes, or came with a model as tokenizer.json. Text is always taken as text: a
`<|endoftext|>` that somebody wrote does not become the mark that ends a document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmos_jax.errors import ConfigError, DataError
from llmos_jax.ir import fingerprint_of

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")
# Words, numbers of up to three digits and punctuation as in Llama 3's published
# tokenizer.json; a line's end takes the indentation of the next line with it, since
# half of the text here is code (3.86 bytes a token with 4096 tokens on held-out
# python-docs, against 3.80 for Llama 3's and 3.74 for GPT-2's).
_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|"
    r"[ \t]*[\r\n]+[ \t]*(?=\S)|\s+(?!\S)|\s+"
)
# Where text may be cut without changing a token, in these rules, GPT-2's and Llama 3's:
# before the space between two words, and between a line's end and a line's first letter
# (not where there is more white space around, of which the rules look at the whole
# run).
_SAFE_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=\S)")
_PIECE_CHARACTERS = 1 << 16


class Tokenizer:
    """Text to ids and back; `eos_id` is the mark between documents."""

    __slots__ = ("_inner", "eos_id", "vocab_size")

    def __init__(self, inner: tokenizers.Tokenizer):
        """Wrap `inner`, which is this object's from now on (its padding is set off)."""
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True
        self._inner = inner
        self.eos_id = _end_id(inner)
        # Ids may have gaps in foreign files; the model needs a row up to the last one.
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, uint32 [tokens]; no mark is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text; the library's threads share the work."""
        try:
            coded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            raise DataError(
                "a text cannot be written as UTF-8: it holds half of a surrogate pair."
            ) from None
        return [np.asarray(one.ids, np.uint32) for one in coded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; marks say nothing, broken UTF-8 becomes U+FFFD."""
        return self._inner.decode([int(one) for one in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the tokenizer.json that other programs read too."""
        return self._inner.to_str()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Rebuild from the text of a tokenizer.json; ConfigError if it is not one."""
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as problem:  # the library raises bare Exception
            raise ConfigError(f"not a tokenizer.json: {problem}") from None
        return cls(inner)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with anything about the tokenizer."""
        return fingerprint_of(self.to_json())


class StreamDecoder:
    """Turn ids into text one by one, never showing half a character.

    What `push` and `flush` returned, joined, is `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # ids[start:shown] are on show and give context (some decoders drop a leading
        # space); ids[shown:] wait for the rest of a character.
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """Take one id; return the text that is now complete, often empty."""
        self._ids.append(int(token))
        text = self._fresh()
        if not text or text.endswith("\ufffd"):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """Return what is left; a character still incomplete becomes U+FFFD."""
        text = self._fresh()
        self._advance()
        return text

    def _fresh(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _advance(self) -> None:
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)


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
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder; ConfigError if there is none."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "it is not text"
        raise ConfigError(
            f"tokenizer {file} cannot be read: {reason}. Set data.tokenizer to "
            "`train`, `bytes` or the path of a tokenizer.json."
        ) from None
    try:
        return Tokenizer.from_json(text)
    except ConfigError as problem:
        raise ConfigError(f"tokenizer {file}: {problem}") from None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, model_name: str) -> None:
    """Raise ConfigError if the tokenizer has ids for which the model has no row.

    Fewer are fine: models pad their vocabularies.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the vocabulary of "
            f"model {model_name} has room for {vocab_size}. Use the model's own "
            "tokenizer, or set data.tokenizer = `train` to train one that fits."
        )


def cut_pieces(text: str) -> list[str]:
    """Cut long text where no token is cut: many threads, little memory.

    The pieces, joined, are the text; their ids, joined, are its ids.
    """
    pieces = []
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        cut = _SAFE_CUT.search(text, start + _PIECE_CHARACTERS)
        if cut is None:
            break
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]


def _end_id(inner: tokenizers.Tokenizer) -> int:
    for name in _END_NAMES:
        found = inner.token_to_id(name)
        if found is not None:
            return found
    raise ConfigError(
        "the tokenizer has no token that ends a document; looked for "
        f"{', '.join(_END_NAMES)}."
    )


def _byte_symbols() -> list[str]:
    """Return the printable symbol of each byte, in byte order (GPT-2's encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
