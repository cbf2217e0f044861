"""What a corpus depends on, checked before anything is read."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from llmos_jax.config.schema import DataSection, PrepareSection
from llmos_jax.corpus.sides import check_shares
from llmos_jax.data.conversations import is_chat
from llmos_jax.data.corpora import is_corpus
from llmos_jax.data.sources import fingerprint_sources
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.errors import ConfigError
from llmos_jax.ir import fingerprint_of


def out_of(limits: PrepareSection) -> Path:
    """Return the folder of the corpus; ConfigError where none is named."""
    if not limits.out:
        raise ConfigError(
            "where is the corpus to lie? Name a new folder: --set prepare.out=DIR."
        )
    return Path(limits.out).expanduser()


def check(section: DataSection, limits: PrepareSection, out: Path) -> None:
    """Raise ConfigError for what cannot be prepared, or not so, or not there."""
    check_shares(section, limits.test_share)
    if limits.shard_tokens < 1:
        raise ConfigError(f"prepare.shard_tokens is {limits.shard_tokens}; at least 1.")
    if not 0 <= limits.near_duplicates <= 1:
        raise ConfigError(
            f"prepare.near_duplicates is {limits.near_duplicates:g}; it is a share, 0 "
            "(keep them) to 1."
        )
    for pattern in (*section.train, *section.validation, *section.test):
        if is_corpus(pattern):
            raise ConfigError(f"{pattern} is a corpus already: train on it as it is.")
        if Path(pattern).is_dir() and out.resolve().is_relative_to(
            Path(pattern).resolve()
        ):
            raise ConfigError(
                f"prepare.out {out} lies in {pattern}, which is to be read. Name a "
                "folder elsewhere."
            )
    if is_chat(section, section.train):
        raise ConfigError(
            "data.train holds conversations; a corpus is of text. `train` prepares "
            "conversations itself; to take them as text, set data.format = `text` and "
            "data.text_key."
        )


def settings_of(
    section: DataSection,
    limits: PrepareSection,
    given: Tokenizer | None,
    vocab_size: int,
) -> dict[str, Any]:
    """Return what the corpus depends on, by name."""
    ours = msgspec.to_builtins(limits)
    theirs = ("text_key", "validation_share", "tokenizer")
    trained = ["train", vocab_size, tokenizers.__version__]
    patterns = [section.train, section.validation, section.test]
    return {
        **{
            f"prepare.{key}": value
            for key, value in ours.items()
            if key not in ("out", "workers")
        },
        **{f"data.{key}": getattr(section, key) for key in theirs},
        "sources": fingerprint_of(
            [fingerprint_sources(one) if one else None for one in patterns]
        ),
        "tokenizer": given.fingerprint if given else trained,
        "code": _code(),
    }


def _code() -> str:
    """Digest what turns text into texts here, and the versions of what it calls."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    for library in ("ftfy", "rensa", "array_record"):
        digest.update(version(library).encode())
    return digest.hexdigest()[:16]
