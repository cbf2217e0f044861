"""The face of prepared text: a stream of token ids, wherever they lie.

A token file in the cache, a side of a corpus and several of them end to end all show
it, so rows, windows, packing and batches are cut the same way from each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Ids(Protocol):
    """A 1-D array that lies somewhere: `ids[start:stop]` brings a part to memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, wanted: slice, /) -> np.ndarray: ...


class TokenStream(Protocol):
    """Documents, or conversations, end to end: what they hold and how to read them.

    Streams are hashable, and equal where they are read from the same place.
    """

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """The side that it is: train, validation or test."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text, without marks; of conversations, of the answers."""

    @property
    def num_documents(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Of the ids and whatever else decides what a row holds."""

    @property
    def end_id(self) -> int | None:
        """The mark that begins each document; None where they cannot be told apart."""

    @property
    def stop_id(self) -> int | None:
        """What a model is to say where a document ends, if not the next one's mark."""

    @property
    def is_chat(self) -> bool:
        """Whether these are conversations, of which only answers are learned."""

    @property
    def num_answer_tokens(self) -> int | None:
        """Of conversations."""

    @property
    def num_skipped(self) -> int:
        """Conversations left out because nothing in them is an answer."""

    def open(self) -> Ids:
        """The ids, unsigned, [num_tokens]."""

    def open_weights(self) -> Ids:
        """1 for tokens to learn, uint8 [num_tokens]; only of conversations."""

    def open_lengths(self) -> np.ndarray:
        """Tokens of each document, marks included, int64 [num_documents]; of text, only
        where documents are to be packed (lengths.py)."""

    def raw_bytes(self) -> bytes:
        """The text itself; only of validation and test text."""


def said(tokens: TokenStream, targets: np.ndarray) -> np.ndarray:
    """Return targets with the end mark where the next document's first mark stood.

    A model that is given `<bos>` in front of a text must learn to say `<eos>` at its
    end, not `<bos>`.
    """
    if tokens.stop_id is None:
        return targets
    return np.where(targets == tokens.end_id, np.int32(tokens.stop_id), targets)


class Spliced:
    """Arrays that lie end to end, read as one; each is opened when it is needed."""

    def __init__(self, sizes: Sequence[int], array: Callable[[int], Ids]):
        """Of `len(sizes)` arrays, `array(number)` has `sizes[number]` entries."""
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._array = array

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, step = wanted.indices(len(self))
        assert step == 1, "a stretch of ids"
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        found = []
        while start < stop:
            base, end = self._starts[number], min(stop, self._starts[number + 1])
            found.append(self._array(number)[int(start - base) : int(end - base)])
            start, number = end, number + 1
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else self._array(0)[0:0]
