"""Show on stderr how a run is doing: a live bar on a terminal, plain lines elsewhere.

stdout belongs to the result, so everything here goes to stderr. `log` may be called at
any time; with a bar on the screen the message appears above it.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from llmos_jax.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_PLAIN_EVERY_S = 10.0
_live: list[Console] = []
"""Consoles with a bar on them, innermost last; `log` prints through the last."""


def log(message: str, *, enabled: bool = True) -> None:
    """Write one line to stderr, above the live bar if there is one.

    Args:
        message: the line, shown as it is.
        enabled: False on every process but the first.
    """
    if not enabled:
        return
    if _live:
        _live[-1].print(message, markup=False, highlight=False, soft_wrap=True)
    else:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


class TrainProgress:
    """Progress of a training run; use it in a `with` and `update` it every step.

    Args:
        total_steps: the step the run ends with.
        start_step: the step it starts from, when it is resumed.
        max_seconds: the run ends after so much time even if steps are left.
        stream: where to write; stderr if None.
        enabled: False on every process but the first.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        max_seconds: float | None = None,
        stream: TextIO | None = None,
        enabled: bool = True,
    ):
        self._total = total_steps
        self._step = start_step
        self._max_seconds = max_seconds
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._bar: Progress | None = None
        self._line = ""
        self._shown_line = ""
        self._shown_at = float("-inf")

    def update(
        self, step: int, loss: float, tokens_per_s: float, mfu: float | None = None
    ) -> None:
        """Say that `step` is done; `mfu` is a fraction, None where it is not known."""
        if not self._enabled:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        self._step = step
        figures = [f"loss {loss:.3f}", f"{tokens_per_s:,.0f} tokens/s"]
        if mfu is not None:
            figures.append(f"MFU {mfu:.1%}")
        times = format_seconds(round(now - self._started))
        eta = self._eta(now)
        if self._bar is not None:
            times += "" if eta is None else f" < {format_seconds(eta)}"
            self._bar.update(
                self._bar.task_ids[0],
                completed=step,
                figures=" ".join(figures),
                times=times,
            )
            return
        eta_text = "" if eta is None else f", ETA {format_seconds(eta)}"
        self._line = (
            f"step {step}/{self._total}  {'  '.join(figures)}  ({times}{eta_text})"
        )
        if step >= self._total or now - self._shown_at >= _PLAIN_EVERY_S:
            self._show(now)

    def _eta(self, now: float) -> float | None:
        """Seconds left: by the rate since the first step, which held the compiling."""
        if self._first is None or self._step <= self._first[0]:
            return None
        rate_s = (now - self._first[1]) / (self._step - self._first[0])
        left = rate_s * max(self._total - self._step, 0)
        if self._max_seconds is not None:
            left = min(left, max(self._max_seconds - (now - self._started), 0))
        return float(round(left))

    def _show(self, now: float) -> None:
        self._stream.write(self._line + "\n")
        self._stream.flush()
        self._shown_line, self._shown_at = self._line, now

    def __enter__(self) -> TrainProgress:
        if not (self._enabled and self._stream.isatty()):
            return self
        console = _console(self._stream)
        if not console.is_terminal:  # TERM=dumb
            return self
        self._bar = _bar(console)
        self._bar.add_task(
            "train", total=self._total, completed=self._step, figures="", times=""
        )
        self._bar.start()
        _live.append(console)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            _live.pop()
            self._bar.stop()
            self._bar = None
        elif self._enabled and self._line != self._shown_line:
            self._show(time.monotonic())


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream)


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
        TextColumn("[dim]{task.fields[times]}", table_column=Column(no_wrap=True)),
        console=console,
        expand=True,
        refresh_per_second=4,
    )
