"""An engine without a model: a thread that says what a test wants, when it wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmos_jax.errors import ConfigError, Overloaded, Stopping
from llmos_jax.scheduling import Hear, Likelihood, Progress, Request, Times
from llmos_jax.serving.state import EngineState, Limits, Stage

CONTEXT = 256
VOCAB = 257
"""Of data.bytes_tokenizer."""

LIMITS = Limits(
    context=CONTEXT,
    seats=8,
    page_size=16,
    pages=256,
    max_queue=16,
    max_queued_tokens=4096,
    vocab_size=VOCAB,
)
Script = Callable[[Request], Sequence[int]]


def echo_letters(request: Request) -> list[int]:
    """Lower-case letters that the seed begins, when chance has a part; else `a...`."""
    first = request.sampling.seed % 26 if request.sampling.draws else 0
    return [ord("a") + (first + step) % 26 for step in range(CONTEXT)]


def say(text: str, *, ends: bool = True) -> Script:
    """A script that says one text, and then an end mark."""
    return lambda request: [*text.encode(), *([VOCAB - 1] if ends else [])]


@dataclass
class Asked:
    """A request on its way through."""

    request: Request
    hear: Hear
    queued: float
    script: list[int] = field(default_factory=list)
    at: int = 0
    first_token: float | None = None


class FakeEngine:
    """Says `script`'s tokens, `step_s` apart, `chunk` at a time, to all at once.

    `problem`: requests fail with it after two tokens. `refuse`: submit raises it.
    `holds`: nobody is admitted.
    """

    def __init__(
        self,
        script: Script = echo_letters,
        *,
        step_s: float = 0.0,
        chunk: int = 1,
        problem: str = "",
        refuse: Exception | None = None,
        holds: bool = False,
        limits: Limits = LIMITS,
    ):
        self.limits = limits
        self.script, self.step_s, self.chunk = script, step_s, chunk
        self.problem, self.refuse, self.holds = problem, refuse, holds
        self.stage: Stage = "ready"
        self.submitted: list[Request] = []
        self.ended: dict[str, str] = {}
        self._open: dict[str, Asked] = {}
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, hear: Hear) -> None:
        request.sampling.check()
        if self.refuse is not None:
            raise self.refuse
        with self._lock:
            if self.stage != "ready":
                raise Stopping("the engine takes no more requests.")
            if len(self._open) >= self.limits.seats + self.limits.max_queue:
                raise Overloaded("too much waits already.", 2.5)
            if request.id in self._open:
                raise ConfigError("this id is taken.")
            self.submitted.append(request)
            asked = Asked(request, hear, time.monotonic())
            asked.script = list(self.script(request))
            self._open[request.id] = asked
            self._lock.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._open:
                self._end(self._open[request_id], "cancelled")

    def state(self) -> EngineState:
        return EngineState(
            stage=self.stage, running=len(self._open), problem="burnt"
            if self.stage == "failed" else "",
        )  # fmt: skip

    def drain(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        with self._lock:
            self.stage = "draining"
            while self._open and time.monotonic() < until:
                self._lock.wait(0.01)
            return not self._open

    def stop(self) -> None:
        with self._lock:
            self.stage = "stopped"
            for asked in list(self._open.values()):
                self._end(asked, "cancelled")
            self._lock.notify_all()
        self._thread.join(5)

    def wait_for_end(self, count: int, seconds: float = 5.0) -> dict[str, str]:
        """Return the reasons of what ended, once that is `count` requests."""
        until = time.monotonic() + seconds
        while len(self.ended) < count and time.monotonic() < until:
            time.sleep(0.005)
        return self.ended

    def _run(self) -> None:
        while self.stage != "stopped":
            with self._lock:
                if not self._open:
                    self._lock.wait(0.05)
                for asked in list(self._open.values()):
                    self._step(asked)
            time.sleep(self.step_s or 0.0002)

    def _step(self, asked: Asked) -> None:
        request = asked.request
        if request.deadline is not None and time.monotonic() > request.deadline:
            self._end(asked, "deadline")
            return
        if self.holds:
            return
        if request.wants == "classes":
            logits = np.arange(len(self.limits.labels), dtype=np.float32)
            self._end(asked, "stop", class_logits=logits)
            return
        if request.wants == "embedding":
            ids = np.bincount(request.prompt, minlength=8)[:8] + 1.0
            self._end(asked, "stop", embedding=ids.astype(np.float32))
            return
        if self.problem and asked.at >= 2:
            self._end(asked, "failed", problem=self.problem)
            return
        asked.first_token = asked.first_token or time.monotonic()
        tokens, reason = [], None
        for _ in range(self.chunk):
            if asked.at >= len(asked.script):
                reason = "length"
            elif asked.script[asked.at] in request.stop_ids:
                reason = "stop"
            else:
                tokens.append(asked.script[asked.at])
                asked.at += 1
                reason = "length" if asked.at == request.max_tokens else None
            if reason:
                break
        said = Progress(
            tokens=tuple(tokens),
            likelihoods=self._likelihoods(request, tokens),
            cached_tokens=3,
        )
        if reason:
            self._end(asked, reason, said=said)
        else:
            asked.hear(said)

    def _likelihoods(self, request, tokens):
        if request.alternatives is None:
            return ()
        return tuple(
            Likelihood(
                logprob=-token / 100,
                top=tuple(
                    (token + rank, -token / 100 - rank)
                    for rank in range(request.alternatives)
                ),
            )
            for token in tokens
        )

    def _end(
        self,
        asked: Asked,
        reason,
        *,
        said=None,
        problem="",
        embedding=None,
        class_logits=None,
    ):
        del self._open[asked.request.id]
        self.ended[asked.request.id] = reason
        said = said or Progress()
        asked.hear(
            Progress(
                tokens=said.tokens,
                likelihoods=said.likelihoods,
                cached_tokens=said.cached_tokens,
                reason=reason,
                problem=problem,
                embedding=embedding,
                class_logits=class_logits,
                times=Times(
                    queued=asked.queued,
                    admitted=asked.first_token,
                    first_token=asked.first_token,
                    ended=time.monotonic(),
                ),
            )
        )
