"""Tell a supervisor, in a small file, that this process lives and how far it is.

The supervisor (llmos_jax/supervise.py) names the file in `LLMOS_HEARTBEAT` when it
starts the process. The file is replaced as a whole, at most once a second while steps
go by, by the thread that trains: a process that hangs is silent. A process whose
supervisor is gone asks itself to stop, so that none is left behind.

With it SIGUSR1 writes the stacks of all threads, from C, whatever Python is waiting
for: to the same name with `.stack` behind it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import statistics
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "LLMOS_HEARTBEAT"
EVERY_S = 1.0
"""Between two beats of steps, at least."""
_STEPS = 101
"""Of which the median is taken; a judgement."""


class Heartbeat:
    """One process's sign of life."""

    def __init__(self, path: Path):
        self.resumed_from: int | None = None
        self._path = path
        self._supervisor = os.getppid()
        self._times: deque[float] = deque(maxlen=_STEPS)
        self._step: int | None = None
        self._wrote_at = float("-inf")
        self._stacks = stack_path(path).open("wb")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self.beat("starting")

    def stepped(self, step: int, step_s: float) -> None:
        """A step is over that took so many seconds."""
        first = self._step is None
        self._step = step
        if not first:  # it holds what is done once
            self._times.append(step_s)
        if first or time.monotonic() - self._wrote_at >= EVERY_S:
            self.beat("stepping")

    def beat(self, phase: str) -> None:
        """Write the file now."""
        self._write({"phase": phase})
        if os.getppid() != self._supervisor:
            self._supervisor = os.getppid()
            os.kill(os.getpid(), signal.SIGTERM)

    def failed(self, problem: BaseException) -> None:
        """The process ends with an error, which the supervisor is to judge."""
        first = (str(problem).splitlines() or [""])[0]
        self._write({"phase": "failed", "error": type(problem).__name__, "why": first})

    def _write(self, fields: dict[str, Any]) -> None:
        self._wrote_at = time.monotonic()
        row = {
            "pid": os.getpid(),
            "at": self._wrote_at,
            "step": self._step,
            "resumed_from": self.resumed_from,
            "median_step_s": statistics.median(self._times) if self._times else None,
            **fields,
        }
        fresh = self._path.with_suffix(".tmp")
        with suppress(OSError):  # a full disk: the next beat may find room
            fresh.write_text(json.dumps(row))
            fresh.replace(self._path)


def open_heartbeat() -> Heartbeat | None:
    """The heartbeat that a supervisor asked this process for, if one did."""
    asked = os.environ.pop(VARIABLE, None)
    return None if asked is None else Heartbeat(Path(asked))


def read_heartbeat(path: Path) -> dict[str, Any]:
    """What a process said last; {} before it said anything. `at` is monotonic time,
    which all processes of a machine share."""
    try:
        row = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return row if isinstance(row, dict) else {}


def stack_path(path: Path) -> Path:
    """Where the stacks of a heartbeat's process go."""
    return path.with_suffix(".stack")
