"""Turn the text that a config names into files of tokens, once; then open them.

The result lies in the cache under a key made of everything it depends on: the sources'
stamps, the settings, the tokenizer, this code. Held-out text is told apart first, so
the tokenizer never sees it. Every document begins with a mark: its first token is
predicted from that, and no document is predicted from nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers

from llmos_jax.config.schema import DataSection
from llmos_jax.data.cache import open_or_build
from llmos_jax.data.conversations import is_chat
from llmos_jax.data.folder import load_tokenizer
from llmos_jax.data.sides import read_sides
from llmos_jax.data.sources import fingerprint_sources
from llmos_jax.data.stream import TokenStream
from llmos_jax.data.token_file import (
    code_digest,
    encode,
    encode_conversations,
    open_token_file,
)
from llmos_jax.data.tokenizer import Tokenizer, check_vocabulary
from llmos_jax.data.trained import bytes_tokenizer, train_bpe
from llmos_jax.errors import ConfigError
from llmos_jax.ir import fingerprint_of
from llmos_jax.units import format_bytes

# A tokenizer is trained on the first 64 MiB: its counts hardly move after that, and the
# trainer holds every distinct word in memory.
TRAINER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A part of a mixture."""

    name: str
    """The entry of `data.train`."""
    weight: float
    tokens: TokenStream


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedText:
    """What a run reads: the tokenizer, the tokens, and how they came about."""

    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream
    test: TokenStream | None
    held_out_by: str
    """How validation text was told apart, in words for a report."""
    folder: Path | None = None
    """Where all files lie; None: in several places."""
    sources: tuple[Source, ...] = ()
    """Of a mixture: its parts, in the order of `data.train`."""

    @property
    def weights(self) -> tuple[float, ...]:
        """How much of the batches comes of each part of `train`; (): it is one text."""
        return tuple(source.weight for source in self.sources)

    @property
    def stats(self) -> dict[str, Any]:
        """Return plain counts for a report: documents, bytes, tokens, bytes a token,
        and of a mixture the same of each source, with its share of the batches."""
        sides = {"train": self.train, "validation": self.validation, "test": self.test}
        whole = sum(self.weights)
        sources = [
            {"name": one.name, "share": one.weight / whole, **_counts(one.tokens)}
            for one in self.sources
        ]
        return {
            "held_out_by": self.held_out_by,
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            **{name: _counts(side) for name, side in sides.items() if side},
            **({"sources": sources} if sources else {}),
        }


def prepare_text(
    section: DataSection,
    *,
    vocab_size: int,
    model_name: str,
    cache: Path,
    on_progress: Callable[[str], None],
    own: Tokenizer | None = None,
    given: Tokenizer | None = None,
) -> PreparedText:
    """Return the tokenizer and token files of plain `[data]`, from the cache where they
    are.

    `own` is the tokenizer that the model came with, which `data.tokenizer = auto`
    takes; `given` is one to take whatever `data.tokenizer` says.
    Conversations (`data.format`) give files with weights, see `TokenFile`.

    Raises:
        DataError: sources that cannot be read, or too little text.
        ConfigError: a tokenizer that cannot be read or does not fit the model, or
            conversations and no template to write them by.
    """
    if given is None:
        given = given_tokenizer(section.tokenizer, own)
        if given:
            check_vocabulary(given, vocab_size, model_name)
            given = with_template(given, section)
    if is_chat(section, section.train):
        check_template(given)
    folder = cache / "text" / _key(section, given, vocab_size)
    facts = open_or_build(
        folder,
        lambda room: _build(section, given, vocab_size, room, on_progress),
        on_progress,
    )
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return PreparedText(
        tokenizer=Tokenizer.from_json(text),
        train=open_token_file(folder, "train", facts),
        validation=open_token_file(folder, "validation", facts),
        test=open_token_file(folder, "test", facts) if "test" in facts else None,
        held_out_by=facts["held_out_by"],
        folder=folder,
    )


def train_on(
    sections: Sequence[DataSection],
    weights: Sequence[float],
    vocab_size: int,
    cache: Path,
    on_progress: Callable[[str], None],
) -> Tokenizer:
    """Train a tokenizer on the training sides of several texts, of each as much as its
    weight says; from the cache where it is."""

    def build(room: Path) -> dict[str, Any]:
        on_progress(
            f"training a tokenizer of {vocab_size} tokens on {len(weights)} texts"
        )
        with ExitStack() as stack:
            texts: list[Iterable[str]] = []
            for number, (section, weight) in enumerate(zip(sections, weights)):
                (part := room / str(number)).mkdir()
                sides, _ = read_sides(section, part, stack)
                size = round(TRAINER_BYTES * weight / sum(weights))
                texts.append(_first(sides["train"], size))
            made = train_bpe(chain.from_iterable(texts), vocab_size)
        for number in range(len(sections)):
            shutil.rmtree(room / str(number))
        (room / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
        return {}

    keys = [_key(section, None, vocab_size) for section in sections]
    folder = cache / "tokenizers" / fingerprint_of([keys, list(weights)])
    open_or_build(folder, build, on_progress)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return Tokenizer.from_json(text)


def with_template(tokenizer: Tokenizer, section: DataSection) -> Tokenizer:
    """Return the tokenizer with the template of `data.chat_template`, if it is set."""
    if section.chat_template is None:
        return tokenizer
    path = Path(section.chat_template).expanduser()
    try:
        return tokenizer.with_chat_template(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "it is not text"
        raise ConfigError(
            f"data.chat_template {path} cannot be read: {reason}."
        ) from None


def given_tokenizer(choice: str, own: Tokenizer | None) -> Tokenizer | None:
    """Return the tokenizer that `data.tokenizer` names; None: it is to be trained."""
    if choice == "auto":
        return own
    if choice == "train":
        return None
    return bytes_tokenizer() if choice == "bytes" else load_tokenizer(choice)


def check_template(given: Tokenizer | None) -> None:
    """Raise ConfigError where there is no template to write conversations by."""
    if given is not None and given.marks.chat_template is not None:
        return
    whose = "a tokenizer trained here" if given is None else "this tokenizer"
    raise ConfigError(
        f"data.train holds conversations, and {whose} has no chat template to write "
        "them by. Start from an instruction-tuned model with data.tokenizer = `auto`, "
        "set data.chat_template to the path of a Jinja template (and data.tokenizer to "
        "one that has the marks it writes), or data.format = `text`."
    )


def _key(section: DataSection, given: Tokenizer | None, vocab_size: int) -> str:
    trained = ["train", vocab_size, tokenizers.__version__]
    return fingerprint_of(
        [
            code_digest(),
            fingerprint_sources(section.train),
            fingerprint_sources(section.validation) if section.validation else None,
            fingerprint_sources(section.test) if section.test else None,
            None if section.validation else section.validation_share,
            section.text_key,
            [section.format, section.messages_key],
            given.fingerprint if given else trained,
        ]
    )


def _build(
    section: DataSection,
    given: Tokenizer | None,
    vocab_size: int,
    room: Path,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Fill `room`: read, split, train the tokenizer, encode. Return the facts."""
    on_progress(f"reading {', '.join(section.train)}")
    with ExitStack() as stack:
        sides, held_out_by = read_sides(section, room, stack)
        train = sides["train"]
        on_progress(f"{train.num_documents} documents, {format_bytes(train.num_bytes)}")
        if given is None:
            on_progress(f"training a tokenizer of {vocab_size} tokens")
        tokenizer = given or train_bpe(_first(train, TRAINER_BYTES), vocab_size)
        facts: dict[str, Any] = {"held_out_by": held_out_by}
        for name, spool in sides.items():
            on_progress(f"encoding {format_bytes(spool.num_bytes)} of {name} text")
            path = room / f"{name}.bin"
            if is_chat(section, _patterns(section, name)):
                keep = name != "train"
                facts[name] = encode_conversations(
                    spool, tokenizer, path, keep_answers=keep
                )
            else:
                facts[name] = encode(spool, tokenizer, path)
    train.path.unlink(missing_ok=True)  # conversations are not kept
    (room / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return facts


def _patterns(section: DataSection, side: str) -> tuple[str, ...]:
    named = {"validation": section.validation, "test": section.test}.get(side)
    return named or section.train


def _first(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    for text in texts:
        if num_bytes <= 0:
            return
        yield text[:num_bytes]
        num_bytes -= len(text)


def _counts(file: TokenStream) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "documents": file.num_documents,
        "bytes": file.num_bytes,
        "tokens": file.num_tokens,
        "bytes_per_token": file.num_bytes / file.num_tokens,
        "fingerprint": file.fingerprint,
    }
    if file.num_answer_tokens is not None:
        counts["answer_tokens"] = file.num_answer_tokens
        counts["skipped"] = file.num_skipped
        counts["bytes_per_token"] = file.num_bytes / file.num_answer_tokens
    return counts
