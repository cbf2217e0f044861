"""Pack whole documents into rows, so that none is cut and little of a row is padding.

Best fit, longest first (arXiv 2404.10830): each goes into the fullest row that has room
for it. Which share a row depends on the text and the row's length alone, not on a seed
or on processes; training shuffles the rows. Legend: T tokens of a row.

A conversation of n tokens takes n - 1 places: its last token is only ever a target. A
longer one than a row is cut at the row's end and fills it; if no answer is left of it,
it is left out. A document of text of n tokens takes n: after its last, the end is to be
said. A longer one than a row is cut into rows; what remains is packed as others are.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llmos_jax.data.stream import TokenStream, said
from llmos_jax.errors import DataError

Row = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Which pieces share a row: row i has `order[bounds[i]:bounds[i + 1]]`.

    A piece is a conversation, a document, or a row's worth of a long one.
    """

    order: np.ndarray
    """int64, numbers of pieces."""
    bounds: np.ndarray
    """int64 [rows + 1]."""
    starts: np.ndarray
    """int64 [pieces], where each begins in the stream."""
    sizes: np.ndarray
    """int64 [pieces], places that each takes."""
    num_documents: int
    num_cut: int
    num_dropped: int

    fill: float
    """Share of all places that pieces take."""


class PackedRows:
    """Rows of T places: {"inputs", "targets", "segments" int32, "weights" float32}.

    Weights are 1 where the target is to be learned: a token of an answer, or any token
    of text. Each piece is a segment of its row, counted from 0; padding is one more.
    """

    def __init__(self, tokens: TokenStream, seq_len: int):
        self._tokens = tokens
        self._packing = packing_of(tokens, seq_len)
        self._ids = tokens.open()
        self._weights = tokens.open_weights() if tokens.is_chat else None
        self._seq_len = seq_len

    def __len__(self) -> int:
        return self._packing.bounds.size - 1

    def __getitem__(self, row: int) -> Row:
        packing = self._packing
        found = empty_row(self._seq_len)
        inside = packing.order[packing.bounds[row] : packing.bounds[row + 1]]
        at = 0
        for segment, number in enumerate(inside):
            start, size = int(packing.starts[number]), int(packing.sizes[number])
            place = slice(at, at + size)
            found["inputs"][place] = self._ids[start : start + size]
            found["targets"][place] = self._said(start + 1, size)
            found["weights"][place] = self._learned(start + 1, size)
            found["segments"][place] = segment
            at += size
        found["segments"][at:] = len(inside)
        return found

    def _said(self, start: int, size: int) -> np.ndarray:
        """What follows each token; the end, where the stream ends."""
        ids = self._ids[start : start + size].astype(np.int32)
        if ids.size < size:
            ids = np.append(ids, np.int32(self._tokens.end_id or 0))
        return ids if self._weights is not None else said(self._tokens, ids)

    def _learned(self, start: int, size: int) -> np.ndarray | int:
        return 1 if self._weights is None else self._weights[start : start + size]


def empty_row(seq_len: int) -> Row:
    """Return a row of nothing but padding."""
    return {
        "inputs": np.zeros(seq_len, np.int32),
        "targets": np.zeros(seq_len, np.int32),
        "weights": np.zeros(seq_len, np.float32),
        "segments": np.zeros(seq_len, np.int32),
    }


def packing_stats(tokens: TokenStream, seq_len: int) -> dict[str, float]:
    """Return plain counts for a report, of documents in rows of `seq_len`.

    rows, documents (or conversations) in them, how many of these were cut, how many
    dropped because no answer was left, and the share of the rows that is not padding.
    """
    packing = packing_of(tokens, seq_len)
    return {
        "rows": packing.bounds.size - 1,
        "documents": packing.num_documents,
        "cut": packing.num_cut,
        "dropped": packing.num_dropped,
        "fill": packing.fill,
    }


def packing_text(tokens: TokenStream, seq_len: int) -> str:
    """`packing_stats` in a line, with what became of every conversation."""
    stats = packing_stats(tokens, seq_len)
    what = "conversations" if tokens.is_chat else "documents"
    notes = {
        "cut at the end of a row": stats["cut"],
        "dropped, for no answer begins within a row": stats["dropped"],
        "left out, for they have no answer": tokens.num_skipped or 0,
    }
    noted = "".join(f"; {count:.0f} {note}" for note, count in notes.items() if count)
    return (
        f"{stats['documents']:.0f} {what} in {stats['rows']:.0f} rows of {seq_len}, "
        f"{stats['fill']:.0%} full{noted}"
    )


@lru_cache(maxsize=8)  # an evaluation in the middle of a run asks again
def packing_of(tokens: TokenStream, seq_len: int) -> Packing:
    """Pack conversations or documents into rows of `seq_len`.

    Raises:
        DataError: no answer begins within the first `seq_len` tokens of any.
    """
    lengths = tokens.open_lengths()
    starts = np.cumsum(lengths) - lengths
    if not tokens.is_chat:
        pieces, sizes = _cut(starts, lengths, seq_len)
        dropped = np.empty(0, np.int64)
        is_long = lengths > seq_len
    else:
        pieces, sizes = starts, np.minimum(lengths - 1, seq_len)
        is_long = lengths - 1 > seq_len
        dropped = _without_answer(tokens, starts, is_long, seq_len)
    kept = np.setdiff1d(np.arange(sizes.size), dropped)
    rows = _best_fit(kept[np.argsort(-sizes[kept], kind="stable")], sizes, seq_len)
    return Packing(
        order=np.concatenate([np.asarray(row, np.int64) for row in rows]),
        bounds=np.cumsum([0, *map(len, rows)]),
        starts=pieces,
        sizes=sizes,
        num_documents=lengths.size - dropped.size,
        num_cut=int(is_long.sum()) - dropped.size,
        num_dropped=dropped.size,
        fill=float(sizes[kept].sum() / (len(rows) * seq_len)),
    )


def _cut(
    starts: np.ndarray, lengths: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and sizes of documents, those longer than a row cut into rows."""
    counts = -(-lengths // seq_len)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    offsets = (np.arange(counts.sum()) - first) * seq_len
    sizes = np.minimum(np.repeat(lengths, counts) - offsets, seq_len)
    return np.repeat(starts, counts) + offsets, sizes


def _without_answer(
    tokens: TokenStream, starts: np.ndarray, is_long: np.ndarray, seq_len: int
) -> np.ndarray:
    """Return the numbers of conversations of which a row holds no answer."""
    weights = tokens.open_weights()
    dropped = [
        number
        for number in np.flatnonzero(is_long)
        if not weights[starts[number] + 1 : starts[number] + seq_len + 1].any()
    ]
    if len(dropped) == starts.size:
        raise DataError(
            f"{tokens.name}: no answer of {starts.size} conversations begins in the "
            f"first {seq_len} tokens. Raise batch.seq_len."
        )
    return np.asarray(dropped, np.int64)


def _best_fit(numbers: np.ndarray, sizes: np.ndarray, room: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rows_with: dict[int, list[int]] = defaultdict(list)  # by places left
    left_anywhere = 0  # bit n: some row has n places left
    for number in numbers.tolist():
        size = int(sizes[number])
        fitting = left_anywhere >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = rows_with[left].pop()
            if not rows_with[left]:
                left_anywhere ^= 1 << left
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        left -= size
        if left:
            rows_with[left].append(row)
            left_anywhere |= 1 << left
    return rows
