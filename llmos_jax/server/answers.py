"""Ask the engine, and collect what it says as text, choice by choice.

The engine's thread only posts. On the event loop each choice turns tokens into text,
looks for stop strings, and keeps the pieces until the endpoint takes them; so a client
that reads slowly never holds anything up, and one that does not read at all is given
up.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from llmos_jax.errors import LlmosError
from llmos_jax.scheduling import FinishReason, Hear, Progress, Request, Times
from llmos_jax.server.refusals import Refusal, refusal_of, unavailable
from llmos_jax.server.room import Room
from llmos_jax.server.words import Said, Words
from llmos_jax.telemetry import log


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one choice said since its last piece."""

    index: int
    text: str = ""
    said: tuple[Said, ...] = ()
    reason: FinishReason | None = None
    problem: str = ""
    embedding: np.ndarray | None = None
    class_logits: np.ndarray | None = None


@dataclass(slots=True, kw_only=True)
class Whole:
    """All that a choice said."""

    text: str = ""
    said: list[Said] = field(default_factory=list)
    reason: FinishReason = "cancelled"
    problem: str = ""
    embedding: np.ndarray | None = None
    class_logits: np.ndarray | None = None

    def add(self, piece: Piece) -> None:
        """Take one more piece."""
        self.text += piece.text
        self.said += piece.said
        self.problem = self.problem or piece.problem
        if piece.reason is not None:
            self.reason = piece.reason
        if piece.embedding is not None:
            self.embedding = piece.embedding
        if piece.class_logits is not None:
            self.class_logits = piece.class_logits


class Choice:
    """One request to the engine, and the text of its answer so far."""

    __slots__ = (
        "_last_at", "_room", "cached_tokens", "index", "num_tokens", "reason",
        "request", "settings", "times", "words",
    )  # fmt: skip

    def __init__(
        self,
        room: Room,
        index: int,
        request: Request,
        stops: tuple[str, ...],
        settings: tuple[int, int],
        shown: Mapping[int, str] | None,
    ):
        """`settings` is what was asked, for metrics: (n, max_tokens)."""
        self._room = room
        self.index = index
        self.request = request
        self.settings = settings
        self.words = Words(room.tokenizer, stops, shown)
        self.num_tokens = 0
        self.cached_tokens = 0
        self.reason: FinishReason | None = None
        self.times: Times | None = None
        self._last_at: float | None = None

    def take(self, progress: Progress) -> Piece | None:
        """Return what may be sent now; None once the answer has ended."""
        self._measure(progress)
        if self.reason is not None:
            return None
        text, said = "", []
        likelihoods = progress.likelihoods or (None,) * len(progress.tokens)
        for token, likelihood in zip(progress.tokens, likelihoods):
            more, told = self.words.push(token, likelihood)
            text += more
            said += told
            self.num_tokens += 1
            if self.words.stopped:
                break
        if progress.reason is not None and not self.words.stopped:
            more, told = self.words.flush()
            text += more
            said += told
        self.reason = "stop" if self.words.stopped else progress.reason
        if self.words.stopped and progress.reason is None:
            self._room.engine.cancel(self.request.id)
        return Piece(
            index=self.index,
            text=text,
            said=tuple(said),
            reason=self.reason,
            problem=progress.problem,
            embedding=progress.embedding,
            class_logits=progress.class_logits,
        )

    def fail(self, why: str) -> Piece | None:
        """End it for a fault of the server's own, which goes to the log."""
        log(why)
        if self.reason is not None:
            return None
        self.reason = "failed"
        self._room.engine.cancel(self.request.id)
        problem = "a fault of the server's own; its log has the details."
        return Piece(index=self.index, reason="failed", problem=problem)

    def _measure(self, progress: Progress) -> None:
        self.cached_tokens = max(self.cached_tokens, progress.cached_tokens)
        metrics, now = self._room.metrics, time.monotonic()
        if progress.tokens:
            if self._last_at is not None:
                metrics.inter_token((now - self._last_at) / len(progress.tokens))
            self._last_at = now
        if progress.reason is not None and progress.times is not None:
            self.times = progress.times
            n, max_tokens = self.settings
            metrics.ended(
                progress.times,
                self.request.prompt.size,
                self.num_tokens + (0 if self.reason else len(progress.tokens)),
                self.reason or progress.reason,
                n,
                max_tokens,
                progress.preemptions,
                self.cached_tokens,
            )


class Answer:
    """The choices of one HTTP request; use it in a `with`, which ends what is open."""

    def __init__(
        self,
        room: Room,
        requests: Sequence[Request],
        *,
        stops: tuple[str, ...] = (),
        n: int = 1,
        bounds_unread: bool = False,
        shown: Mapping[int, str] | None = None,
    ):
        """Ask nothing yet.

        Args:
            room: where this happens.
            requests: one for each choice, `n` for each prompt.
            stops: strings that end an answer.
            n: choices of each prompt.
            bounds_unread: give up when pieces are not taken.
            shown: marks that are text here, by token.
        """
        self._room = room
        self._n = n
        self._bounds_unread = bounds_unread
        self._most_unread = room.options.max_unread_tokens * len(requests)
        self._pieces: list[Piece] = []
        self._unread = 0
        self._news = asyncio.Event()
        self._is_stalled = False
        self.choices = [
            Choice(room, index, one, stops, (n, one.max_tokens), shown)
            for index, one in enumerate(requests)
        ]

    def __enter__(self) -> Answer:
        """Submit every choice, or none; Refusal says why not."""
        room, done = self._room, []
        most = room.limits.seats + room.limits.max_queue
        if len(self.choices) > most:
            raise Refusal(
                400,
                f"{len(self.choices)} answers are asked for at once; this server has "
                f"room for {most}. Send several requests.",
            )
        try:
            for choice in self.choices:
                room.engine.submit(choice.request, room.post.to(self._taker(choice)))
                done.append(choice)
        except LlmosError as problem:
            for choice in done:
                room.engine.cancel(choice.request.id)
            raise refusal_of(problem) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cancel()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Give what was said since the last time, until every choice has ended.

        After `ping_s` without news the list is empty. Refusal: the client was too slow.
        """
        left = len(self.choices)
        while left:
            try:
                async with asyncio.timeout(self._room.options.ping_s):
                    await self._news.wait()
            except TimeoutError:
                yield []
                continue
            self._news.clear()
            if self._is_stalled:
                raise Refusal(
                    408, "the stream was not read, and is given up.", code="stalled"
                )
            pieces, self._pieces, self._unread = self._pieces, [], 0
            left -= sum(piece.reason is not None for piece in pieces)
            yield pieces

    async def whole(self) -> list[Whole]:
        """Wait for the end; return every choice.

        Raises:
            Refusal: a choice failed, or had no time.
        """
        wholes = [Whole() for _ in self.choices]
        async for pieces in self.pieces():
            for piece in pieces:
                self.refuse_bad_end(piece)
                wholes[piece.index].add(piece)
        return wholes

    def usage(self) -> tuple[int, int, int]:
        """Return tokens: of the prompts, of the answers, of prompts in the cache."""
        firsts = self.choices[:: self._n]
        return (
            sum(choice.request.prompt.size for choice in firsts),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.cached_tokens for choice in firsts),
        )

    def first_token_s(self) -> float | None:
        """Return seconds from the first submission to the first token, if it came."""
        times = [one.times for one in self.choices if one.times is not None]
        firsts = [one.first_token for one in times if one.first_token is not None]
        if not firsts:
            return None
        return max(min(firsts) - min(one.queued for one in times), 0.0)

    def refuse_bad_end(self, piece: Piece) -> None:
        """Raise Refusal where a choice ended in a way that is no answer.

        A deadline that passed in the middle of an answer is one: the answer is cut.
        """
        if piece.reason == "failed":
            raise Refusal(
                500, piece.problem or "the request failed.", code="request_failed"
            )
        if piece.reason == "deadline" and not self.choices[piece.index].num_tokens:
            raise Refusal(
                504,
                "the deadline passed before the first token. Ask for more time, or "
                "when less waits.",
                code="deadline_exceeded",
            )
        if piece.reason == "cancelled":
            raise unavailable("the server stops before the answer is done.")

    def _taker(self, choice: Choice) -> Hear:
        def take(progress: Progress) -> None:
            try:
                piece = choice.take(progress)
            except Exception:  # a fault of ours must not reach other requests
                piece = choice.fail(traceback.format_exc())
            if piece is None:
                return
            self._pieces.append(piece)
            self._unread += len(progress.tokens)
            if self._bounds_unread and (self._unread > self._most_unread):
                self._is_stalled = True
                self._cancel()
            self._news.set()

        return take

    def _cancel(self) -> None:
        for choice in self.choices:
            if choice.reason is None:
                self._room.engine.cancel(choice.request.id)
