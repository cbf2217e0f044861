"""Pack whole conversations into rows, so that little of a row is padding.

Best fit, longest first: each conversation goes into the fullest row that has room for
it. Which share a row depends on the file and the row's length alone, not on a seed or
on processes; training shuffles the rows. One longer than a row is cut at the row's end
and fills it; if no answer is left of it, it is left out. Legend: T tokens of a row.

A conversation of n tokens takes n - 1 places: its last token is only ever a target.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llmos_jax.data.token_file import TokenFile
from llmos_jax.errors import DataError

Row = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Which conversations share a row: row i has `order[bounds[i]:bounds[i + 1]]`."""

    order: np.ndarray
    """int64, numbers of conversations."""
    bounds: np.ndarray
    """int64 [rows + 1]."""
    starts: np.ndarray
    """int64 [conversations + 1], where each begins in the file."""
    num_cut: int
    num_dropped: int
    fill: float
    """Share of all places that conversations take."""


class PackedRows:
    """Rows of T places: {"inputs", "targets", "segments" int32, "weights" float32}.

    Weights are 1 where the target is a token of an answer. Each conversation is a
    segment of its row, counted from 0; the padding is one more.
    """

    def __init__(self, tokens: TokenFile, seq_len: int):
        self._packing = packing_of(tokens, seq_len)
        self._ids = tokens.open()
        self._weights = tokens.open_weights()
        self._seq_len = seq_len

    def __len__(self) -> int:
        return self._packing.bounds.size - 1

    def __getitem__(self, row: int) -> Row:
        packing = self._packing
        found = empty_row(self._seq_len)
        inside = packing.order[packing.bounds[row] : packing.bounds[row + 1]]
        at = 0
        for segment, number in enumerate(inside):
            start, end = packing.starts[number], packing.starts[number + 1]
            size = min(end - start - 1, self._seq_len)
            place = slice(at, at + size)
            found["inputs"][place] = self._ids[start : start + size]
            found["targets"][place] = self._ids[start + 1 : start + size + 1]
            found["weights"][place] = self._weights[start + 1 : start + size + 1]
            found["segments"][place] = segment
            at += size
        found["segments"][at:] = len(inside)
        return found


def empty_row(seq_len: int) -> Row:
    """Return a row of nothing but padding."""
    return {
        "inputs": np.zeros(seq_len, np.int32),
        "targets": np.zeros(seq_len, np.int32),
        "weights": np.zeros(seq_len, np.float32),
        "segments": np.zeros(seq_len, np.int32),
    }


def packing_stats(tokens: TokenFile, seq_len: int) -> dict[str, float]:
    """Return plain counts for a report, of conversations in rows of `seq_len`.

    rows, conversations in them, how many of these were cut, how many were dropped
    because no answer was left, and the share of the rows that is not padding.
    """
    packing = packing_of(tokens, seq_len)
    return {
        "rows": packing.bounds.size - 1,
        "conversations": packing.order.size,
        "cut": packing.num_cut,
        "dropped": packing.num_dropped,
        "fill": packing.fill,
    }


def packing_text(tokens: TokenFile, seq_len: int) -> str:
    """`packing_stats` in a line, with what became of every conversation."""
    stats = packing_stats(tokens, seq_len)
    notes = {
        "cut at the end of a row": stats["cut"],
        "dropped, for no answer begins within a row": stats["dropped"],
        "left out, for they have no answer": tokens.num_skipped or 0,
    }
    said = "".join(f"; {count:.0f} {what}" for what, count in notes.items() if count)
    return (
        f"{stats['conversations']:.0f} conversations in {stats['rows']:.0f} rows of "
        f"{seq_len}, {stats['fill']:.0%} full{said}"
    )


@lru_cache(maxsize=8)  # an evaluation in the middle of a run asks again
def packing_of(tokens: TokenFile, seq_len: int) -> Packing:
    """Pack a file of conversations into rows of `seq_len`.

    Raises:
        DataError: no answer begins within the first `seq_len` tokens of any.
    """
    lengths = tokens.open_lengths()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sizes = np.minimum(lengths - 1, seq_len)
    is_long = lengths - 1 > seq_len
    weights = tokens.open_weights()
    dropped = [
        number
        for number in np.flatnonzero(is_long)
        if not weights[starts[number] + 1 : starts[number] + seq_len + 1].any()
    ]
    kept = np.setdiff1d(np.arange(lengths.size), dropped)
    if not kept.size:
        raise DataError(
            f"{tokens.path.stem}: no answer of {lengths.size} conversations begins in "
            f"the first {seq_len} tokens. Raise batch.seq_len."
        )
    rows = _best_fit(kept[np.argsort(-sizes[kept], kind="stable")], sizes, seq_len)
    return Packing(
        order=np.concatenate([np.asarray(row, np.int64) for row in rows]),
        bounds=np.cumsum([0, *map(len, rows)]),
        starts=starts,
        num_cut=int(is_long.sum()) - len(dropped),
        num_dropped=len(dropped),
        fill=float(sizes[kept].sum() / (len(rows) * seq_len)),
    )


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
