"""Turn rows into a side that can be trained or scored on: ids, labels, texts.

Texts are cut to the tokens that a model takes. A text is cut to a generous number of
characters first, so that one of many megabytes costs no more than others.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmos_jax.data.labelled.lines import Notes
from llmos_jax.data.labelled.read import Row
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.errors import DataError

CHARACTERS_A_TOKEN = 32
"""What is kept of a text, for each token that is wanted: a judgement. English has 4 to
5 characters a token, source with its indentation 3 to 10."""
_ROUND = 4096  # texts encoded at once: bounds memory, feeds every thread


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledSide:
    """Rows of one side: their tokens end to end, their labels, their texts."""

    name: str
    """train, validation or test."""
    ids: np.ndarray
    """int32 [tokens]: those of row i are ids[starts[i]:starts[i + 1]], maybe none."""
    starts: np.ndarray
    """int64 [rows + 1]."""
    label: np.ndarray
    """int32 [rows]: the place of each row's label among the labels; -1: none."""
    rows: tuple[Row, ...]
    """Text and place of each row."""
    num_bytes: int
    """UTF-8 bytes of all texts, uncut."""
    counts: tuple[int, ...]
    """Rows of each label."""
    num_cut: int
    """Rows whose text has more tokens than are kept."""
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.ids.size)

    @property
    def has_labels(self) -> bool:
        """Whether any row has a label."""
        return any(self.counts)

    def tokens(self, row: int) -> np.ndarray:
        """Ids of a row, int32."""
        return self.ids[self.starts[row] : self.starts[row + 1]]

    def text(self, row: int) -> str:
        """Text of a row, uncut."""
        return self.rows[row].text

    def place(self, row: int) -> str:
        """Where a row stands: path:line."""
        return self.rows[row].place

    def stats(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return plain counts for a report."""
        return {
            "rows": len(self),
            "bytes": self.num_bytes,
            "tokens": self.num_tokens,
            "cut": self.num_cut,
            "classes": dict(zip(labels, self.counts)),
            "fingerprint": self.fingerprint,
        }


def shortened(text: str, seq_len: int) -> str:
    """Return as much of a text as is cut into tokens."""
    return text[: seq_len * CHARACTERS_A_TOKEN]


def encode_side(
    name: str,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    labels: Sequence[str],
    seq_len: int,
    notes: Notes,
) -> LabelledSide:
    """Cut rows into tokens: at most `seq_len` of each, with the mark that the model
    wants before a text, if it wants one.

    Raises:
        DataError: no row, or a text that cannot be written as UTF-8.
    """
    if not rows:
        raise DataError(f"data.{name} has no rows.")
    begin = [tokenizer.begin_id] if tokenizer.marks.adds_bos else []
    found: list[np.ndarray] = []
    num_cut = 0
    for start in range(0, len(rows), _ROUND):
        part = rows[start : start + _ROUND]
        for row, ids in zip(part, _encode(part, tokenizer, seq_len)):
            framed = np.concatenate([np.asarray(begin, np.int32), ids.astype(np.int32)])
            is_shorter = len(row.text) > seq_len * CHARACTERS_A_TOKEN
            num_cut += len(framed) > seq_len or is_shorter
            found.append(framed[:seq_len])
    if num_cut:
        notes.append(
            f"{num_cut} of {len(rows)} {name} texts are longer than {seq_len} tokens "
            "(batch.seq_len): their ends are cut off"
        )
    sizes = np.fromiter(map(len, found), np.int64, len(found))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    ids = np.concatenate(found)
    numbers = {label: number for number, label in enumerate(labels)}
    label = np.array(
        [-1 if row.label is None else numbers[row.label] for row in rows], np.int32
    )
    counts = np.bincount(label[label >= 0], minlength=len(labels))
    return LabelledSide(
        name=name,
        ids=ids,
        starts=starts,
        label=label,
        rows=tuple(rows),
        num_bytes=sum(len(row.text.encode("utf-8", "replace")) for row in rows),
        counts=tuple(map(int, counts)),
        num_cut=num_cut,
        fingerprint=_fingerprint(ids, starts, label, labels),
    )


def _encode(
    rows: Sequence[Row], tokenizer: Tokenizer, seq_len: int
) -> list[np.ndarray]:
    texts = [shortened(row.text, seq_len) for row in rows]
    try:
        return tokenizer.encode_batch(texts)
    except DataError:
        for row, text in zip(rows, texts):
            try:
                tokenizer.encode(text)
            except DataError as problem:
                raise DataError(f"{row.place}: {problem}") from None
        raise


def _fingerprint(
    ids: np.ndarray, starts: np.ndarray, label: np.ndarray, labels: Sequence[str]
) -> str:
    digest = hashlib.sha256("\0".join(labels).encode("utf-8", "replace"))
    for part in (ids, starts, label):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def hold_out(
    rows: Sequence[Row], share: float, notes: Notes
) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows): of each class the share with the lowest
    content hashes, and at least one row where the class has two.

    Rows of the same words (or of one `group`) stay together. Adding a row moves at
    most few others, and never the order of any.

    Raises:
        DataError: a share that is none, or rows too few to hold any out.
    """
    if not 0 < share < 1:
        raise DataError(
            f"data.validation_share is {share:g}; it must lie between 0 and 1, or "
            "data.validation must name held-out rows."
        )
    keys = [_content(row) for row in rows]
    groups: dict[bytes, Counter[str]] = defaultdict(Counter)
    classes: dict[str, Counter[bytes]] = defaultdict(Counter)
    for key, row in zip(keys, rows):
        groups[key][row.label or ""] += 1
        classes[row.label or ""][key] += 1
    left = Counter({label: held.total() for label, held in classes.items()})
    held: set[bytes] = set()
    few = []
    for label, mine in sorted(classes.items()):
        wanted = max(1, round(share * mine.total()))
        taken = sum(mine[key] for key in mine.keys() & held)
        for key in sorted(mine.keys() - held):
            if taken >= wanted:
                break
            if all(left[one] > size for one, size in groups[key].items()):
                held.add(key)
                left -= groups[key]
                taken += mine[key]
        if share * mine.total() < 1:
            few.append(label)
    if not held:
        raise DataError(
            f"{len(rows)} rows of {len(classes)} classes are too few to hold any out. "
            "Give more, or name data.validation."
        )
    if few:
        notes.append(
            f"{share:.3g} of the rows of {quoted(few)} is less than one: of each one "
            "is held out where it has two that differ"
        )
    train = [row for key, row in zip(keys, rows) if key not in held]
    return train, [row for key, row in zip(keys, rows) if key in held]


def _content(row: Row) -> bytes:
    """The hash of a row's words, in any case, or of its group."""
    words = " ".join(row.text.split()).casefold() if row.group is None else row.group
    return hashlib.sha256(words.encode("utf-8", "replace")).digest()


def num_shared(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """Return how many rows have the words of one of the others."""
    known = {_content(row) for row in others if row.group is None}
    return sum(row.group is None and _content(row) in known for row in rows)


def quoted(labels: Sequence[str], most: int = 5) -> str:
    """Name some labels, cut to what a message can hold, and count the rest."""
    shown = ", ".join(repr(label[:40]) for label in labels[:most])
    more = len(labels) - most
    return f"{shown} and {more} more" if more > 0 else shown
