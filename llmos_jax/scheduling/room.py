"""The sizes that steps, seats and pages have: those of the programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Sizes that the scheduler fills; those of the programs."""

    seats: int
    pages: int
    page_size: int
    context: int
    """Tokens of a sequence, at most; a seat has pages for all of them."""
    step_tokens: int
    """Tokens of a step, at most."""
    vocab_size: int
    is_ragged: bool
    """Whether a step takes tokens of many sequences, as they come; else it takes a
    chunk of one prompt, or a token of each."""

    @property
    def step_sizes(self) -> list[int]:
        """Tokens that a ragged step may have room for: there is a program for each."""
        return doubling(min(_SMALLEST_STEP, self.step_tokens), self.step_tokens)

    def well_filled(self, wanted: int) -> int:
        """Tokens to take of so many: as many as there are, or, where a program would be
        rather empty, what fills a smaller one."""
        sizes = self.step_sizes
        size = next((size for size in sizes if size >= wanted), sizes[-1])
        smaller = [one for one in sizes if one < size]
        is_empty = smaller and wanted < _WELL_FILLED * size
        return smaller[-1] if is_empty else min(wanted, size)


def doubling(first: int, last: int, by: int = 2) -> list[int]:
    """From `first` to `last`, each `by` times the one before."""
    sizes, size = [], first
    while size < last:
        sizes.append(size)
        size *= by
    return [*sizes, last]


_SMALLEST_STEP = 8
_WELL_FILLED = 0.75
"""Of a program's rows: a judgement; emptier ones are more work than one step more."""
