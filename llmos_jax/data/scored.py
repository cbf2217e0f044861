"""Turn one side of a text into tokens with a tokenizer that is there already.

Named text is taken whole; held-out text is told apart from the training text by the
same split as `tokens.prepare_text` makes, so a run's own held-out text is found again.
The result is cached under a key of its own; nothing but this side is encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmos_jax.config.schema import DataSection
from llmos_jax.data.cache import open_or_build
from llmos_jax.data.conversations import is_chat
from llmos_jax.data.sides import read_held_out, read_side
from llmos_jax.data.sources import fingerprint_sources
from llmos_jax.data.token_file import (
    TokenFile,
    code_digest,
    encode,
    encode_conversations,
    open_token_file,
)
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.ir import fingerprint_of
from llmos_jax.units import format_bytes


def prepare_side(
    side: str,
    patterns: tuple[str, ...],
    section: DataSection,
    tokenizer: Tokenizer,
    *,
    cache: Path,
    on_progress: Callable[[str], None],
) -> TokenFile:
    """Return all text that the patterns name as one side, from the cache where it is.

    Raises:
        DataError: sources that cannot be read.
        ConfigError: conversations, and no template to write them by.
    """
    key = _key(side, patterns, None, section, tokenizer)
    return _open(side, cache / "sides" / key, patterns, section, tokenizer, on_progress)


def prepare_held_out(
    section: DataSection,
    tokenizer: Tokenizer,
    *,
    cache: Path,
    on_progress: Callable[[str], None],
) -> TokenFile:
    """Return what `data.train` holds out, from the cache where it is; raises as
    `prepare_side`, and DataError for too little text."""
    key = _key(
        "validation", section.train, section.validation_share, section, tokenizer
    )
    folder = cache / "sides" / key
    return _open("validation", folder, None, section, tokenizer, on_progress)


def _key(
    side: str,
    patterns: tuple[str, ...],
    share: float | None,
    section: DataSection,
    tokenizer: Tokenizer,
) -> str:
    return fingerprint_of(
        [
            code_digest(),
            [side, share],
            fingerprint_sources(patterns),
            section.text_key,
            [section.format, section.messages_key],
            tokenizer.fingerprint,
        ]
    )


def _open(
    side: str,
    folder: Path,
    patterns: tuple[str, ...] | None,
    section: DataSection,
    tokenizer: Tokenizer,
    on_progress: Callable[[str], None],
) -> TokenFile:
    """`patterns` None: what is held out of data.train."""

    def build(room: Path) -> dict[str, Any]:
        path = room / f"{side}.bin"
        with ExitStack() as stack:
            if patterns is None:
                spool = read_held_out(section, room, stack)
            else:
                spool = read_side(section, patterns, room / f"{side}.txt", stack)
            on_progress(f"encoding {format_bytes(spool.num_bytes)} of {side} text")
            if is_chat(section, patterns or section.train):
                keep = side != "train"
                return encode_conversations(spool, tokenizer, path, keep_answers=keep)
            facts = encode(spool, tokenizer, path)
        if side == "train":
            spool.path.unlink()  # training text is not kept
        return facts

    facts = open_or_build(folder, build, on_progress)
    return open_token_file(folder, side, {side: facts})
