"""End the process from any thread, whatever hangs, and still answer.

A verb with `--json` owes its caller one object on stdout, which is redirected while it
works; its front door says where stdout is.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any, NoReturn

_stdout: int | None = None


@contextlib.contextmanager
def answering(stdout: int | None) -> Iterator[None]:
    """Meanwhile, who leaves writes a JSON object to this file descriptor; None: what it
    says on stderr is enough."""
    global _stdout
    _stdout, before = stdout, _stdout
    try:
        yield
    finally:
        _stdout = before


def leave(line: str, code: int, report: dict[str, Any]) -> NoReturn:
    """Say a line on stderr, answer, and end with this exit code."""
    os.write(2, f"{line}\n".encode())
    if _stdout is not None:
        os.write(_stdout, f"{json.dumps(report)}\n".encode())
    os._exit(code)
