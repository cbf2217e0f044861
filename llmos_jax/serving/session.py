"""Answer a list of requests: seats of a batch, given to the next as sequences end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmos_jax.errors import LlmosError
from llmos_jax.scheduling import NOT_A_NUMBER
from llmos_jax.serving.runner import Runner
from llmos_jax.serving.sampler import Needs
from llmos_jax.serving.step import (
    FREE,
    MOST_STEPS,
    NO_TOKEN,
    DecodeState,
    Row,
    rows_on_device,
)

FinishReason = Literal["stop", "length"]
Hear = Callable[[int, int], bool | None]
"""`hear(index of the request, token)`; True ends its answer."""

STEPS_WHILE_HEARD = 4
"""A listener gets tokens in fours, which no reader sees; nobody waits for more."""


@dataclass(slots=True, kw_only=True)
class Request:
    """A prompt, and its answer as far as it is known."""

    index: int
    prompt: np.ndarray
    row: Row
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    """Why it ended; None while it has not."""
    began: float = 0.0
    """When the first token was known, in seconds of time.perf_counter."""
    ended: float = 0.0
    taken: int = 0
    """Tokens that were made for it, a stop among them."""

    @property
    def tokens_per_s(self) -> float:
        """Of the steps after the first token; 0 if there were none."""
        seconds = self.ended - self.began
        return (self.taken - 1) / seconds if seconds > 0 else 0.0

    def take(self, token: int, hear: Hear | None) -> None:
        """Add the next token, and see whether it is the last.

        Raises:
            LlmosError: it is none, for the logits were no numbers.
        """
        self.taken += 1
        if token == NOT_A_NUMBER:
            raise LlmosError(
                f"the model's logits for token {len(self.prompt) + len(self.tokens)} "
                f"of request {self.index} are not finite (NaN or infinity): its "
                "weights are damaged, or too large for the dtype it computes in. "
                "Compute in float32 (--set train.compute_dtype=float32), or get the "
                "weights again."
            )
        if token in self.row.stop:
            self.reason = "stop"
            return
        self.tokens.append(token)
        if hear is not None and hear(self.index, token):
            self.reason = "stop"
        elif len(self.prompt) + len(self.tokens) == self.row.limit:
            self.reason = "length"


class Session:
    """Requests, and the seats that some of them have."""

    def __init__(
        self,
        runner: Runner,
        state: DecodeState,
        requests: Sequence[Request],
        hear: Hear | None,
    ):
        """Begin; `state` is given away, and `run` returns it."""
        self._runner, self._state, self._hear = runner, state, hear
        self._needs = Needs.of([request.row.sampling for request in requests])
        self._waiting = deque(requests)
        self._seats: list[Request | None] = [None] * len(state.position)
        stops = max((request.row.stop for request in requests), key=len)
        # Rows of nobody that are as wide as the widest: one program for the session.
        self._free = FREE._replace(stop=stops)

    def run(self) -> DecodeState:
        """Answer all requests."""
        self._compile()
        while True:
            self._seat()
            if not any(self._seats):
                return self._state
            self._step()

    def _compile(self) -> None:
        """Have the decode program before a clock runs: a dispatch of no steps."""
        rows = rows_on_device([self._free] * len(self._seats), self._needs)
        self._state, _ = self._runner.decode(self._state, rows, steps=0)

    def _seat(self) -> None:
        """Prefill waiting requests into free seats."""
        for slot in range(len(self._seats)):
            while self._seats[slot] is None and self._waiting:
                request = self._waiting.popleft()
                self._state, token = self._runner.prefill(
                    self._state, slot, request.prompt, request.row, self._needs
                )
                request.began = request.ended = time.perf_counter()
                request.take(token, self._hear)
                if request.reason is None:
                    self._seats[slot] = request

    def _step(self) -> None:
        """Let all seated requests go on, until one who waits could have a seat."""
        seated = sum(seat is not None for seat in self._seats)
        rows = rows_on_device(
            [self._free if seat is None else seat.row for seat in self._seats],
            self._needs,
        )
        self._state, tokens_BK = self._runner.decode(
            self._state,
            rows,
            steps=MOST_STEPS if self._hear is None else STEPS_WHILE_HEARD,
            fewest=seated if self._waiting else 1,
        )
        now = time.perf_counter()
        for slot, request in enumerate(self._seats):
            if request is None:
                continue
            request.ended = now
            for token in tokens_BK[slot].tolist():
                if token == NO_TOKEN or request.reason is not None:
                    break
                request.take(token, self._hear)
            if request.reason is not None:
                self._seats[slot] = None
