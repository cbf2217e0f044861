"""Keep account of where a run's wall time goes: goodput.jsonl in the run folder.

Goodput is the share of wall time, since the run was first started, that went into
steps which the run kept (Google's library ML Goodput Measurement divides productive
step time by total job time in the same way). A sitting is one process that
works on the folder. It appends rows, each with all its seconds so far, so that the last
whole row of a sitting counts, a torn line harms nothing, and a kill loses what came
after the last row: that time counts as `down`, and its steps were never counted.

Known lies:
- Rows are written at most once a second, and in long sittings once in a thousandth of
  their age (a minute at most).
- Steps are sent ahead of the device, so a wait for data counts as `data_stall` only
  where it outlasts the step under way, whose length is that of a step that was waited
  for. Where none was, it does not count.
- What follows a sitting that ended as it was asked to is not the run's time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmos_jax.telemetry.heartbeat import Heartbeat

Phase = Literal[
    "stepping",
    "repeated",
    "data_stall",
    "saving",
    "evaluating",
    "restoring",
    "compiling",
    "starting",
    "stopping",
    "down",
]

PHASES: dict[Phase, str] = {
    "stepping": "steps that the run kept",
    "repeated": "steps done again after a crash",
    "data_stall": "devices waited for data",
    "saving": "the loop waited for a save",
    "evaluating": "scoring held-out text",
    "restoring": "reading a checkpoint, or drawing weights",
    "compiling": "compiling programs",
    "starting": "imports, the plan, the text",
    "stopping": "samples and the report",
    "down": "between a crash or a signal and the next start",
}
"""Every phase, and what it means to a reader."""

_LEAST_S, _SHARE, _MOST_S = 1.0, 1e-3, 60.0
"""Between two rows: as the module says; judgements. A week makes 10,000 rows."""
_ORDERLY = ("finished", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Where the wall time of a run went, in seconds by phase."""

    seconds: dict[Phase, float]

    @property
    def wall_s(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Of the wall time, what went into steps that the run kept."""
        wall_s = self.wall_s
        return self.seconds["stepping"] / wall_s if wall_s else 0.0


class Ledger:
    """The account of this sitting; the phase is what the time until the next call is.

    Without a path it keeps account of this sitting alone. A row that cannot be written
    (a full disk) is left out: the next one holds what it held.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        heartbeat: Heartbeat | None = None,
        began: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Begin a sitting, which is `starting`.

        Args:
            path: of goodput.jsonl; only one process of a run gives it.
            heartbeat: what a supervisor watches.
            began: when, as `time.time()`; None: now.
            clock: of intervals, in seconds.
        """
        now = time.time()
        began = now if began is None else min(began, now)
        self._path, self._heartbeat, self._clock = path, heartbeat, clock
        self._rows = [] if path is None else read_rows(path)
        self._sitting = 1 + max((row["sitting"] for row in self._rows), default=0)
        self._reached = max((row["reached"] for row in self._rows), default=0)
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._began, self._step = began, 0
        self._phase: Phase = "starting"
        self._mark = clock() - (now - began)
        self._wrote_at = float("-inf")
        self._got_at = self._busy_until = self._mark
        self._alone_s = float("inf")
        self._write()

    def enter(self, phase: Phase) -> None:
        """What went on until now is over, and `phase` begins."""
        self._take()
        self._phase = phase
        self._beat()
        self._write()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """The time of this block is `phase`'s; then the phase before goes on."""
        before = self._phase
        self._take()
        self._phase = phase
        self._beat()
        try:
            yield
        finally:
            self._take()
            self._phase = before
            self._beat()

    def resumed(self, step: int) -> None:
        """The sitting goes on from a checkpoint of `step`, or from 0."""
        self._step = step
        if self._heartbeat is not None:
            self._heartbeat.resumed_from = step
        self._beat()

    def got_batch(self, *, is_idle: bool) -> None:
        """The next batch is here; `is_idle`: and the device has nothing left to do."""
        now = self._clock()
        stall_s = now - max(self._busy_until, self._mark)
        if is_idle and stall_s > 0:
            self._take()
            self._seconds[self._kind] -= stall_s
            self._seconds["data_stall"] += stall_s
        self._got_at = now

    def stepped(self, step: int) -> None:
        """A step was handed to the device, which is done with the one before."""
        step_s = self._take()
        self._step = step
        self._busy_until = self._mark + self._alone_s
        if self._heartbeat is not None:
            self._heartbeat.stepped(step, step_s)
        self._write_now_and_then()

    def waited(self) -> None:
        """The device is done with every step that it was handed."""
        self._take()
        self._alone_s = min(self._alone_s, self._mark - self._got_at)
        self._busy_until = self._mark

    def beat(self, *_: object) -> None:
        """Still at work, and not stuck: for what takes long."""
        self._beat()
        self._write_now_and_then()

    def close(self, reason: str) -> None:
        """The sitting is over; `finished` and `time` end what the run was asked for."""
        self._take()
        self._write(ended=reason)

    def goodput(self) -> Goodput:
        """The account of the whole run up to now, earlier sittings included."""
        self._take()
        return account([*self._rows, self._row()])

    @property
    def _kind(self) -> Phase:
        is_again = self._phase == "stepping" and self._step < self._reached
        return "repeated" if is_again else self._phase

    def _take(self) -> float:
        """Book the seconds since the last call, and return them."""
        before, self._mark = self._mark, self._clock()
        self._seconds[self._kind] += self._mark - before
        return self._mark - before

    def _beat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.beat(self._phase)

    def _row(self, ended: str | None = None) -> dict[str, Any]:
        row = {
            "sitting": self._sitting,
            "began": round(self._began, 3),
            "at": round(self._began + sum(self._seconds.values()), 3),
            "phase": self._phase,
            "step": self._step,
            "reached": max(self._reached, self._step),
            "s": {name: round(s, 4) for name, s in self._seconds.items() if s},
        }
        return row if ended is None else row | {"ended": ended}

    def _write_now_and_then(self) -> None:
        age_s = sum(self._seconds.values())
        pause_s = min(max(_LEAST_S, _SHARE * age_s), _MOST_S)
        if self._mark - self._wrote_at >= pause_s:
            self._write()

    def _write(self, ended: str | None = None) -> None:
        self._wrote_at = self._mark
        if self._path is None:
            return
        line = json.dumps(self._row(ended)) + "\n"
        try:
            with self._path.open("ab+") as file:
                size = file.seek(0, 2)
                if size:
                    file.seek(size - 1)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode())
        except OSError:
            return  # as the class says; the metrics, which must be whole, complain


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a goodput.jsonl; [] if there is none, or it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [row for row in map(_parsed, lines) if row is not None]


def account(rows: Sequence[dict[str, Any]]) -> Goodput:
    """Add sittings up, and the time between them.

    Steps count as kept in the sitting that did them first: the later ones, which did
    them again, booked theirs as `repeated`.
    """
    last = {row["sitting"]: row for row in rows}
    seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
    before: dict[str, Any] | None = None
    for _, row in sorted(last.items()):
        for phase in PHASES:
            seconds[phase] += row["s"].get(phase, 0.0)
        if before is not None and before.get("ended") not in _ORDERLY:
            seconds["down"] += max(row["began"] - before["at"], 0.0)
        before = row
    return Goodput(seconds=seconds)


def process_began() -> float:
    """When this process was started, as `time.time()`.

    NOTE: Linux tells when it booted in whole seconds, so there it is reckoned from the
    process's age.
    """
    import psutil  # takes longer than all else here

    created = float(psutil.Process().create_time())
    if not sys.platform.startswith("linux"):
        return created
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - since_boot + created - float(psutil.boot_time())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        whole = {"sitting", "began", "at", "reached", "s"} <= row.keys()
    except (ValueError, AttributeError):
        return None
    return row if whole else None
