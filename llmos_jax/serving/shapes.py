"""All programs that an engine can need: its requests can ask for no other.

B rows, T tokens of a row, R tokens to be chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmos_jax.scheduling import FULL, VARIANTS, Room, Variant, Work, doubling

SHORTEST = 16
"""Tokens of the smallest chunk of a prompt: a judgement; fewer take no less time."""
MOST_GUESSES = 7
"""Tokens that a sequence may guess: with the one before them they fill 8 rows. All
that is drawn in a step is at most one token a seat, whoever guesses how much."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One program."""

    kind: Literal["step", "decode", "embed"]
    rows: int
    tokens: int
    draws: int
    variant: Variant

    def __str__(self) -> str:
        size = f"{self.rows}x{self.tokens}"
        return f"{self.kind} {size} {self.variant.name}"


def shape_of(work: Work, variant: Variant, room: Room) -> Shape:
    """The program that a work runs in: the smallest that has room for it."""
    parts, tokens = len(work.parts), sum(part.count for part in work.parts)
    if work.kind == "decode":
        rows = next(size for size in batch_sizes(room) if size >= parts)
        return Shape("decode", rows, 1, rows, variant)
    if work.kind == "embed":
        chunk = next(size for size in chunk_sizes(room) if size >= tokens)
        return Shape("embed", 1, chunk, 0, VARIANTS[0])
    draws = sum(part.draws for part in work.parts)
    if room.is_ragged:
        rows = next(size for size in room.step_sizes if size >= tokens)
        return Shape("step", rows, 1, min(rows, room.seats), variant)
    if parts == 1 and draws <= 1 and work.parts[0].tokens is not None:
        chunk = next(size for size in chunk_sizes(room) if size >= tokens)
        return Shape("step", 1, chunk, 1, variant)
    if parts == 1 and work.parts[0].tokens is not None:
        return Shape("step", 1, MOST_GUESSES + 1, MOST_GUESSES + 1, variant)
    rows = next(size for size in batch_sizes(room) if size >= parts)
    return Shape("step", rows, 1, rows, variant)


def all_shapes(room: Room, *, guesses: bool, embeds: bool) -> Iterator[Shape]:
    """Every shape that `shape_of` can say.

    Args:
        room: the scheduler's.
        guesses: whether sequences may guess.
        embeds: whether prompts may be embedded.
    """
    for variant in VARIANTS:
        if room.is_ragged:
            for rows in room.step_sizes:
                yield Shape("step", rows, 1, min(rows, room.seats), variant)
        else:
            for chunk in chunk_sizes(room):
                yield Shape("step", 1, chunk, 1, variant)
            if guesses:
                yield Shape("step", 1, MOST_GUESSES + 1, MOST_GUESSES + 1, variant)
        for rows in batch_sizes(room):
            if variant != FULL:
                yield Shape("decode", rows, 1, rows, variant)
            elif not room.is_ragged:
                yield Shape("step", rows, 1, rows, variant)
    if embeds:
        for chunk in chunk_sizes(room):
            yield Shape("embed", 1, chunk, 0, VARIANTS[0])


def batch_sizes(room: Room) -> list[int]:
    """Rows of decode: powers of two, up to all seats."""
    return doubling(1, room.seats)


def chunk_sizes(room: Room) -> list[int]:
    """Tokens of a chunk of one prompt."""
    return doubling(min(SHORTEST, room.step_tokens), room.step_tokens, by=4)
