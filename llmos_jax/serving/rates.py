"""How fast steps go, of late and in all: for admission and for metrics."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmos_jax.scheduling import Work

_WINDOW_S = 5.0
"""What "the last seconds" are: a judgement."""
_FIRST_GUESS = 100.0
"""Tokens/s before any are counted: a judgement; it only words the first Retry-After."""
_SMOOTH = 0.2
"""Of a new step in the running mean of decode steps."""
_LONGEST_WAIT_S = 600.0
_TOTALS = ("steps", "step_s", "host_s", "predicted_s")


@dataclass(frozen=True, slots=True)
class _Step:
    ended: float
    seconds: float
    tokens: int
    bytes: float


class Rates:
    """Written by the engine's thread, read by any."""

    def __init__(
        self,
        predict_step_s: Callable[[Work], float] | None,
        bytes_of: Callable[[Work], float] | None,
        planned_bandwidth: float,
    ):
        """See `Engine`."""
        self._predict, self._bytes_of = predict_step_s, bytes_of
        self._planned_bandwidth = planned_bandwidth
        self._recent: deque[_Step] = deque()
        self._lock = threading.Lock()
        self._free_since: float | None = None
        self._sent: deque[float] = deque()
        self._totals: dict[str, Any] = {
            "steps": 0,
            "step_s": 0.0,
            "host_s": 0.0,
            "predicted_s": 0.0,
        }
        self._known_rate = 0.0
        self.step_s = 0.0
        """Of one decode step, a running mean; 0: not known."""

    def sent(self) -> None:
        """A work was sent."""
        self._sent.append(time.monotonic())

    def idle(self) -> None:
        """Nothing is to be done: time that passes is nobody's."""
        self._free_since = None

    def read(self, work: Work, tokens: int, now: float) -> None:
        """A work was read, and gave so many tokens."""
        sent = self._sent.popleft() if self._sent else now
        free = sent if self._free_since is None else self._free_since
        begun = max(sent, free)
        seconds, steps = now - begun, work.steps if work.kind == "decode" else 1
        self._free_since = now
        if work.kind == "decode":
            one = seconds / steps
            known = self.step_s or one
            self.step_s = known + _SMOOTH * (one - known)
        with self._lock:
            totals = self._totals
            totals["steps"] += steps
            totals["step_s"] += seconds
            totals["host_s"] += max(0.0, sent - free)
            if self._predict is not None:
                totals["predicted_s"] += self._predict(work)
            read = 0.0 if self._bytes_of is None else self._bytes_of(work)
            self._recent.append(_Step(now, seconds, tokens, read))
            self._cut(now)

    def _cut(self, now: float) -> None:
        while self._recent and self._recent[0].ended < now - _WINDOW_S:
            self._recent.popleft()

    def reading(self) -> dict[str, Any]:
        """What `EngineState` has of this."""
        now = time.monotonic()
        with self._lock:
            self._cut(now)
            busy = sum(step.seconds for step in self._recent)
            read = sum(step.bytes for step in self._recent)
            tokens = sum(step.tokens for step in self._recent)
            span = min(_WINDOW_S, now - self._recent[0].ended) if self._recent else 0
            rate = tokens / span if span > 0.2 else 0.0
            if rate:
                self._known_rate = rate
            return {
                **self._totals,
                "tokens_per_s": rate,
                "bandwidth": read / busy if busy > 0 else 0.0,
                "planned_bandwidth": self._planned_bandwidth,
            }

    def seconds_for(self, tokens: float) -> float:
        """When so many tokens should be done, at the rate of late: 1 s at least."""
        rate = self.reading()["tokens_per_s"] or self._known_rate or _FIRST_GUESS
        return min(_LONGEST_WAIT_S, max(1.0, tokens / rate))
