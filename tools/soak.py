#!/usr/bin/env python3
"""Load a real server for a while: is every answer right, and does nothing grow?

    .venv/bin/python tools/soak.py --model DIR [--minutes 30] [--concurrency 64]
        [--overload] [--connections 1000] [--set KEY=VALUE] [--json]

It starts its own server and asks for greedy answers to prompts of 10 to 1500 tokens,
some that begin alike, streamed and not; some clients hang up in the middle. Each answer
must be what the same server said to the same prompt when it was asked alone. At the end
all pages must be free, nothing may have been compiled on the way, memory must be flat,
and SIGTERM must end it with exit code 0. Exit code 1 says that something is wrong.

--overload asks, at the end, for ten times as much as may wait; --connections keeps so
many connections open at once and asks over all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx
import numpy as np

PATH = "/v1/completions"
START_S = 1800
HANG_S = 300
"""An answer that takes longer is counted as one that hangs: a judgement."""
WARM_UP = 0.3
"""Of the time, in which memory may grow: buffers and caches fill."""
MOST_GROWTH = 0.02
"""Of memory from the end of the warm-up to the end of the load: a judgement."""
LONGEST_ANSWER = 300
HANGS_UP = 0.05
EXCERPT = 120


@dataclass(frozen=True)
class Case:
    """A prompt, and what is answered to it alone."""

    prompt: list[int]
    text: str
    tokens: int
    reason: str


@dataclass
class Found:
    """What was seen."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def wrong(self, what: str) -> None:
        self.counts["wrong"] += 1
        if len(self.problems) < 20:
            self.problems.append(what)


class Server:
    """A server in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        sets = [word for text in arguments.set for word in ("--set", text)]
        words = ["-m", "llmos_jax.serve", arguments.model, "--port", "0", "--json"]
        words += ["--max-queue", str(arguments.concurrency), *sets]
        self.err = folder / "err"
        with self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                stdout=subprocess.DEVNULL,
                stderr=err,
                cwd=Path(__file__).resolve().parents[1],
            )
        self.url = ""

    async def ready(self) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until and self.process.poll() is None:
            lines = [one for one in self.lines() if one.startswith("serving ")]
            if lines and not self.url:
                self.url = lines[0].rsplit(" at ", 1)[1].strip()
            if self.url and httpx.get(f"{self.url}/ready").status_code == 200:
                return
            await asyncio.sleep(0.5)
        sys.exit(f"error: the server did not start: {self.lines()[-3:]}")

    def rss(self) -> float:
        """MiB of memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(one for one in lines if "VmRSS" in one).split()[1]) / 1024

    def state(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/state", timeout=30).json()["state"]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def lines(self) -> list[str]:
        return self.err.read_text().splitlines()


async def ask(
    client: httpx.AsyncClient, prompt: list[int], tokens: int, stream: bool = False
) -> tuple[httpx.Response, str, str, int]:
    """The reply, the text, how it ended, and its tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    reply = await client.post(PATH, json=body)
    if reply.status_code != 200:
        return reply, reply.text[:EXCERPT], "", 0
    lines = [one.removeprefix("data: ") for one in reply.text.split("\n\n")]
    events = [json.loads(one) for one in lines if one.startswith("{")]
    if any("error" in one for one in events):
        return reply, reply.text[-EXCERPT:], "error", 0
    choices = [one for event in events for one in event["choices"]]
    text = "".join(one["text"] for one in choices)
    reason = choices[-1]["finish_reason"]
    return reply, text, reason, events[-1]["usage"]["completion_tokens"]


async def make_cases(client: httpx.AsyncClient, count: int, most: int) -> list[Case]:
    """Prompts of 10 to `most` tokens, every third with a long common beginning."""
    rng = random.Random(0)
    text = "\n\n".join(topics.values())[:200_000]
    ids = (await client.post("/tokenize", json={"prompt": text})).json()["tokens"]
    cases = []
    for index in range(count):
        length = round(10 * (most / 10) ** (index / (count - 1)))
        start = rng.randrange(len(ids) - length)
        shared = ids[: length * 2 // 3] if index % 3 == 0 else []
        prompt = shared + ids[start : start + length - len(shared)]
        reply, text, reason, tokens = await ask(client, prompt, LONGEST_ANSWER)
        if reply.status_code != 200:
            raise SystemExit(f"error: asked alone, it says {reply.status_code}: {text}")
        cases.append(Case(prompt, text, tokens, reason))
        print(f"soak: {index + 1} of {count} asked alone", file=sys.stderr)
    return cases


def check(found: Found, case: Case, wanted: int, answer: tuple[Any, ...]) -> None:
    """Compare an answer with the one that was given alone."""
    reply, text, reason, tokens = answer
    found.counts[str(reply.status_code)] += 1
    if reply.status_code != 200 or reason == "error":
        return found.wrong(f"{reply.status_code}: {text}")
    found.counts["tokens"] += tokens
    is_whole = wanted >= case.tokens
    expected = case.tokens if is_whole else wanted
    ends = case.reason if is_whole else "length"
    whole = text.rstrip("\ufffd")
    at = next((i for i, (a, b) in enumerate(zip(whole, case.text)) if a != b), None)
    if at is not None or (is_whole and text != case.text):
        found.counts["differs"] += 1
        found.wrong(
            f"prompt of {len(case.prompt)}, {wanted} wanted: differs at letter {at}: "
            f"{case.text[at or 0 :][:30]!r} alone, {text[at or 0 :][:30]!r} now"
        )
    elif (tokens, reason) != (expected, ends):
        found.wrong(f"{tokens} tokens and {reason}; wanted {expected} and {ends}")
    return None


async def keep_asking(
    client: httpx.AsyncClient, cases: list[Case], found: Found, until: float, seed: int
) -> None:
    """One client: asks, waits, asks again."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        case, wanted = rng.choice(cases), round(LONGEST_ANSWER ** rng.random())
        try:
            if rng.random() < HANGS_UP:
                await hang_up(client, case, rng)
                found.counts["hung up"] += 1
                continue
            answer = await ask(client, case.prompt, wanted, rng.random() < 0.5)
        except httpx.HTTPError as problem:
            found.wrong(f"{type(problem).__name__}: {problem}")
            await asyncio.sleep(1)
            continue
        check(found, case, wanted, answer)


async def hang_up(client: httpx.AsyncClient, case: Case, rng: random.Random) -> None:
    """Ask for a long answer, and leave before or after it begins."""
    body = {"prompt": case.prompt, "max_tokens": LONGEST_ANSWER, "stream": True}
    try:
        async with asyncio.timeout(rng.random() * 3):
            async with client.stream("POST", PATH, json=body) as reply:
                async for _ in reply.aiter_lines():
                    if rng.random() < 0.1:
                        return
    except TimeoutError:
        pass


async def watch(server: Server, found: Found, begun: float) -> None:
    """Every ten seconds: one row."""
    while True:
        state = await asyncio.to_thread(server.state)
        row = {"s": round(time.monotonic() - begun), "rss_mib": round(server.rss(), 1)}
        names = ("running", "waiting", "pages_held", "pages_cached", "generated_tokens")
        row |= {name: state[name] for name in (*names, "preemptions")}
        row |= {"answers": found.counts["200"], "wrong": found.counts["wrong"]}
        found.rows.append(row)
        line = "  ".join(f"{name} {value}" for name, value in row.items())
        print(f"soak: {line}", file=sys.stderr)
        await asyncio.sleep(10)


async def overload(client: httpx.AsyncClient, server: Server, case: Case, found: Found,
                   queue: int) -> None:  # fmt: skip
    """Ten times as much as may wait: 429 with a time, or the right answer."""
    asking = [ask(client, case.prompt, 8) for _ in range(10 * queue)]
    answers = await asyncio.gather(*asking, return_exceptions=True)
    kinds: Counter[str] = Counter()
    for answer in answers:
        if isinstance(answer, BaseException):
            found.wrong(f"overload: {type(answer).__name__}")
        elif answer[0].status_code == 429:
            kinds["refused"] += 1
            if int(answer[0].headers.get("retry-after", 0)) < 1:
                found.wrong("overload: 429 without retry-after")
        else:
            kinds["answered"] += 1
            check(found, case, 8, answer)
    if not kinds["refused"] or kinds["answered"] < queue:
        found.wrong(f"overload: {dict(kinds)}, with {queue} that may wait")
    found.more["overload"] = dict(kinds)


async def connect(server: Server, case: Case, found: Found, count: int) -> None:
    """Open `count` connections, and only then ask over each, until it is answered."""
    opened = asyncio.Barrier(count)
    again = Counter[str]()

    async def one() -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(
            base_url=server.url, timeout=HANG_S, limits=limits
        ) as client:
            await client.get("/health")
            await opened.wait()
            while (answer := await ask(client, case.prompt, 2))[0].status_code == 429:
                again["refused"] += 1
                await asyncio.sleep(int(answer[0].headers["retry-after"]))
            check(found, case, 2, answer)

    begun = time.monotonic()
    try:
        async with asyncio.timeout(HANG_S):
            await asyncio.gather(*(one() for _ in range(count)))
    except (TimeoutError, httpx.HTTPError, asyncio.BrokenBarrierError) as problem:
        found.wrong(f"{count} connections: {type(problem).__name__}: {problem}")
    seconds = round(time.monotonic() - begun, 1)
    found.more["connections"] = {"count": count, "s": seconds, **again}


def judge(found: Found, state: dict[str, Any], code: int) -> dict[str, Any]:
    """What must hold at the end; returns the summary."""
    if any(state[name] for name in ("running", "waiting", "pages_held")):
        found.wrong(f"at rest it holds on: {state}")
    if state["unplanned_compiles"]:
        found.wrong(f"{state['unplanned_compiles']} programs were not planned")
    if code:
        found.wrong(f"its exit code is {code}")
    last = found.rows[-1]["s"]
    rows = [row for row in found.rows if row["s"] >= WARM_UP * last]
    seconds, mib = (np.array([row[name] for row in rows]) for name in ("s", "rss_mib"))
    slope = float(np.polyfit(seconds, mib, 1)[0] * 60) if len(rows) > 2 else 0.0
    growth = slope / 60 * (seconds[-1] - seconds[0]) / mib[0]
    if growth > MOST_GROWTH:
        found.wrong(f"memory grew by {growth:.1%} after the warm-up")
    return {
        "minutes": round(last / 60, 1),
        "counts": dict(found.counts),
        **found.more,
        "rss_mib": {
            "first": found.rows[0]["rss_mib"],
            "after_warm_up": float(mib[0]),
            "last": float(mib[-1]),
            "slope_per_minute": round(slope, 2),
        },
        "preemptions": state["preemptions"],
        "prefix_hits": state["prefix_hits"],
        "unplanned_compiles": state["unplanned_compiles"],
        "pages_held_at_rest": state["pages_held"],
        "problems": found.problems,
    }


async def soak(arguments: argparse.Namespace, server: Server) -> dict[str, Any]:
    found = Found()
    await server.ready()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=HANG_S, limits=limits
    ) as client:
        cases = await make_cases(client, arguments.cases, arguments.longest)
        begun = time.monotonic()
        watching = asyncio.create_task(watch(server, found, begun))
        until = begun + 60 * arguments.minutes
        await asyncio.gather(
            *(
                keep_asking(client, cases, found, until, seed)
                for seed in range(arguments.concurrency)
            )
        )
        watching.cancel()
        if arguments.overload:
            await overload(client, server, cases[0], found, arguments.concurrency)
        if arguments.connections:
            await connect(server, cases[0], found, arguments.connections)
        await asyncio.sleep(2)
        state = server.state()
    return judge(found, state, server.end())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--cases", type=int, default=24, help="distinct prompts")
    parser.add_argument("--longest", type=int, default=1500, help="prompt tokens")
    parser.add_argument("--overload", action="store_true")
    parser.add_argument("--connections", type=int, default=0, metavar="N")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments, Path(folder))
        try:
            report = asyncio.run(soak(arguments, server))
        finally:
            server.process.kill()
            server.process.wait()
            said = [one for one in server.lines() if not one.startswith("{")]
            print("\n".join(f"server: {one}" for one in said), file=sys.stderr)
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:20} {value}")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
