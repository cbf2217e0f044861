"""Show on stderr how far a model has been read or written, in bytes."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from llmos_jax.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress

_PLAIN_EVERY_S = 10.0


class ByteProgress:
    """A live bar on a terminal, a plain line every ten seconds elsewhere.

    Use it in a `with` and give `update` to whatever counts bytes. Work that is done
    before the first line is due says nothing.

    Args:
        what: is being done, as `reading smollm2`.
        stream: where to write; stderr if None.
        enabled: False on every process but the first.
    """

    def __init__(
        self, what: str, *, stream: TextIO | None = None, enabled: bool = True
    ):
        self._what = what
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._bar: Progress | None = None
        self._started = self._shown_at = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Say that `done` of `total` bytes are through."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
            return
        now = time.monotonic()
        if now - self._shown_at < _PLAIN_EVERY_S:
            return
        self._shown_at = now
        took = now - self._started
        left = took * (total - done) / max(done, 1)
        self._stream.write(
            f"{self._what}: {format_bytes(done)} of {format_bytes(total)} "
            f"({format_bytes(done / took)}/s, ETA {format_seconds(round(left))})\n"
        )
        self._stream.flush()

    def __enter__(self) -> ByteProgress:
        if not (self._enabled and self._stream.isatty()):
            return self
        from rich.console import Console

        console = Console(file=self._stream)
        if console.is_terminal:  # not so with TERM=dumb
            self._bar = _bar(console)
            self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(console: object) -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,  # type: ignore[arg-type]
        expand=True,
        refresh_per_second=4,
    )
