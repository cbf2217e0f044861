"""Cut rows of T tokens out of a file of text. Legend: T query tokens, B sequences."""

from __future__ import annotations

import numpy as np

from llmos_jax.data.stream import TokenStream, said
from llmos_jax.errors import DataError

Batch = dict[str, np.ndarray]


class RowSource:
    """Rows of T tokens and the T that follow each, int32: {"inputs", "targets"}, and
    "segments" with a document mask. The last target of a row is the next one's first
    input."""

    def __init__(
        self, tokens: TokenStream, seq_len: int, *, document_mask: bool = False
    ):
        self._tokens = tokens
        self._ids = tokens.open()
        self._seq_len = seq_len
        self._mark = mark_of(tokens, document_mask)
        self._num_rows = (tokens.num_tokens - 1) // seq_len
        if self._num_rows < 1:
            raise DataError(
                f"{tokens.name} text has {tokens.num_tokens} tokens, but one row "
                f"needs {seq_len + 1} (batch.seq_len + 1). Give more text, or lower "
                "batch.seq_len."
            )

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> Batch:
        start = row * self._seq_len
        ids = self._ids[start : start + self._seq_len + 1].astype(np.int32)
        found = {"inputs": ids[:-1], "targets": said(self._tokens, ids[1:])}
        return found | segments(found["inputs"], self._mark)


def mark_of(tokens: TokenStream, document_mask: bool) -> int | None:
    """The token that begins a new segment; None where there are no segments."""
    if not document_mask:
        return None
    if tokens.end_id is None:
        raise DataError(
            f"{tokens.name} text has no end mark that tells its documents apart. "
            "Leave data.document_mask out, and data.packing."
        )
    return tokens.end_id


def segments(inputs_XT: np.ndarray, mark: int | None) -> Batch:
    """Number the documents of each row from 0 (X: any dims); {} without a mark."""
    if mark is None:
        return {}
    begins_XT = inputs_XT == mark
    begins_XT[..., 0] = False
    return {"segments": np.cumsum(begins_XT, axis=-1, dtype=np.int32)}
