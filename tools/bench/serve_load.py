"""Clients that ask a server for streams, one after another, and what they saw of it.

Not a bench of its own. One event loop reads raw sockets and only counts events, to
leave the processors to the server. A server may send several tokens in an event, so a
request's tokens are taken as evenly spread over its events; how many there were in all
is what the server says in `usage`, and must be what was asked for.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.parse
from dataclasses import dataclass, field

import numpy as np

EVENT = b"\ndata: {"
DONE = b"data: [DONE]"
TAIL_BYTES = 4096
"""Of an answer that are kept: its last event, and all of an error."""
REQUEST_S = 300.0
"""Until a server is given up."""
FIRST_TOKEN, LAST_TOKEN = 100, 40000
"""Tokens of prompts: plain ones of every vocabulary here."""


class LoadFailed(Exception):
    """A server gave no whole answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """So many clients, and what each asks."""

    name: str
    clients: int
    own: int = 128
    """Prompt tokens of a request that no other has."""
    shared: int = 0
    """Prompt tokens before them that all have."""
    answer: int = 128

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.shared + self.own + self.answer

    def body(self, model: str, seed: int, client: int, number: int) -> bytes:
        """A client's request; the same for every server, and never twice."""

        def tokens(count: int, *key: int) -> list[int]:
            random = np.random.default_rng((seed, self.clients, self.shared, *key))
            return random.integers(FIRST_TOKEN, LAST_TOKEN, count).tolist()

        asked = {
            "model": model,
            "prompt": tokens(self.shared, 0) + tokens(self.own, 1 + client, number),
            "max_tokens": self.answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(asked).encode()


@dataclass(slots=True, kw_only=True)
class Heard:
    """One request's answer, in seconds of time.perf_counter."""

    asked: float
    reads: list[tuple[float, int]] = field(default_factory=list)
    """When something came, and how many events."""
    tokens: int = 0

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.reads[0][0] - self.asked

    def gaps_s(self) -> list[float]:
        """Seconds between reads."""
        times = [at for at, _ in self.reads]
        return [after - before for before, after in zip(times, times[1:])]

    def tokens_until(self, until: float) -> float:
        """Tokens that had come by then."""
        events = sum(count for _, count in self.reads)
        return self.tokens * sum(n for at, n in self.reads if at <= until) / events


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a server did under a load."""

    tokens_per_s: float
    first_median_s: float
    first_p95_s: float
    gap_p95_s: float
    """Between events, of one token or several."""
    requests: int


class _Stream(asyncio.Protocol):
    """Sends one request and counts the events of its answer."""

    def __init__(self, request: bytes):
        self._request = request
        self._tail = b""
        self.heard = Heard(asked=time.perf_counter())
        self.ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        # An event may come in two reads: its mark then ends in the second.
        events = (self._tail[1 - len(EVENT) :] + data).count(EVENT)
        if events:
            self.heard.reads.append((now, events))
        self._tail = (self._tail + data)[-TAIL_BYTES:]

    def connection_lost(self, problem: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(self._tail)


async def ask(url: str, body: bytes, answer: int) -> Heard:
    """Send one request and hear its answer to the end.

    Raises:
        LoadFailed: it had not `answer` tokens, or was none.
    """
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    transport, stream = await loop.create_connection(
        lambda: _Stream(head.encode() + body), parts.hostname, parts.port
    )
    try:
        async with asyncio.timeout(REQUEST_S):
            tail = await stream.ended
    except TimeoutError:
        raise LoadFailed(f"no whole answer within {REQUEST_S:g} s") from None
    finally:
        transport.abort()
    heard = stream.heard
    said = re.findall(rb'"completion_tokens":\s*(\d+)', tail)
    heard.tokens = int(said[-1]) if said else 0
    if DONE not in tail or heard.tokens != answer:
        raise LoadFailed(
            f"{answer} tokens were asked for, {heard.tokens} came; the answer ends "
            f"with {tail[-500:].decode(errors='replace')!r}"
        )
    return heard


def load(
    url: str, model: str, case: Case, *, seconds: float, least: int, seed: int
) -> Figures:
    """Let all clients ask for so long, and each `least` times at the least.

    The figures are of the time in which every client had work.

    Raises:
        LoadFailed: an answer was not whole.
    """

    async def client(index: int, until: float) -> list[Heard]:
        heard: list[Heard] = []
        while len(heard) < least or time.perf_counter() < until:
            body = case.body(model, seed, index, len(heard))
            heard.append(await ask(url, body, case.answer))
        return heard

    async def clients(begun: float) -> list[list[Heard]]:
        return await asyncio.gather(
            *(client(index, begun + seconds) for index in range(case.clients))
        )

    begun = time.perf_counter()
    return figures(asyncio.run(clients(begun)), begun)


def figures(clients: list[list[Heard]], begun: float) -> Figures:
    """What clients heard, until the first of them had no more to ask."""
    ended = min(one[-1].reads[-1][0] for one in clients)
    every = [heard for one in clients for heard in one]
    firsts = [heard.first_s for heard in every]
    gaps = [gap for heard in every for gap in heard.gaps_s()]
    tokens = sum(heard.tokens_until(ended) for heard in every)
    return Figures(
        tokens_per_s=tokens / (ended - begun),
        first_median_s=float(np.median(firsts)),
        first_p95_s=float(np.percentile(firsts, 95)),
        gap_p95_s=float(np.percentile(gaps, 95)) if gaps else 0.0,
        requests=len(every),
    )
