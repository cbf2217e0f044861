"""Hash the words of a text, and runs of words, without a Python loop over them.

Hashes are the same in every process and on every machine: 64-bit polynomials of UTF-8
bytes, mixed by the last steps of SplitMix64 (Steele, Lea and
Flood, OOPSLA 2014); of a run, polynomials of its words' hashes. Legend: W words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK_WORDS = 1 << 17  # hashed at once: about 8 MiB of a text's bytes as uint64
_REACH = 1 << 10
_PRIME = 0x100000001B3  # FNV's; any odd number with well spread bits serves


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text, in lower case."""

    hashes: np.ndarray
    """uint64 [W]."""
    sizes: np.ndarray
    """int64 [W], bytes of each, with the space after it."""
    digest: bytes
    """16 bytes that equal texts share: of the words with one space between them."""

    def runs(self, length: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Hash every run of so many words among words first .. last - 1, uint64."""
        hashes = self.hashes[first:last]
        count = hashes.size - length + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        found = np.zeros(count, np.uint64)
        for offset in range(length):
            found = found * np.uint64(_PRIME) + hashes[offset : offset + count]
        return found


def words_of(text: str) -> Words:
    """Return the words of a text: what white space separates, without case."""
    digest = hashlib.blake2b(digest_size=16)
    hashes, sizes = [], []
    for block in _blocks(text.casefold().split()):
        raw = (" ".join(block) + " ").encode()
        digest.update(raw)
        of_block = _hash_block(raw)
        hashes.append(of_block[0])
        sizes.append(of_block[1])
    if not hashes:
        return Words(np.empty(0, np.uint64), np.empty(0, np.int64), digest.digest())
    return Words(np.concatenate(hashes), np.concatenate(sizes), digest.digest())


def _blocks(words: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(words), _BLOCK_WORDS):
        yield words[start : start + _BLOCK_WORDS]


def _hash_block(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return hash and size of each word of `word word ... word `."""
    letters = np.frombuffer(raw, np.uint8)
    ends = np.flatnonzero(letters == 32) + 1
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts
    place = np.arange(letters.size) - np.repeat(starts, sizes)
    terms = letters.astype(np.uint64) * _POWERS[place % _REACH]
    return _mixed(np.add.reduceat(terms, starts)), sizes


def _mixed(hashes: np.ndarray) -> np.ndarray:
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


_POWERS = np.cumprod(np.full(_REACH, _PRIME, np.uint64))
