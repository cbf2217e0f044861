"""Watch a run for what should stop it: a diverging loss, a signal, the clock."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

from llmos_jax.errors import TrainingError
from llmos_jax.telemetry import leave

_MEMORY = 100
"""Steps over which the running median of the loss is taken."""
_PATIENCE = 20
"""Steps before an explosion is judged; a fresh model's loss moves fast."""


_MARGIN_S = 1.0
"""Before the end of the time a machine gives: for the last line and for leaving; a
judgement."""


class DivergenceWatch:
    """Raise when the loss or gradient is not finite, or the loss explodes."""

    def __init__(self, explode_ratio: float, least: float = 0.0):
        self._ratio = explode_ratio
        self._least = least
        self._recent: deque[float] = deque(maxlen=_MEMORY)

    def check(
        self, step: int, loss: float, grad_norm: float, last_saved: Callable[[], str]
    ) -> None:
        """Judge one step's figures.

        Raises:
            TrainingError: naming the step, the figure, the last good checkpoint (as
                `last_saved` says, which is asked only then) and what usually helps.
        """
        wrong = self._verdict(loss, grad_norm)
        if wrong:
            raise TrainingError(
                f"at step {step} {wrong}. {last_saved()} To go on: lower "
                "train.learning_rate or raise train.warmup_steps, and run again on "
                "the same folder."
            )
        self._recent.append(loss)

    def _verdict(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss became {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm became {grad_norm}"
        if len(self._recent) < _PATIENCE:
            return None
        median = max(self._least, statistics.median(self._recent))
        if loss <= self._ratio * median:
            return None
        return (
            f"the loss jumped to {loss:.4g}, more than train.explode_ratio = "
            f"{self._ratio:g} times its recent median {median:.4g}"
        )


class StopSignal:
    """While entered, SIGTERM and SIGINT ask for a stop at the next step boundary.

    A second SIGINT interrupts at once, as a person pressing Ctrl-C twice expects.

    SIGTERM is the notice that the machine will be gone in `grace_s`. A thread of its
    own keeps that time, since the main one may be in C++ for long (XLA compiles): while
    nothing is at stake (`at_stake` is None) it says so and ends the process at once,
    with exit code 0; else, shortly before the time is over, with what `at_stake` says
    and exit code 1. Leaving the block in time ends the watch.

    NOTE: among several processes (`enabled=False`) it takes no signal. SIGTERM is then
    JAX's own (its preemption service makes all processes stop at one step), and a
    handler set here would replace JAX's; `begin_countdown` is called when all have
    agreed to stop.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        grace_s: float | None = None,
        nothing_lost: Callable[[], str] = lambda: "",
    ) -> None:
        """Args:
        enabled: take signals.
        grace_s: None: no thread watches the time.
        nothing_lost: a sentence for a stop before there is anything to lose.
        """
        self.received: str | None = None
        self.at_stake: Callable[[], str | None] | None = None
        """Set while training: what is lost if the process ends now, as a sentence;
        None: nothing."""
        self._grace_s = grace_s
        self._nothing_lost = nothing_lost
        self._numbers = (signal.SIGTERM, signal.SIGINT) if enabled else ()
        self._previous: dict[int, object] = {}
        self._is_over = threading.Event()
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1
        self._counts = False

    def __enter__(self) -> StopSignal:
        if self._numbers and self._grace_s is not None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._previous_fd = signal.set_wakeup_fd(
                self._pipe[1], warn_on_full_buffer=False
            )
            _behind(self._listen, self._pipe[0])
        for number in self._numbers:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._pipe[1])  # which ends the thread that listens
            self._pipe = None

    @contextlib.contextmanager
    def while_training(self, lost: Callable[[], str | None]) -> Iterator[None]:
        """While entered something is `at_stake`."""
        self.at_stake = lost
        try:
            yield
        finally:
            self.at_stake = None

    @property
    def is_urgent(self) -> bool:
        """Whether the machine will be gone soon."""
        return self.received == "SIGTERM" or self._counts

    def begin_countdown(self) -> None:
        """Keep the time from now on, as after a SIGTERM."""
        if self._grace_s is not None and not self._counts:
            self._counts = True
            _behind(self._count_down)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        is_idle = self._grace_s is not None and self.at_stake is None
        if number == signal.SIGINT and is_idle:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def _listen(self, pipe: int) -> None:
        """Hear of signals as they arrive; Python tells the main thread alone, and only
        between two of its instructions."""
        with os.fdopen(pipe, "rb", buffering=0) as heard:
            while byte := heard.read(1):
                if byte[0] == signal.SIGTERM:
                    self._counts = True
                    self._count_down()

    def _count_down(self) -> None:
        assert self._grace_s is not None
        left_s = self._grace_s - min(_MARGIN_S, self._grace_s / 10)
        if self._is_over.wait(left_s if self.at_stake is not None else 0):
            return
        at_stake = self.at_stake
        lost = None if at_stake is None else at_stake()
        if lost is None:
            line = f"stopped by SIGTERM. {self._nothing_lost()}"
            leave(line, 0, {"stopped_by": "SIGTERM"})
        else:
            leave(f"error: {lost}", 1, {"error": lost})


def _behind(work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, name="grace", daemon=True).start()


class Clock:
    """Training seconds so far, and whether a limit has passed."""

    def __init__(self, max_minutes: float | None):
        self._limit_s = math.inf if max_minutes is None else 60 * max_minutes
        self._start = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start

    @property
    def is_over(self) -> bool:
        """Whether the limit has passed."""
        return self.elapsed_s >= self._limit_s
