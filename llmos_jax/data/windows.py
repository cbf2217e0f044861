"""Turn a file of tokens into batches to score a model on, in order.

Without a stride the windows of T tokens lie end to end. With one, window i begins at
token i * stride and its last `stride` targets are scored (of the first window, all), so
that every other window has T - stride tokens before the first that it is scored on:
what a model says of a token is judged with a context, at T / stride times the cost.
Windows of the guide to perplexity in the documentation of `transformers` with
max_length M are those of T = M - 1 here. Legend: T query tokens (the window), B
sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from llmos_jax.data.packing import PackedRows, empty_row
from llmos_jax.data.rows import Batch, mark_of, segments
from llmos_jax.data.stream import TokenStream, said
from llmos_jax.errors import ConfigError, DataError


def num_evaluation_batches(
    tokens: TokenStream,
    *,
    seq_len: int,
    batch: int,
    limit: int | None = None,
    stride: int | None = None,
) -> int:
    """Return how many batches `evaluation_batches` yields."""
    whole = math.ceil(_num_windows(tokens, seq_len, stride) / batch)
    return whole if limit is None else min(whole, limit)


def evaluation_batches(
    tokens: TokenStream,
    *,
    seq_len: int,
    batch: int,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
    document_mask: bool = False,
    stride: int | None = None,
    begin_id: int | None = None,
) -> Iterator[Batch]:
    """Yield {"inputs", "targets" int32, "weights" float32}, [batch, T], in order.

    Every token but the first is a target of weight 1 exactly once; what fills the last
    rows has weight 0. Of conversations, each is scored whole, the targets of weight 1
    are the answers' tokens, and there are "segments" always.

    Args:
        tokens: what to read.
        seq_len: T.
        batch: rows of one batch.
        limit: that many batches, spread evenly over the text, so that a part still
            stands for the whole; None for all.
        rows: which rows of each batch are wanted; None for all.
        document_mask: add "segments", as in training.
        stride: tokens from one window to the next, 1 to T; None for T.
        begin_id: put in place of the first token of every window but the first, for
            models that expect a text to begin with it.

    Raises:
        ConfigError: a stride that skips tokens, or a stride for conversations.
        DataError: no token to predict.
    """
    count = num_evaluation_batches(
        tokens, seq_len=seq_len, batch=batch, limit=limit, stride=stride
    )
    whole = num_evaluation_batches(tokens, seq_len=seq_len, batch=batch, stride=stride)
    if not tokens.is_chat:
        mark = mark_of(tokens, document_mask)
        source: _Windows | _Conversations = _Windows(
            tokens, seq_len, stride or seq_len, begin_id, mark
        )
    else:
        source = _Conversations(tokens, seq_len)
    chosen = list(range(batch)) if rows is None else list(rows)
    for index in range(count):
        first = index * whole // count * batch
        taken = [source.row(first + position) for position in chosen]
        yield {name: np.stack([row[name] for row in taken]) for name in taken[0]}


def _num_windows(tokens: TokenStream, seq_len: int, stride: int | None) -> int:
    if stride is not None and not 1 <= stride <= seq_len:
        raise ConfigError(
            f"a stride of {stride} with windows of {seq_len} tokens: it must be 1 to "
            f"{seq_len}, or tokens would be skipped."
        )
    if tokens.is_chat:
        if stride is not None:
            raise ConfigError(
                "a stride is for text: conversations are scored whole. Leave it out."
            )
        return len(PackedRows(tokens, seq_len))
    if tokens.num_tokens < 2:
        raise DataError(f"{tokens.name} text has no token to predict.")
    beyond_first = max(0, tokens.num_tokens - 1 - seq_len)
    return 1 + math.ceil(beyond_first / (stride or seq_len))


class _Windows:
    """Rows of text by number; those past the last are padding."""

    def __init__(
        self,
        tokens: TokenStream,
        seq_len: int,
        stride: int,
        begin_id: int | None,
        mark: int | None,
    ):
        self._tokens = tokens
        self._ids = tokens.open()
        self._seq_len = seq_len
        self._stride = stride
        self._begin_id = begin_id
        self._mark = mark

    def row(self, number: int) -> Batch:
        """Return the window of this number."""
        found = empty_row(self._seq_len)
        found.pop("segments")
        start = number * self._stride
        ids = self._ids[start : start + self._seq_len + 1].astype(np.int32)
        size = max(0, ids.size - 1)
        scored = 0 if number == 0 else self._seq_len - self._stride
        found["inputs"][:size] = ids[:size]
        found["targets"][:size] = said(self._tokens, ids[1:])
        found["weights"][scored:size] = 1
        if number and size and self._begin_id is not None:
            found["inputs"][0] = self._begin_id
        return found | segments(found["inputs"], self._mark)


class _Conversations:
    """Rows of whole conversations by number; those past the last are padding."""

    def __init__(self, tokens: TokenStream, seq_len: int):
        self._rows = PackedRows(tokens, seq_len)
        self._seq_len = seq_len

    def row(self, number: int) -> Batch:
        """Return the row of this number."""
        inside = number < len(self._rows)
        return self._rows[number] if inside else empty_row(self._seq_len)
