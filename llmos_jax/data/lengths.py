"""Find how long each document of a text is, once: packing asks.

Every document begins with the mark, and no text holds one, so a pass over the tokens
finds where documents begin. The lengths lie in the cache under the text's fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmos_jax.data.cache import open_or_build
from llmos_jax.data.corpora import CorpusSide
from llmos_jax.data.joined import Joined
from llmos_jax.data.rows import mark_of
from llmos_jax.data.stream import TokenStream
from llmos_jax.data.token_file import TokenFile
from llmos_jax.units import format_si

_CHUNK_TOKENS = 1 << 22
"""Looked through at once: 8 MiB of uint16."""


def with_lengths(
    tokens: TokenStream, cache: Path, on_progress: Callable[[str], None]
) -> TokenStream:
    """Return the same stream with the length of each document.

    Raises:
        DataError: a text whose documents cannot be told apart.
    """
    if tokens.is_chat:
        return tokens
    if isinstance(tokens, Joined):
        parts = [with_lengths(part, cache, on_progress) for part in tokens.parts]
        return Joined(parts=tuple(parts))
    assert isinstance(tokens, TokenFile | CorpusSide), "every stream of text"
    folder = cache / "documents" / tokens.fingerprint

    def build(room: Path) -> dict[str, Any]:
        on_progress(f"finding documents in {format_si(tokens.num_tokens)} tokens")
        starts = _starts(tokens)
        np.diff(starts).astype(np.uint32).tofile(room / "lengths")
        return {}

    open_or_build(folder, build, on_progress)
    return replace(tokens, lengths=folder / "lengths")


def _starts(tokens: TokenStream) -> np.ndarray:
    """Where each document begins, and where the last one ends."""
    ids, mark = tokens.open(), mark_of(tokens, True)
    found = [
        start + np.flatnonzero(ids[start : start + _CHUNK_TOKENS] == mark)
        for start in range(0, tokens.num_tokens, _CHUNK_TOKENS)
    ]
    starts = np.concatenate([*found, [tokens.num_tokens]])
    assert starts[0] == 0, "a mark begins every text"
    return starts
