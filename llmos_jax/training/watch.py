"""Watch a run for what should stop it: a diverging loss, a signal, the clock."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable
from types import FrameType, TracebackType

from llmos_jax.errors import TrainingError

_MEMORY = 100
"""Steps over which the running median of the loss is taken."""
_PATIENCE = 20
"""Steps before an explosion is judged; a fresh model's loss moves fast."""


class DivergenceWatch:
    """Raise when the loss or gradient is not finite, or the loss explodes."""

    def __init__(self, explode_ratio: float):
        self._ratio = explode_ratio
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
        median = statistics.median(self._recent)
        if loss <= self._ratio * median:
            return None
        return (
            f"the loss jumped to {loss:.4g}, more than train.explode_ratio = "
            f"{self._ratio:g} times its recent median {median:.4g}"
        )


class StopSignal:
    """While entered, SIGTERM and SIGINT ask for a stop at the next step boundary.

    A second SIGINT interrupts at once, as a person pressing Ctrl-C twice expects.

    NOTE: among several processes (`enabled=False`) it takes no signal. SIGTERM is then
    JAX's own (its preemption service makes all processes stop at one step), and a
    handler set here would replace JAX's.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.received: str | None = None
        self._numbers = (signal.SIGTERM, signal.SIGINT) if enabled else ()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in self._numbers:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


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
