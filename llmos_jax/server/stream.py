"""Send an answer while it grows: server-sent events, as OpenAI writes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import ExitStack, aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmos_jax.server.answers import Answer, Piece
from llmos_jax.server.refusals import Refusal
from llmos_jax.server.room import Room

PING = b": still here\n\n"
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


class Gone(Exception):
    """The client hung up."""


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """Return what `work` gives; Gone if the client hangs up before, and the work is
    cancelled then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hung_up(http.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        await _end(task, watch)


class EventStream(Response):
    """An answer whose events are made while they are sent."""

    media_type = "text/event-stream"

    def __init__(
        self, room: Room, events: AsyncIterator[bytes], close: Callable[[], None]
    ):
        """`close` is called when the stream has ended, in whatever way."""
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._room = room
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send every event; give up a client that hangs up or does not read."""
        sending = asyncio.ensure_future(self._send_all(send))
        watch = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait({sending, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise Gone
            sending.result()
        finally:
            await _end(sending, watch)
            self._close()

    async def _send_all(self, send: Send) -> None:
        async def write(message: dict[str, Any]) -> None:
            try:
                async with asyncio.timeout(self._room.options.stall_s):
                    await send(message)
            except TimeoutError:
                raise Gone from None

        headers = self.raw_headers
        await write({"type": "http.response.start", "status": 200, "headers": headers})
        body = {"type": "http.response.body", "more_body": True}
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            async for event in events:
                await write({**body, "body": event})
        await write({"type": "http.response.body", "body": b"", "more_body": False})


async def stream(
    http: HttpRequest,
    room: Room,
    answer: Answer,
    *,
    opening: Iterable[Any],
    chunks: Callable[[Piece], Iterable[Any]],
    closing: Callable[[], Iterable[Any]],
) -> EventStream:
    """Submit an answer and return its stream, once the first word is there.

    Until then a problem is an answer with its own status, after that an event.

    Args:
        http: what was asked.
        room: where this happens.
        answer: not submitted yet.
        opening: bodies that come first.
        chunks: what to send of a piece.
        closing: bodies that come last.
    """
    with ExitStack() as open_answer:
        open_answer.enter_context(answer)
        batches = answer.pieces()
        first: list[Piece] = []
        while not first:
            first = await unless_gone(http, anext(batches))
        for piece in first:
            answer.refuse_bad_end(piece)
        events = _events(answer, first, batches, opening, chunks, closing)
        return EventStream(room, events, open_answer.pop_all().close)


async def _events(
    answer: Answer,
    first: list[Piece],
    batches: AsyncIterator[list[Piece]],
    opening: Iterable[Any],
    chunks: Callable[[Piece], Iterable[Any]],
    closing: Callable[[], Iterable[Any]],
) -> AsyncIterator[bytes]:
    try:
        head = [*opening, *(one for piece in first for one in chunks(piece))]
        if head:
            yield b"".join(map(_event, head))
        async for pieces in batches:
            if not pieces:
                yield PING
            told, refusal = _told(answer, pieces, chunks)
            if told:
                yield told
            if refusal is not None:
                raise refusal
        yield b"".join(map(_event, closing())) + DONE
    except Refusal as refusal:
        yield _event(refusal.body) + DONE


def _told(
    answer: Answer, pieces: list[Piece], chunks: Callable[[Piece], Iterable[Any]]
) -> tuple[bytes, Refusal | None]:
    """The events of pieces, up to one that ended badly, and why it did."""
    told: list[bytes] = []
    for piece in pieces:
        try:
            answer.refuse_bad_end(piece)
        except Refusal as refusal:
            return b"".join(told), refusal
        told += map(_event, chunks(piece))
    return b"".join(told), None


def _event(body: Any) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
