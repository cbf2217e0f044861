"""Keep a folder that a killed run goes on with: what is done is on disk, and written
down.

A file is done when it was written under another name, synced and renamed; the journal
then gets one line about it, synced too. A last line that a kill cut short is cut off.
The folder itself is locked while somebody works in it; the lock goes with the process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llmos_jax.errors import DataError

WORK = ".work"
_JOURNAL = "journal.jsonl"


class Journal:
    """The lines of `.work/journal.jsonl`: first the settings, then (key, facts)."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        """Open the journal of `out`, or begin one; DataError where it is of others."""
        self.work = out / WORK
        self.work.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self._path = self.work / _JOURNAL
        lines = self._lines()
        self._done = {tuple(line["key"]): line["facts"] for line in lines[1:]}
        if lines:
            check_settings(out, lines[0], settings)
        self._file = self._path.open("ab")
        if not lines:
            self._append(settings)

    def get(self, *key: Any) -> Any:
        """Return the facts of what is done; None if it is not."""
        return self._done.get(key)

    def add(self, *key: Any, facts: Any) -> None:
        """Write down that `key` is done."""
        self._append({"key": key, "facts": facts})
        self._done[key] = facts

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, plain: dict[str, Any]) -> None:
        self._file.write(json.dumps(plain).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        raw = self._path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self._path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]


def check_settings(out: Path, were: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise DataError, one line, where a folder was begun with other settings."""
    for key in {**were, **settings}:
        if were.get(key) != settings.get(key):
            change = (
                f"{key} was {json.dumps(were.get(key))} and is "
                f"{json.dumps(settings.get(key))}"
                if key.startswith(("prepare.", "data."))
                else f"the {key} changed since"
            )
            raise DataError(
                f"prepare.out {out} was begun otherwise: {change}. Name another "
                "folder, or delete this one."
            )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold `out` alone, making it; a full or unwritable disk becomes a DataError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as problem:
        raise _unusable(out, problem) from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(
            f"prepare.out {out} is in use: another run prepares a corpus there."
        ) from None
    except OSError as problem:
        raise _unusable(out, problem) from None
    finally:
        os.close(folder)


@contextmanager
def committed(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that is there whole or not at all."""
    aside = aside_of(path)
    with aside.open("wb") as file:
        yield file
    commit(path)


def aside_of(path: Path) -> Path:
    """Return the name under which a file is written until it is whole."""
    return path.with_name(f"{path.name}.tmp")


def commit(path: Path) -> None:
    """Sync what was written aside and give it its name."""
    for place, move in ((aside_of(path), True), (path.parent, False)):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if move:
            place.rename(path)


def is_fresh(out: Path) -> bool:
    """Whether nothing is in a folder yet, or only what this room began there.

    Raises:
        DataError: something else is in it.
    """
    inside = {path.name for path in out.iterdir()}
    if inside and WORK not in inside:
        raise DataError(
            f"prepare.out {out} holds something else ({min(inside)}). Name a new "
            "folder."
        )
    return not inside


def remove_work(out: Path) -> None:
    """Remove what only an unfinished corpus needs."""
    shutil.rmtree(out / WORK, ignore_errors=True)


def _unusable(out: Path, problem: OSError) -> DataError:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"no space left on the disk of prepare.out {out}. Free some and start "
            "again: what is done stays done. While it is made, a corpus takes about "
            "twice the room of its text."
        )
    where = f" ({problem.filename})" if problem.filename else ""
    return DataError(
        f"a corpus cannot be made in {out}: {problem.strerror or problem}{where}."
    )
