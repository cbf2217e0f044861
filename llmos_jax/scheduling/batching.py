"""Texts that are classified, put together into batches of like lengths.

Whoever is next (see `waiting`) says how long the rows of a batch are. All who need rows
of that length come along, in turn, and shorter texts fill rows that would be empty: who
waits while a batch runs goes out with the next one. Plain Python, without jax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from llmos_jax.scheduling.answer import no_number
from llmos_jax.scheduling.pages import Pages
from llmos_jax.scheduling.request import FinishReason, Hear, Progress, Request
from llmos_jax.scheduling.room import doubling
from llmos_jax.scheduling.scheduler import NOTHING, Counters
from llmos_jax.scheduling.sequence import Sequence
from llmos_jax.scheduling.waiting import Waiting
from llmos_jax.scheduling.work import Drawn, Part, Work

SHORTEST = 16
"""Tokens of the shortest rows: a judgement; fewer take no less time."""
MOST_TOKENS = 4096
"""Of a batch of many rows, padding included: a judgement. A small LSTM is no faster per
text in larger ones, and others wait while a large model computes one."""


class Size(NamedTuple):
    """Of a batch: there is a program for each."""

    rows: int
    tokens: int
    """Of a row."""

    def __str__(self) -> str:
        return f"classify {self.rows}x{self.tokens}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """All batches that there are: a closed set."""

    seats: int
    """Rows at most."""
    context: int
    """Tokens of a row at most."""
    ways: int = 1
    """Devices among which rows are divided; rows are a multiple of that."""

    def __iter__(self) -> Iterator[Size]:
        for tokens in self.lengths:
            for rows in self.rows_of(tokens):
                yield Size(rows, tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of rows: powers of two, and the context."""
        return doubling(min(SHORTEST, self.context), self.context)

    def length_of(self, tokens: int) -> int:
        """Of the shortest rows that so many tokens have room in."""
        return next(length for length in self.lengths if length >= tokens)

    def rows_of(self, tokens: int) -> list[int]:
        """Numbers of rows of that length; the last is the largest."""
        most = -(-self.seats // self.ways) * self.ways
        sizes = doubling(self.ways, most)
        return [rows for rows in sizes if rows * tokens <= MOST_TOKENS] or sizes[:1]


@dataclass(slots=True)
class BatchCounters(Counters):
    """They only grow."""

    texts: int = 0
    batches: dict[int, int] = field(default_factory=dict)
    """By their rows; keys never change, so that any thread may read them."""


class Batching:
    """What a `Scheduler` is to sequences, for texts that one batch is enough for."""

    def __init__(self, sizes: Sizes):
        """Begin with nothing."""
        self.sizes = sizes
        self.pages = Pages(0)
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        rows = sorted({size.rows for size in sizes})
        self.counters = BatchCounters(batches=dict.fromkeys(rows, 0))
        self._by_id: dict[str, Sequence] = {}
        self._order = 0

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits or runs."""
        return not self._by_id

    def add(self, request: Request, hear: Hear, now: float) -> None:
        """Let a request wait; its id is nobody else's."""
        assert request.id not in self._by_id, request.id
        self._order += 1
        sequence = Sequence(
            request=request,
            hear=hear,
            order=self._order,
            limit=len(request.prompt),
            tokens=[],
            queued=now,
        )
        self._by_id[request.id] = sequence
        self.waiting.add(sequence)

    def cancel(
        self, request_id: str, now: float, reason: FinishReason = "cancelled"
    ) -> None:
        """End a request, if it has not ended."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._end(sequence, reason, now)

    def fail(self, problem: str, now: float) -> None:
        """End all requests."""
        for sequence in list(self._by_id.values()):
            self._end(sequence, "failed", now, problem=problem)

    def plan(self, now: float, *, steps: int = 1, drafts: int = 0) -> list[Work]:
        """Return the next batch, or nothing if nobody waits; `steps` and `drafts` are
        for a `Scheduler`."""
        self._expire(now)
        turn = self.waiting.in_turn()
        if not turn:
            return []
        length = self.sizes.length_of(turn[0].prompt_tokens)
        sizes = self.sizes.rows_of(length)
        fitting = [one for one in turn if one.prompt_tokens <= length]
        shortest = max((one for one in self.sizes.lengths if one < length), default=0)
        alike = [one for one in fitting if one.prompt_tokens > shortest][: sizes[-1]]
        rows = next(size for size in sizes if size >= len(alike))
        others = (one for one in fitting if one.prompt_tokens <= shortest)
        batch = [*alike, *(one for one, _ in zip(others, range(rows - len(alike))))]
        for sequence in batch:
            self.waiting.remove(sequence)
            self.waiting.charge(sequence.request.tenant, sequence.prompt_tokens)
            sequence.admitted = now
        self.running += batch
        return [Work(kind="classify", parts=tuple(map(_part, batch)))]

    def take(self, work: Work, drawn: tuple[Drawn, ...], now: float) -> None:
        """Tell everybody in a batch what came of it."""
        size = self.size_of(work)
        self.counters.batches[size.rows] += 1
        for part, one in zip(work.parts, drawn, strict=True):
            sequence = part.sequence
            if sequence.is_ended:
                continue
            self.counters.texts += 1
            self.counters.prompt_tokens += sequence.prompt_tokens
            sequence.first_token = now
            if np.isfinite(one.total).all():
                self._end(sequence, "stop", now, last=Progress(class_logits=one.total))
            else:
                problem = no_number(sequence.prompt_tokens)
                self._end(sequence, "failed", now, problem=problem)

    def size_of(self, work: Work) -> Size:
        """The smallest batch that a work has room in."""
        longest = max(part.sequence.prompt_tokens for part in work.parts)
        tokens = self.sizes.length_of(longest)
        rows = self.sizes.rows_of(tokens)
        return Size(next(size for size in rows if size >= len(work.parts)), tokens)

    def check(self) -> None:
        """Assert what always holds between rounds."""
        waiting = list(self.waiting)
        assert len(waiting) + len(self.running) == len(self._by_id)
        assert self.waiting.tokens == sum(one.prompt_tokens for one in waiting)

    def _expire(self, now: float) -> None:
        for sequence in list(self._by_id.values()):
            if sequence.is_late(now):
                self._end(sequence, "deadline", now)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        *,
        problem: str = "",
        last: Progress = NOTHING,
    ) -> None:
        sequence.reason = reason
        if sequence.admitted is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        del self._by_id[sequence.request.id]
        times = sequence.times(now)
        sequence.hear(replace(last, reason=reason, problem=problem, times=times))


def _part(sequence: Sequence) -> Part:
    return Part(sequence=sequence, seat=0, start=0, tokens=(), draws=0)
