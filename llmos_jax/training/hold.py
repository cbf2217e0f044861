"""Hold a folder: one run at a time writes there.

The kernel keeps the lock (flock) and frees it however the process ends, kill -9 too.
The file says who holds it, for the error of the second run, and goes with the first.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

from llmos_jax.errors import ConfigError

LOCK = "lock"


class Hold:
    """A folder that is this process's until `release`."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        """Take the folder.

        Args:
            folder: there already.
            say: writes a line: the file system knows no locks.

        Raises:
            ConfigError: another run holds it; with its process and host.
            OSError: the file cannot be written.
        """
        self._path = folder / LOCK
        self._file: IO[str] | None = _locked(self._path)
        if self._file is None:
            say(
                f"warning: {folder} lies on a file system without locks (flock): "
                "nothing keeps a second run from writing there, too."
            )
            return
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        self._file.truncate(0)
        self._file.write(json.dumps(holder))
        self._file.flush()

    def release(self) -> None:
        """Let go; the file is removed first, while nobody else can hold it."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _locked(path: Path) -> IO[str] | None:
    """The file of that name, locked; None where files cannot be locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _held(path.parent, file.read()) from None
        except OSError:
            file.close()
            return None
        if _is_at(file, path):
            return file
        file.close()  # its holder removed it meanwhile


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _held(folder: Path, page: str) -> ConfigError:
    try:
        holder = json.loads(page)
        who = f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return ConfigError(
        f"{folder} is in use: {who} trains there. Wait for it or stop it, or choose "
        "another folder with --set run.dir=..."
    )
