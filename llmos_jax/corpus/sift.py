"""Read a unit, clean it, drop what is not worth learning, and set the rest aside.

Beside the texts lie the facts that later stages need of each document, so that nobody
reads a text twice before it is encoded: length, hashes, signature.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmos_jax.config.schema import PrepareSection
from llmos_jax.corpus.clean import clean_text
from llmos_jax.corpus.filters import why_dropped
from llmos_jax.corpus.journal import committed
from llmos_jax.corpus.signature import NUMBERS, bands, signature
from llmos_jax.corpus.units import Found, Unit, read_unit
from llmos_jax.corpus.words import words_of

MOST_EXAMPLES = 3

FACTS = np.dtype(
    [
        ("size", "<u8"),
        ("words", "S16"),
        ("held", "<u8"),
        ("file", "<u4"),
        ("row", "<i8"),
    ]
)
"""Of a document: bytes of text, digest of its words, first 8 bytes of the hash that
splits, and where it came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sifting:
    """One unit, and how to sift it."""

    number: int
    unit: Unit
    limits: PrepareSection
    text_key: str
    folder: Path


class Part:
    """What sifting a unit left on disk."""

    def __init__(self, folder: Path, number: int):
        self.texts = folder / f"{number:06d}.texts"
        self._facts = folder / f"{number:06d}.facts.npy"
        self._signatures = folder / f"{number:06d}.signatures.npy"
        self._bands = folder / f"{number:06d}.bands.npy"

    def write(self, facts: np.ndarray, signatures: np.ndarray) -> None:
        """Keep the facts [documents] and signatures [documents, 128] of the texts."""
        for path, values in (
            (self._facts, facts),
            (self._signatures, signatures),
            (self._bands, bands(signatures)),
        ):
            with committed(path) as file:
                np.save(file, values)

    @property
    def facts(self) -> np.ndarray:
        """`FACTS` [documents]."""
        return np.load(self._facts)

    @property
    def signatures(self) -> np.ndarray:
        """uint32 [documents, 128], mapped."""
        return np.load(self._signatures, mmap_mode="r")

    @property
    def bands(self) -> np.ndarray:
        """uint64 [21, documents], mapped."""
        return np.load(self._bands, mmap_mode="r")


def sift(work: Sifting) -> dict[str, Any]:
    """Sift a unit; return its counts, plain data for the journal.

    `read` and each of `dropped` are [documents, bytes of text]; `examples` holds the
    first (file, row) for each reason.
    """
    part = Part(work.folder, work.number)
    tally = _Tally()
    facts = array("B")
    signatures = array("I")
    with committed(part.texts) as texts:
        for found, text in _cleaned(work):
            words = words_of(text)
            reason = why_dropped(text, words, work.limits)
            tally.count(found, reason)
            if reason is not None:
                continue
            raw = text.encode()
            texts.write(raw)
            held = hashlib.sha256(raw if found.group is None else found.group.encode())
            number = int.from_bytes(held.digest()[:8], "big")
            one = (len(raw), words.digest, number, found.file, found.row)
            facts.frombytes(np.array([one], FACTS).tobytes())
            if work.limits.near_duplicates:
                signatures.frombytes(signature(words).tobytes())
    part.write(
        np.frombuffer(facts, FACTS),
        np.frombuffer(signatures, np.uint32).reshape(-1, NUMBERS),
    )
    return tally.plain()


def _cleaned(work: Sifting) -> Iterator[tuple[Found, str]]:
    for found in read_unit(work.unit, work.text_key):
        yield found, clean_text(found.text, repair=work.limits.repair)


class _Tally:
    def __init__(self) -> None:
        self._read = [0, 0]
        self._dropped: dict[str, list[int]] = {}
        self._examples: dict[str, list[tuple[int, int]]] = {}

    def count(self, found: Found, reason: str | None) -> None:
        size = len(found.text.encode(errors="surrogatepass"))
        self._read = [self._read[0] + 1, self._read[1] + size]
        if reason is None:
            return
        documents, total = self._dropped.get(reason, (0, 0))
        self._dropped[reason] = [documents + 1, total + size]
        examples = self._examples.setdefault(reason, [])
        if len(examples) < MOST_EXAMPLES:
            examples.append((found.file, found.row))

    def plain(self) -> dict[str, Any]:
        return {
            "read": self._read,
            "dropped": self._dropped,
            "examples": self._examples,
        }
