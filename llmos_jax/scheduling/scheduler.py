"""Who runs in the next step, with how many tokens, on which pages.

`plan` says what to send next, before what was sent last is known: a sequence that runs
goes on by as many tokens as were sent for, and one that turns out to have ended does
nothing in the works after. `take` is told what came of a work, in the order in which
they were sent.

Each round first lets the running go on, then seats who waits, then cuts prompts into
chunks. Where pages run out, who came last lets go of its own and computes them again
later (preemption by recompute): it loses time, and no token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llmos_jax.errors import LlmosError
from llmos_jax.scheduling.answer import append, confirmed, no_number
from llmos_jax.scheduling.lookup import guessed
from llmos_jax.scheduling.pages import ROOT, Pages, digest_of, digests_of
from llmos_jax.scheduling.request import (
    FinishReason,
    Hear,
    Progress,
    Request,
)
from llmos_jax.scheduling.room import Room
from llmos_jax.scheduling.sequence import Sequence
from llmos_jax.scheduling.variant import FULL, variant_of
from llmos_jax.scheduling.waiting import Waiting
from llmos_jax.scheduling.work import Drawn, Part, Work


@dataclass(slots=True)
class Counters:
    """They only grow."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


NOTHING = Progress()


class Scheduler:
    """Waiting and running sequences, and the pages between them."""

    def __init__(self, room: Room, *, keeps_prefixes: bool = True):
        """Begin with nothing.

        Args:
            room: sizes.
            keeps_prefixes: whether prompts find pages of others that begin alike.
        """
        self.room = room
        self.pages = Pages(room.pages)
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        self.counters = Counters()
        self._seats = list(range(room.seats - 1, -1, -1))
        self._by_id: dict[str, Sequence] = {}
        self._order = 0
        self._keeps_prefixes = keeps_prefixes

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits or runs."""
        return not self._by_id

    def add(self, request: Request, hear: Hear, now: float) -> None:
        """Let a request wait; its id is nobody else's."""
        assert request.id not in self._by_id, request.id
        prompt = [int(token) for token in request.prompt]
        self._order += 1
        sequence = Sequence(
            request=request,
            hear=hear,
            order=self._order,
            limit=min(len(prompt) + request.max_tokens, self.room.context),
            tokens=prompt,
            queued=now,
        )
        self._by_id[request.id] = sequence
        self.waiting.add(sequence)

    def has(self, request_id: str) -> bool:
        """Whether a request of this id waits or runs."""
        return request_id in self._by_id

    def cancel(
        self, request_id: str, now: float, reason: FinishReason = "cancelled"
    ) -> None:
        """End a request, if it has not ended: its pages are free at once."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._end(sequence, reason, now)

    def fail(self, problem: str, now: float) -> None:
        """End all requests."""
        for sequence in list(self._by_id.values()):
            self._end(sequence, "failed", now, problem=problem)

    # ------------------------------------------------------------------------ planning

    def plan(self, now: float, *, steps: int = 1, drafts: int = 0) -> list[Work]:
        """Return what to send now, in order; nothing if there is nothing to do.

        Args:
            now: seconds of time.monotonic.
            steps: of decode in one work, at most, where no prompt is to be computed.
            drafts: tokens that a sequence may guess, at most.
        """
        self._expire(now)
        is_full = variant_of(s.request for s in self.running) == FULL
        has_prompts = any(s.to_prefill for s in self.running) or self._could_admit()
        count = 1 if has_prompts or is_full or drafts else steps
        going = list(self._going(count, drafts))
        self._admit(now)
        chunks = list(self._chunks(sum(part.count for part in going)))
        if chunks and count > 1:
            # Who lost its pages just now may be back, with all of it to compute.
            count, going = 1, [_one_draw(part) for part in going]
        parts = [part for part in (*going, *chunks) if self._is_masked(part, now)]
        going = [part for part in going if part in parts]
        chunks = [part for part in chunks if part in parts]
        works = self._works(going, chunks, count)
        for work in works:
            self._mark(work)
        return works

    def _could_admit(self) -> bool:
        return len(self.waiting) > 0 and bool(self._seats)

    def _going(self, count: int, drafts: int) -> Iterator[Part]:
        """A token of each sequence whose prompt is computed, and guesses after it."""
        for sequence in list(self.running):
            total = len(sequence.tokens) + sequence.drawing
            left = sequence.limit - total
            if not sequence.is_going or sequence.seat is None or left <= 0:
                continue
            if sequence.flying and (sequence.wants_host or drafts):
                continue
            guess = self._guess(sequence, min(drafts, left - 1))
            draws = min(count, left)
            if not self._hold(sequence, total - 1 + max(draws, 1 + len(guess))):
                continue
            seat = sequence.seat
            if guess:
                known = (sequence.tokens[-1], *guess)
                yield Part(
                    sequence=sequence,
                    seat=seat,
                    start=total - 1,
                    tokens=known,
                    draws=len(known),
                )
            else:
                yield Part(
                    sequence=sequence,
                    seat=seat,
                    start=total - 1,
                    tokens=None,
                    draws=draws,
                )

    def _guess(self, sequence: Sequence, most: int) -> list[int]:
        if most <= 0 or sequence.wants_host:
            return []
        guess = guessed(sequence.tokens, most)
        self.counters.drafted_tokens += len(guess)
        return guess

    def _hold(self, sequence: Sequence, places: int) -> bool:
        """Have pages for so many tokens; who came last may lose its own for them."""
        missing = -(-places // self.room.page_size) - len(sequence.pages)
        while missing > 0:
            taken = self.pages.take(missing)
            if taken is not None:
                sequence.pages += taken
                return True
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.add(sequence)

    def _leave(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Give seat and pages back."""
        assert sequence.seat is not None
        self.pages.let_go(sequence.pages, forget=forget)
        self._seats.append(sequence.seat)
        self.running.remove(sequence)
        sequence.pages, sequence.seat = [], None
        sequence.sent = sequence.remembered = 0
        sequence.is_going = sequence.has_begun = False
        sequence.digest = ROOT

    def _admit(self, now: float) -> None:
        """Seat who waits, while there are seats and pages for whole prompts."""
        while self._seats:
            sequence = self.waiting.first()
            # What was sent for one that was preempted has to be known first.
            if sequence is None or sequence.flying:
                return
            found = self.pages.find(self._digests(sequence))
            fresh = -(-len(sequence.tokens) // self.room.page_size) - len(found)
            # Each that runs will want another page.
            spare = len(self.running)
            if self.pages.available < fresh + spare:
                self.pages.let_go(found)
                return
            taken = self.pages.take(fresh)
            assert taken is not None
            self._seat(sequence, found, taken, now)

    def _seat(
        self, sequence: Sequence, found: list[int], taken: list[int], now: float
    ) -> None:
        self.waiting.remove(sequence)
        sequence.seat, sequence.total = self._seats.pop(), None
        sequence.pages = found + taken
        sequence.sent = len(found) * self.room.page_size
        sequence.remembered = len(found)
        if found:
            known = list(digests_of(sequence.tokens[: sequence.sent], self._size))
            sequence.digest = known[-1]
        if sequence.cached_tokens is None:
            sequence.cached_tokens, sequence.admitted = sequence.sent, now
            self.counters.prompt_tokens += sequence.prompt_tokens
            self.counters.prefix_queries += sequence.prompt_tokens
            self.counters.prefix_hits += sequence.sent
        tenant = sequence.request.tenant
        self.waiting.charge(tenant, len(sequence.tokens) - sequence.sent)
        self.running.append(sequence)
        self.running.sort(key=_rank)

    def _look_again(self, sequence: Sequence) -> None:
        """Find pages that others computed since it was seated, if nothing of it is."""
        if sequence.has_begun or sequence.is_going:
            return
        digests = self._digests(sequence)
        if len(digests) <= sequence.remembered:
            return
        found = self.pages.find(digests)
        if len(found) <= sequence.remembered:
            self.pages.let_go(found)
            return
        more = (len(found) - sequence.remembered) * self._size
        self.pages.let_go(sequence.pages[: len(found)])
        sequence.pages[: len(found)] = found
        sequence.sent, sequence.remembered = len(found) * self._size, len(found)
        sequence.digest = digests[len(found) - 1]
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.sent
            self.counters.prefix_hits += more

    @property
    def _size(self) -> int:
        return self.room.page_size

    def _digests(self, sequence: Sequence) -> list[bytes]:
        """Of pages that may be found: the token that is drawn from is computed, and
        what is computed is written to the pool, where penalties count it."""
        request = sequence.request
        if not self._keeps_prefixes or request.sampling.penalizes:
            return []
        if request.wants != "tokens":
            return []
        return list(digests_of(sequence.tokens[:-1], self._size))

    def _chunks(self, others: int) -> Iterator[Part]:
        """The next tokens of prompts, first come first, as far as a step has room."""
        for sequence in self.running:
            self._look_again(sequence)
        most = left = self.room.step_tokens
        if self.room.is_ragged:
            wanted = sum(
                one.to_prefill for one in self.running if one.request.wants == "tokens"
            )
            left = self.room.well_filled(others + wanted) - others
            # Full already of those who go on: one row for the first prompt, at least.
            left = min(max(left, 1), most - others)
        for sequence in self.running:
            missing = sequence.to_prefill
            if missing == 0:
                continue
            is_embedded = sequence.request.wants == "embedding"
            count = min(missing, most if is_embedded else left)
            if count <= 0:
                return
            start = sequence.sent
            assert sequence.seat is not None
            yield Part(
                sequence=sequence,
                seat=sequence.seat,
                start=start,
                tokens=tuple(sequence.tokens[start : start + count]),
                draws=int(count == missing and not is_embedded),
            )
            left -= 0 if is_embedded else count

    def _is_masked(self, part: Part, now: float) -> bool:
        """Ask a grammar what may follow; False if it fails, and its request with it."""
        sequence, grammar = part.sequence, part.sequence.request.grammar
        if grammar is None or not part.draws:
            return True
        if sequence.mask is None:
            sequence.mask = np.zeros((-(-self.room.vocab_size // 32),), np.uint32)
        try:
            grammar.fill(sequence.mask)
        except LlmosError as problem:
            self._end(sequence, "failed", now, problem=str(problem))
            return False
        return True

    def _works(self, going: list[Part], chunks: list[Part], steps: int) -> list[Work]:
        embeds = [p for p in chunks if p.sequence.request.wants == "embedding"]
        chunks = [p for p in chunks if p.sequence.request.wants == "tokens"]
        made = [Work(kind="embed", parts=(part,)) for part in embeds]
        guesses = [part for part in going if part.tokens is not None]
        if not self.room.is_ragged:
            made += [Work(kind="step", parts=(part,)) for part in (*chunks, *guesses)]
            going = [part for part in going if part.tokens is None]
            chunks = guesses = []
        mixed = (*going, *chunks)
        if not mixed:
            return made
        is_full = variant_of(part.sequence.request for part in mixed) == FULL
        if chunks or guesses or is_full:
            return [*made, Work(kind="step", parts=mixed)]
        return [*made, Work(kind="decode", parts=mixed, steps=steps)]

    def _mark(self, work: Work) -> None:
        """Write down that a work is sent."""
        for part in work.parts:
            sequence = part.sequence
            sequence.flying += 1
            sequence.drawing += part.draws
            sequence.is_going |= part.draws > 0
            sequence.has_begun = True
            if part.tokens is None:
                sequence.sent = part.start + part.draws
            else:
                sequence.sent = part.start + part.count
            self._remember(sequence)

    def _remember(self, sequence: Sequence) -> None:
        """Let full pages whose tokens are known be found."""
        if not self._keeps_prefixes or sequence.request.wants != "tokens":
            return
        full = min(sequence.sent, len(sequence.tokens)) // self._size
        for index in range(sequence.remembered, full):
            tokens = sequence.tokens[index * self._size : (index + 1) * self._size]
            sequence.digest = digest_of(sequence.digest, tokens)
            self.pages.remember(sequence.pages[index], sequence.digest)
        sequence.remembered = max(sequence.remembered, full)

    # ------------------------------------------------------------------------- results

    def take(self, work: Work, drawn: tuple[Drawn, ...], now: float) -> None:
        """Go on by what became of a work, and tell who asked."""
        for part, one in zip(work.parts, drawn, strict=True):
            sequence = part.sequence
            sequence.flying -= 1
            sequence.drawing -= part.draws
            if sequence.is_ended:
                continue
            if work.kind == "embed":
                self._take_features(sequence, one, now)
            elif part.draws:
                self._take_tokens(part, one, now)

    def _take_tokens(self, part: Part, drawn: Drawn, now: float) -> None:
        sequence, request = part.sequence, part.sequence.request
        tokens = confirmed(part, drawn.tokens)
        if part.tokens is not None and part.draws > 1:
            self.counters.accepted_tokens += len(tokens) - 1
            if sequence.seat is not None:
                sequence.sent = part.start + len(tokens)
        before = len(sequence.tokens)
        reason, problem = append(sequence, tokens)
        new = tuple(sequence.tokens[before:])
        if sequence.first_token is None:
            sequence.first_token = now
        self.counters.generated_tokens += len(new)
        self.waiting.charge(request.tenant, len(new))
        if sequence.seat is not None:
            self._remember(sequence)
        progress = Progress(
            tokens=new,
            likelihoods=drawn.likelihoods[: len(new)],
            cached_tokens=sequence.cached_tokens or 0,
        )
        if reason is not None:
            self._end(sequence, reason, now, problem=problem, last=progress)
        elif new:
            sequence.hear(progress)

    def _take_features(self, sequence: Sequence, drawn: Drawn, now: float) -> None:
        total = drawn.total if sequence.total is None else sequence.total + drawn.total
        sequence.total = total
        if sequence.flying or sequence.to_prefill:
            return
        if not np.isfinite(total).all():
            self._end(sequence, "failed", now, problem=no_number(sequence.sent))
            return
        mean = total / np.float32(sequence.prompt_tokens)
        self._end(sequence, "stop", now, last=Progress(embedding=mean))

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
        """Give back all it has, and tell who asked, with the last of its answer."""
        sequence.reason = reason
        if sequence.seat is not None:
            self._leave(sequence, forget=reason == "failed")
        else:
            self.waiting.remove(sequence)
        del self._by_id[sequence.request.id]
        times = sequence.times(now)
        sequence.hear(
            replace(
                last,
                reason=reason,
                problem=problem,
                times=times,
                cached_tokens=sequence.cached_tokens or 0,
                preemptions=sequence.preemptions,
            )
        )

    def check(self) -> None:
        """Assert what always holds between rounds."""
        self.pages.check()
        holders: dict[int, int] = {}
        for sequence in self.running:
            assert sequence.seat is not None and not sequence.is_ended
            for page in sequence.pages:
                holders[page] = holders.get(page, 0) + 1
        assert self.pages.holders() == holders, "pages are held by nobody who runs"
        seats = [one.seat for one in self.running if one.seat is not None]
        assert sorted([*seats, *self._seats]) == list(range(self.room.seats))
        assert len(self._by_id) == len(self.running) + len(self.waiting)


def _one_draw(part: Part) -> Part:
    return part if part.tokens is not None else replace(part, draws=1)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.order
