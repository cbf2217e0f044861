"""Find documents whose words, or most runs of whose words, an earlier document has.

Documents are taken in order and compared with earlier ones that stay, so every one that
goes has one that stays like it, and no two that stay are alike (as far as signatures
tell). In memory lie a digest and one band's keys of each document at a time: 24 bytes;
signatures stay on disk and are read for candidates alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llmos_jax.corpus.sift import Part
from llmos_jax.corpus.signature import BANDS, NUMBERS, similarity

KEPT, EXACT, NEAR = 0, 1, 2

_MOST_COMPARED = 1024
"""Earlier documents of a band that one is compared with, at most: those that stay
without being alike are few unless pages share a frame. A judgement."""


def find_duplicates(
    parts: Sequence[Part], *, exact: bool, threshold: float
) -> np.ndarray:
    """Return KEPT, EXACT or NEAR for each document of all parts in order, uint8.

    Args:
        parts: in the order in which documents are preferred.
        exact: look for equal words.
        threshold: similarity from which on texts are alike; 0: do not look.
    """
    counts = [part.facts.size for part in parts]
    fate = np.zeros(sum(counts), np.uint8)
    if exact and fate.size:
        digests = np.concatenate([part.facts["words"] for part in parts])
        fate[:] = EXACT
        fate[np.unique(digests, return_index=True)[1]] = KEPT
    if threshold and fate.size:
        _mark_near(parts, np.concatenate([[0], np.cumsum(counts)]), fate, threshold)
    return fate


def _mark_near(
    parts: Sequence[Part], bounds: np.ndarray, fate: np.ndarray, threshold: float
) -> None:
    meetings = [*_meetings(parts, np.flatnonzero(fate == KEPT))]
    documents = np.concatenate([of_band[0] for of_band in meetings])
    groups = np.concatenate([of_band[1] for of_band in meetings])
    order = np.lexsort((groups, documents))
    documents, groups = documents[order], groups[order]
    read = _Signatures(parts, bounds)
    stay: dict[int, list[int]] = {}
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    for start, end in zip(starts, [*starts[1:], documents.size]):
        document, met = int(documents[start]), groups[start:end].tolist()
        earlier = sorted({one for group in met for one in stay.get(group, ())})
        if earlier and _is_like(read, document, earlier[:_MOST_COMPARED], threshold):
            fate[document] = NEAR
            continue
        for group in met:
            stay.setdefault(group, []).append(document)


def _meetings(
    parts: Sequence[Part], kept: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each band the documents that are not alone with their key, and the
    number of the key."""
    before = 0
    for band in range(BANDS):
        keys = np.concatenate([part.bands[band] for part in parts])[kept]
        _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
        is_met = counts[group] > 1
        yield kept[is_met], group[is_met] + before
        before += counts.size


def _is_like(
    read: _Signatures, document: int, earlier: Sequence[int], threshold: float
) -> bool:
    others = np.stack([read[one] for one in earlier])
    return bool((similarity(others, read[document]) >= threshold).any())


class _Signatures:
    """The signature of a document by its number among all."""

    def __init__(self, parts: Sequence[Part], bounds: np.ndarray):
        self._bounds = bounds
        self._parts = [part.signatures for part in parts]

    def __getitem__(self, document: int) -> np.ndarray:
        part = int(np.searchsorted(self._bounds, document, "right")) - 1
        found = self._parts[part][document - self._bounds[part]]
        return np.asarray(found).reshape(NUMBERS)
