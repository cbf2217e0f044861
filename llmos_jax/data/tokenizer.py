"""Turn text into token ids and back.

One class wraps the `tokenizers` library, whether the vocabulary was trained here, is
the 256 bytes, or came with a model. Text is taken as text: a `<|endoftext|>` that
somebody wrote does not become the mark that ends a document. Only `encode_markup`,
which is for text that a chat template made, takes marks as marks.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import tokenizers

from llmos_jax.data.marks import Marks, frame_of, marks_of, set_frame
from llmos_jax.errors import ConfigError, DataError
from llmos_jax.ir import fingerprint_of

_OUR_KEY = "llmos"  # in the JSON that checkpoints hold, beside the library's own keys


class Tokenizer:
    """Text to ids and back, with the `marks` that the model's text is framed by."""

    __slots__ = ("_inner", "_lock", "_special_ids", "marks", "vocab_size")

    def __init__(self, inner: tokenizers.Tokenizer, marks: Marks | None = None):
        """Wrap `inner`, which is this object's from now on (its padding is set off).

        Its post-processor is made to agree with `marks`; None takes the marks from it.
        """
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True
        self._inner = inner
        self._lock = threading.Lock()
        self.marks = marks or marks_of(inner)
        before, after = frame_of(inner)
        if bool(before) != self.marks.adds_bos:
            set_frame(inner, [self.begin_id] if self.marks.adds_bos else [], after)
        added = inner.get_added_tokens_decoder()
        self._special_ids = frozenset(
            token for token, name in added.items() if name.special
        )
        # Ids may have gaps in foreign files; the model needs a row up to the last one.
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values())

    @property
    def eos_id(self) -> int:
        """The mark that ends a text."""
        return self.marks.eos_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """Where generation ends."""
        return self.marks.stop_ids

    @property
    def begin_id(self) -> int:
        """What begins a document in training and scoring: the mark that the model wants
        there, or, where it wants none, the one that ended the document before."""
        marks = self.marks
        return (
            marks.bos_id if marks.adds_bos and marks.bos_id is not None else self.eos_id
        )

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, uint32 [tokens]; no mark is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text; the library's threads share the work."""
        try:
            with self._lock:
                coded = self._inner.encode_batch_fast(
                    list(texts), add_special_tokens=False
                )
        except (UnicodeEncodeError, TypeError):
            raise _half_a_pair() from None
        return [np.asarray(one.ids, np.uint32) for one in coded]

    def remember(self, words: int) -> None:
        """Keep the ids of so many words at hand, for one who encodes much text. The
        library keeps 10,000 and has no public name for it."""
        resize = getattr(self._inner.model, "_resize_cache", None)
        if resize is not None:
            resize(words)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Return the ids of a text to go on from, uint32 [tokens]: with the marks that
        the model expects around a text, and no others."""
        return np.asarray(self._encode(text, framed=True, markup=False).ids, np.uint32)

    def encode_markup(self, text: str) -> np.ndarray:
        """Return the ids of text in which marks are written as their names, uint32
        [tokens]: what a chat template made. Nothing is added."""
        return np.asarray(self._encode(text, framed=False, markup=True).ids, np.uint32)

    def align_markup(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return `encode_markup`, and the characters of `text` that each id stands for:
        [tokens, 2], first and one past the last."""
        coded = self._encode(text, framed=False, markup=True)
        spans = np.asarray(coded.offsets, np.int64).reshape(-1, 2)
        return np.asarray(coded.ids, np.uint32), spans

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; marks say nothing, broken UTF-8 becomes U+FFFD."""
        return self._inner.decode([int(one) for one in ids], skip_special_tokens=True)

    def special_ids(self) -> frozenset[int]:
        """Return the ids of all marks: the tokens that say nothing."""
        return self._special_ids

    def special_names(self) -> dict[str, str]:
        """Return the marks by role (`bos_token`, `eos_token`, ...), as templates and
        tokenizer_config.json call them."""
        named = {
            role: value["content"] if isinstance(value, dict) else value
            for role, value in self.marks.config.items()
            if role.endswith("_token") and isinstance(value, str | dict)
        }
        if not self.marks.config:
            if self.marks.bos_id is not None:
                named["bos_token"] = self._inner.id_to_token(self.marks.bos_id)
            named["eos_token"] = self._inner.id_to_token(self.marks.eos_id)
        return named

    def with_chat_template(self, template: str) -> Tokenizer:
        """Return the same tokenizer for a model that converses by `template`."""
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        return Tokenizer(inner, replace(self.marks, chat_template=template))

    def to_json(self) -> str:
        """Return a tokenizer.json with the marks under one more key."""
        plain = msgspec.json.decode(self._inner.to_str())
        return msgspec.json.encode({_OUR_KEY: self.marks.to_plain(), **plain}).decode()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Rebuild from `to_json` or any tokenizer.json; ConfigError if it is none."""
        return cls(*read_json(text))

    def files(self) -> dict[str, str]:
        """Return the tokenizer's part of a Hugging Face folder, by file name."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.marks.config}
        marks = {"bos_token": self.marks.bos_id, "eos_token": self.eos_id}
        for role, token in marks.items():
            if token is not None and config.get(role) is None:
                config[role] = self._inner.id_to_token(token)
        if config.get("pad_token") is None:
            config["pad_token"] = config["eos_token"]
        files = {
            "tokenizer.json": self._inner.to_str(pretty=True),
            "tokenizer_config.json": _pretty(config),
            "special_tokens_map.json": _pretty(
                {
                    role: config[role]
                    for role in sorted(config)
                    if _is_mark(role, config)
                }
            ),
        }
        if self.marks.chat_template is not None:
            files["chat_template.jinja"] = self.marks.chat_template
        return files

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token by name, marks included."""
        return self._inner.get_vocab(with_added_tokens=True)

    def steps(self) -> dict[str, Any]:
        """Return how text is cut before tokens are looked for, in tokenizer.json's
        words: `normalizer` and `pre_tokenizer` (or None), and the `model` by type."""
        inner = self._inner
        return {
            "normalizer": _plain(inner.normalizer),
            "pre_tokenizer": _plain(inner.pre_tokenizer),
            "model": type(inner.model).__name__,
        }

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with anything about the tokenizer."""
        return fingerprint_of(self.to_json())

    def _encode(self, text: str, *, framed: bool, markup: bool) -> tokenizers.Encoding:
        with self._lock:
            self._inner.encode_special_tokens = not markup
            try:
                return self._inner.encode(text, add_special_tokens=framed)
            except (UnicodeEncodeError, TypeError):
                raise _half_a_pair() from None
            finally:
                self._inner.encode_special_tokens = True


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


def read_json(text: str) -> tuple[tokenizers.Tokenizer, Marks | None]:
    """Return the library's object of a tokenizer.json, and the marks where it is one
    that `Tokenizer.to_json` made; ConfigError if it is none."""
    try:
        plain = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError) as problem:
        raise ConfigError(f"not a tokenizer.json: {problem}") from None
    marks = plain.pop(_OUR_KEY, None) if isinstance(plain, dict) else None
    if marks is not None:
        text = msgspec.json.encode(plain).decode()
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as problem:  # the library raises bare Exception
        raise ConfigError(f"not a tokenizer.json: {problem}") from None
    return inner, None if marks is None else Marks.from_plain(marks)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, model_name: str) -> None:
    """Raise ConfigError if the tokenizer has ids for which the model has no row.

    Fewer are fine: models pad their vocabularies.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the vocabulary of "
            f"model {model_name} has room for {vocab_size}. Use the model's own "
            "tokenizer (data.tokenizer = `auto`), or set data.tokenizer = `train` to "
            "train one that fits."
        )


def prompt_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the ids of a text to continue, uint32 [tokens], at least one: an empty
    text begins a new document."""
    ids = tokenizer.encode_prompt(text)
    return ids if ids.size else np.array([tokenizer.begin_id], np.uint32)


def _half_a_pair() -> DataError:
    return DataError(
        "a text cannot be written as UTF-8: it holds half of a surrogate pair."
    )


def _plain(part: Any) -> dict[str, Any] | None:
    """One part of the library's object as JSON data: its pickled form is JSON."""
    return None if part is None else json.loads(part.__getstate__())


def _is_mark(role: str, config: dict[str, Any]) -> bool:
    return role.endswith("_token") and isinstance(config[role], str | dict)


def _pretty(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
