"""Turn the text that a finished model is scored on into tokens, with its own tokenizer.

The text is `data.test`, else `data.validation`, else what `data.train` holds out: the
same split as `tokens.prepare` makes, so a run's own held-out text is found again. The
result is cached under a key of its own; nothing but the scored text is encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmos_jax.config.schema import DataSection
from llmos_jax.data.cache import open_or_build
from llmos_jax.data.conversations import is_chat
from llmos_jax.data.sides import read_scored, scored_patterns
from llmos_jax.data.sources import fingerprint_sources
from llmos_jax.data.token_file import (
    TokenFile,
    code_digest,
    encode,
    encode_conversations,
    open_token_file,
)
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.data.tokens import with_template
from llmos_jax.ir import fingerprint_of
from llmos_jax.units import format_bytes


def prepare_scored(
    section: DataSection,
    tokenizer: Tokenizer,
    *,
    cache: Path,
    on_progress: Callable[[str], None],
) -> TokenFile:
    """Return the text to score, cut by `tokenizer`, from the cache where it is.

    Raises:
        DataError: sources that cannot be read, or too little text.
        ConfigError: conversations, and no template to write them by.
    """
    tokenizer = with_template(tokenizer, section)
    folder = cache / "scored" / _key(section, tokenizer)
    facts = open_or_build(
        folder,
        lambda room: _build(section, tokenizer, room, on_progress),
        on_progress,
    )
    return open_token_file(folder, facts["side"], facts)


def _key(section: DataSection, tokenizer: Tokenizer) -> str:
    named = section.test or section.validation
    return fingerprint_of(
        [
            code_digest(),
            ["test" if section.test else "validation", bool(named)],
            fingerprint_sources(named or section.train),
            None if named else section.validation_share,
            section.text_key,
            [section.format, section.messages_key],
            tokenizer.fingerprint,
        ]
    )


def _build(
    section: DataSection,
    tokenizer: Tokenizer,
    room: Path,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Fill `room` with the scored side; return the facts."""
    with ExitStack() as stack:
        side, spool = read_scored(section, room, stack)
        on_progress(f"encoding {format_bytes(spool.num_bytes)} of {side} text")
        path = room / f"{side}.bin"
        if is_chat(section, scored_patterns(section)):
            facts = encode_conversations(spool, tokenizer, path, keep_answers=True)
        else:
            facts = encode(spool, tokenizer, path)
        return {"side": side, side: facts}
