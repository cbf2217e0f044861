"""Turn the text that a config names into files of tokens, once; then open them.

The result lies in the cache under a key made of everything it depends on: the sources'
stamps, the settings, the tokenizer, this code. Held-out text is told apart first, so
the tokenizer never sees it. Every document begins with the end mark: its first token is
predicted from that, and no document is predicted from nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from llmos_jax.config.schema import DataSection
from llmos_jax.data.cache import open_or_build
from llmos_jax.data.sides import read_sides
from llmos_jax.data.sources import fingerprint_sources
from llmos_jax.data.token_file import (
    TokenFile,
    code_digest,
    encode,
    open_token_file,
)
from llmos_jax.data.tokenizer import (
    Tokenizer,
    bytes_tokenizer,
    check_vocabulary,
    load_tokenizer,
    train_bpe,
)
from llmos_jax.ir import fingerprint_of
from llmos_jax.units import format_bytes

# A tokenizer is trained on the first 64 MiB: its counts hardly move after that, and the
# trainer holds every distinct word in memory.
_TRAINER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedText:
    """What a run reads: the tokenizer, the token files, and how they came about."""

    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    test: TokenFile | None
    held_out_by: str
    """How validation text was told apart, in words for a report."""
    folder: Path

    @property
    def stats(self) -> dict[str, Any]:
        """Return plain counts for a report: documents, bytes, tokens, bytes a token."""
        sides = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "held_out_by": self.held_out_by,
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            **{name: _counts(side) for name, side in sides.items() if side},
        }


def prepare(
    section: DataSection,
    *,
    vocab_size: int,
    model_name: str,
    cache: Path,
    on_progress: Callable[[str], None],
) -> PreparedText:
    """Return the tokenizer and token files of `[data]`, from the cache where they are.

    Raises:
        DataError: sources that cannot be read, or too little text.
        ConfigError: a tokenizer that cannot be read or does not fit the model.
    """
    given = _given_tokenizer(section.tokenizer)
    if given:
        check_vocabulary(given, vocab_size, model_name)
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


def _given_tokenizer(choice: str) -> Tokenizer | None:
    if choice == "train":
        return None
    return bytes_tokenizer() if choice == "bytes" else load_tokenizer(choice)


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
        tokenizer = given or train_bpe(_first(train, _TRAINER_BYTES), vocab_size)
        facts: dict[str, Any] = {"held_out_by": held_out_by}
        for name, spool in sides.items():
            on_progress(f"encoding {format_bytes(spool.num_bytes)} of {name} text")
            facts[name] = encode(spool, tokenizer, room / f"{name}.bin")
    train.path.unlink()
    (room / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return facts


def _first(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    for text in texts:
        if num_bytes <= 0:
            return
        yield text[:num_bytes]
        num_bytes -= len(text)


def _counts(file: TokenFile) -> dict[str, Any]:
    return {
        "documents": file.num_documents,
        "bytes": file.num_bytes,
        "tokens": file.num_tokens,
        "bytes_per_token": file.num_bytes / file.num_tokens,
        "fingerprint": file.fingerprint,
    }
