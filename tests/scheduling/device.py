"""A device for the scheduler: it computes the next token from pages, as a model would.

What it keeps at a place is the token itself. The next token of a sequence is a hash of
all its tokens, read page by page: whatever the scheduler mixes up comes out as another
token, or as an error.
"""

from __future__ import annotations

import hashlib

import numpy as np

from llmos_jax.scheduling import (
    NO_TOKEN,
    Drawn,
    Part,
    Progress,
    Request,
    Room,
    Sampling,
    Scheduler,
    Work,
)

V = 50
EMPTY, ENDED = -7, -1


def next_token(tokens: list[int], seed: int) -> int:
    """What follows these tokens."""
    words = np.array([seed, *tokens], np.int64).tobytes()
    return hashlib.blake2b(words, digest_size=4).digest()[0] % V


def answer(prompt: list[int], limit: int, stop: frozenset[int], seed: int) -> list[int]:
    """What a sequence says when it is alone."""
    tokens = list(prompt)
    while len(tokens) < limit:
        token = next_token(tokens, seed)
        if token in stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class Device:
    """Pages and a pool, as the programs know them."""

    def __init__(self, room: Room):
        self.room = room
        self.pages = np.full((room.pages, room.page_size), EMPTY)
        self.pool = np.full((room.seats, room.context + 32), ENDED)

    def run(self, work: Work) -> tuple[Drawn, ...]:
        """Compute a work: write all of it, then draw."""
        tokens = sum(part.count for part in work.parts)
        assert tokens <= self.room.step_tokens
        if work.kind == "decode":
            return tuple(self._decode(part, work.steps) for part in work.parts)
        tables = [list(part.sequence.pages) for part in work.parts]
        for part, table in zip(work.parts, tables):
            for offset, token in enumerate(self._tokens(part)):
                self._write(part, table, part.start + offset, token)
        return tuple(self._draw(part, table) for part, table in zip(work.parts, tables))

    def _tokens(self, part: Part) -> list[int]:
        if part.tokens is None:
            return [int(self.pool[part.seat, part.start])]
        return list(part.tokens)

    def _write(self, part: Part, table: list[int], place: int, token: int) -> None:
        if token < 0:
            return
        self.pool[part.seat, place] = token
        self.pages[table[place // self.room.page_size], place % self.room.page_size] = (
            token
        )

    def _known(self, table: list[int], count: int) -> list[int]:
        C = self.room.page_size
        known = [int(self.pages[table[i // C], i % C]) for i in range(count)]
        assert EMPTY not in known, "a place was read that nobody wrote"
        return known

    def _draw(self, part: Part, table: list[int]) -> Drawn:
        first = part.count - part.draws
        made = []
        for offset in range(first, part.count):
            end = part.start + offset + 1
            made.append(self._choose(part, table, end))
        return Drawn(tokens=tuple(made))

    def _choose(self, part: Part, table: list[int], end: int) -> int:
        if part.tokens is None and self.pool[part.seat, end - 1] < 0:
            self.pool[part.seat, end] = ENDED
            return NO_TOKEN
        request = part.sequence.request
        token = next_token(self._known(table, end), request.sampling.seed)
        ends = token in request.stop_ids or end + 1 >= part.sequence.limit
        self.pool[part.seat, end] = ENDED if ends else token
        return token

    def _decode(self, part: Part, steps: int) -> Drawn:
        table, made = list(part.sequence.pages), []
        for place in range(part.start, part.start + steps):
            token = int(self.pool[part.seat, place])
            if token < 0:
                made.append(NO_TOKEN)
                self.pool[part.seat, place + 1] = ENDED
                continue
            self._write(part, table, place, token)
            made.append(self._choose(part, table, place + 1))
        return Drawn(tokens=tuple(made))


class Client:
    """Hears what becomes of a request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        assert self.end is None, "a request ended twice"
        self.tokens += progress.tokens
        if progress.reason is not None:
            self.end = progress


def request_of(
    name: str, prompt: list[int], tokens: int, stop: int = -9, **rest: object
) -> Request:
    """A request; its seed is the sum of its prompt, so that equal ones say the same."""
    return Request(
        id=name,
        prompt=np.array(prompt, np.int32),
        max_tokens=tokens,
        stop_ids=frozenset({stop}),
        sampling=Sampling(temperature=1.0, seed=sum(prompt)),
        **rest,  # type: ignore[arg-type]
    )


def wanted(request: Request, room: Room) -> list[int]:
    """What a request is answered when it is alone."""
    prompt = request.prompt.tolist()
    limit = min(len(prompt) + request.max_tokens, room.context)
    return answer(prompt, limit, request.stop_ids, request.sampling.seed)


def serve(
    scheduler: Scheduler, device: Device, *, steps: int, drafts: int, late: int
) -> None:
    """Plan and compute until all is done; works are read `late` rounds after."""
    flying: list[tuple[Work, tuple[Drawn, ...]]] = []
    for round_ in range(10_000):
        works = scheduler.plan(float(round_), steps=steps, drafts=drafts)
        scheduler.check()
        sent = [(work, device.run(work)) for work in works]
        while len(flying) > (late if sent else 0):
            scheduler.take(*flying.pop(0), float(round_))
        flying += sent
        if not late or drafts:
            while flying:
                scheduler.take(*flying.pop(0), float(round_))
        scheduler.check()
        if scheduler.is_idle and not flying:
            return
    raise AssertionError("it does not end")
