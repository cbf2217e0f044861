"""Say which side each document is on, after duplicates have gone.

A side that the config names holds its own sources. Otherwise the hash of a document's
text (of its group, where it has one) says where it belongs, as in data/document.py, so
that adding documents never moves another. Of a few long documents the ends are held
out instead, as in data/sides.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmos_jax.config.schema import DataSection
from llmos_jax.corpus.duplicates import KEPT
from llmos_jax.corpus.sift import Part
from llmos_jax.corpus.units import Unit
from llmos_jax.data.document import cut_end
from llmos_jax.errors import DataError

SIDES = ("train", "validation", "test")
_GONE = 255


@dataclass(frozen=True, slots=True)
class Slice:
    """A text on disk: a document, or what a side gets of it."""

    part: int
    offset: int
    size: int
    """Bytes."""


class Split:
    """Which texts each side has, in order; `held_out_by` says how that was found."""

    def __init__(
        self,
        units: Sequence[Unit],
        parts: Sequence[Part],
        fate: np.ndarray,
        section: DataSection,
        test_share: float,
    ):
        check_shares(section, test_share)
        self._parts = parts
        self._sizes = [part.facts["size"].astype(np.int64) for part in parts]
        self._shares = {
            "validation": 0.0 if section.validation else section.validation_share,
            "test": test_share,
        }
        bounds = np.cumsum([sizes.size for sizes in self._sizes])[:-1]
        self._sides = [
            np.where(is_kept, self._sides_of(unit, part), _GONE)
            for unit, part, is_kept in zip(units, parts, np.split(fate == KEPT, bounds))
        ]
        self._cuts: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
        self.held_out_by = self._how(section)
        if not all(self._has(side) for side in self._wanted(section)):
            self._cut_ends(units)
        for side in self._wanted(section):
            if not any(True for _ in self.slices(side)):
                raise DataError(
                    f"no {side} text is left of what was read. Give more text, drop "
                    "less ([prepare]), or name data.validation."
                )

    def slices(self, side: str) -> Iterator[Slice]:
        """Yield the texts of a side, in order."""
        number = SIDES.index(side)
        for index, (sides, sizes) in enumerate(zip(self._sides, self._sizes)):
            offsets = np.cumsum(sizes) - sizes
            wanted = sides != _GONE if self._cuts else sides == number
            for row in np.flatnonzero(wanted).tolist():
                start, size = int(offsets[row]), int(sizes[row])
                cut = self._cuts.get((index, row))
                if cut is None and sides[row] == number:
                    yield Slice(index, start, size)
                elif cut is not None and side in cut:
                    yield Slice(index, start + cut[side][0], cut[side][1])

    def text(self, slice_: Slice) -> str:
        """Read one."""
        with self._parts[slice_.part].texts.open("rb") as file:
            file.seek(slice_.offset)
            return file.read(slice_.size).decode()

    def _sides_of(self, unit: Unit, part: Part) -> np.ndarray:
        """The side of each document of a unit, uint8."""
        facts = part.facts
        sides = np.full(facts.size, SIDES.index(unit.side), np.uint8)
        if unit.side != "train":
            return sides
        below = 0.0
        for side, share in self._shares.items():
            above = below + share
            held = facts["held"].astype(np.float64) / 2.0**64
            sides[(held >= below) & (held < above)] = SIDES.index(side)
            below = above
        return sides

    def _wanted(self, section: DataSection) -> list[str]:
        has_test = bool(section.test or self._shares["test"])
        return ["train", "validation", *(["test"] if has_test else [])]

    def _has(self, side: str) -> bool:
        return any((sides == SIDES.index(side)).any() for sides in self._sides)

    def _how(self, section: DataSection) -> str:
        if section.validation:
            return f"named: {', '.join(section.validation)}"
        return f"{section.validation_share:.3g} of the documents, by content hash"

    def _cut_ends(self, units: Sequence[Unit]) -> None:
        """Too few documents to choose among: hold out the end of each."""
        shares = {side: share for side, share in self._shares.items() if share}
        if not shares:
            return
        for index, unit in enumerate(units):
            if unit.side != "train":
                continue
            offsets = np.cumsum(self._sizes[index]) - self._sizes[index]
            for row in np.flatnonzero(self._sides[index] != _GONE):
                size = int(self._sizes[index][row])
                text = self.text(Slice(index, int(offsets[row]), size))
                self._cuts[index, int(row)] = _cut(text, shares)
        if "validation" in shares:
            self.held_out_by = (
                f"the last {shares['validation']:.3g} of each document (too few "
                "documents to choose among)"
            )


def check_shares(section: DataSection, test_share: float) -> None:
    """Raise DataError for shares of held-out text that cannot be."""
    if section.test and test_share:
        raise DataError(
            "data.test names the test text, and prepare.test_share asks to hold some "
            "out. Leave one of them."
        )
    share = 0.0 if section.validation else section.validation_share
    if not section.validation and not 0 < share < 1:
        raise DataError(
            f"data.validation_share is {share:g}; it must lie between 0 and 1, or "
            "data.validation must name held-out text."
        )
    if test_share < 0 or share + test_share >= 1:
        raise DataError(
            f"prepare.test_share is {test_share:g}, data.validation_share {share:g}: "
            "neither may be negative, and together they must stay below 1."
        )


def _cut(text: str, shares: dict[str, float]) -> dict[str, tuple[int, int]]:
    """Return (offset, size) in bytes of each side's piece of a text."""
    pieces: dict[str, tuple[int, int]] = {}
    left = 1.0
    for side, share in reversed(shares.items()):
        text, end = cut_end(text, share / left)
        left -= share
        if end.strip():
            pieces[side] = (len(text.encode()), len(end.encode()))
    if text.strip():
        pieces["train"] = (0, len(text.encode()))
    return pieces
