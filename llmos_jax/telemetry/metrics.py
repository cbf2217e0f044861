"""Append one row per step to metrics.jsonl and its scalars to TensorBoard events.

A row is flushed as it is written: a killed run loses at most the line it was writing.
A resumed run first drops the rows after the step it resumes from: each step is in the
file once, whatever happened on the way. While the disk is full, rows wait in memory:
training goes on, and what is lost is known only at the end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from llmos_jax.errors import DataError, TrainingError
from llmos_jax.telemetry.progress import log

Row = dict[str, float | int | str]


class MetricsWriter:
    """Writes `folder/metrics.jsonl` and `folder/tensorboard/`; use it in a `with`.

    Args:
        folder: the run folder; made if it is not there.
        resume_step: the last step that counts; rows of later steps are dropped.

    Raises:
        TrainingError: the folder cannot be written, now or later; or there was no space
            for the last rows when it was closed.
        DataError: the metrics.jsonl that is there has a damaged line.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0):
        self._path = Path(folder) / "metrics.jsonl"
        self._waiting = b""
        self._is_full = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(self._path, resume_step)
            self._file = self._path.open("ab", buffering=0)
            self._events: _Events | None = _Events(
                self._path.parent / "tensorboard", resume_step
            )
        except OSError as problem:
            raise _unwritable(self._path, problem) from problem

    def write(self, row: Row) -> None:
        """Append one row; a number that is not finite is written as null.

        `step` says which step it belongs to. Rows without one (a note about the whole
        run) survive every resume and are not sent to TensorBoard.
        """
        line = json.dumps({key: _finite(value) for key, value in row.items()})
        self._waiting += line.encode() + b"\n"
        try:
            self._write_waiting()
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise _unwritable(self._path, problem) from problem
            self._tell_full()
        self._write_event(row)

    def close(self) -> None:
        """Write what waits and close both files; closing twice is harmless."""
        try:
            self._write_waiting()
        except OSError as problem:
            raise _unwritable(self._path, problem) from problem
        finally:
            self._file.close()
            if self._events is not None:
                self._events.close()
                self._events = None

    def _write_waiting(self) -> None:
        """Write rows from the byte on that a full disk took last."""
        while self._waiting:
            count = self._file.write(self._waiting)
            self._waiting = self._waiting[count or 0 :]
        self._is_full = False

    def _write_event(self, row: Row) -> None:
        """TensorBoard reads no file with a gap: a disk that is full once ends it."""
        if self._events is None:
            return
        try:
            self._events.write(row)
        except OSError:
            self._events.close()
            self._events = None
            log(
                "warning: the disk is full; TensorBoard's events of this sitting end "
                "here, metrics.jsonl goes on."
            )

    def _tell_full(self) -> None:
        if not self._is_full:
            self._is_full = True
            log(
                f"warning: no space for {self._path}: rows wait in memory until there "
                "is some."
            )

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except TrainingError:
            if error is None:  # else the run has failed of something else already
                raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, or [] if there is no such file.

    A last line without its end, as a kill leaves it, is not a row.

    Raises:
        DataError: another line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise DataError(
            f"{path} line {number} is not a JSON object: {line[:60]!r}. "
            "Delete that line, or move the file away."
        )
    return row


def _drop_after(path: Path, step: int) -> None:
    """Rewrite the file without later rows; a kill leaves the old file or the new."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row.get("step", step) <= step]
    fresh = path.with_suffix(".jsonl.tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _finite(value: float | int | str) -> float | int | str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN; strict readers refuse the word
    return value


def _unwritable(path: Path, problem: OSError) -> TrainingError:
    return TrainingError(
        f"cannot write {path}: {problem.strerror}. "
        "Free some space or choose another folder with --set run.dir=FOLDER."
    )


class _Events:
    """TensorBoard events, written by the calling thread.

    tensorboardX's SummaryWriter writes from a thread of its own, where a full disk ends
    in a traceback that nobody catches.
    """

    def __init__(self, folder: Path, resume_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.{resume_step}"
        self._writer = EventsWriter(str(folder / "events"), suffix)
        # NOTE: a session start tells TensorBoard to forget the steps from here on.
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(
            Event(wall_time=time.time(), step=resume_step + 1, session_log=start)
        )
        self._flushed_at = 0.0

    def write(self, row: Row) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if "step" not in row:
            return
        values = [
            Summary.Value(tag=key, simple_value=float(value))
            for key, value in row.items()
            if key != "step" and not isinstance(value, str) and math.isfinite(value)
        ]
        now = time.time()
        event = Event(
            wall_time=now, step=int(row["step"]), summary=Summary(value=values)
        )
        self._writer.write_event(event)
        if now - self._flushed_at > 5:
            self._writer.flush()
            self._flushed_at = now

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(
                OSError
            ):  # metrics.jsonl has it all, and complains
                writer.close()
