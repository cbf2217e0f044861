"""Open a front door: parse, call the driver, print, and turn errors into exit codes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmos_jax.cli.arguments import Arguments, parse
from llmos_jax.errors import LlmosError
from llmos_jax.telemetry import answering


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a verb has to say: for people, and for scripts."""

    text: str
    json: dict[str, Any]
    failure: str = ""
    """Why the answer is a refusal: an `error:` line after it, and exit code 1."""


def run_verb(
    parser: Arguments,
    argv: Sequence[str] | None,
    answer: Callable[[Any], Answer],
    *,
    speaks: bool = False,
) -> int:
    """Run one verb and return its exit code.

    stdout gets the answer alone: one JSON object with `--json`, else its text. Whatever
    libraries print meanwhile goes to stderr. Errors of the LlmosError tree, full disks
    and refused files become one `error:` line; anything else is a bug and keeps its
    traceback. A verb that `speaks` writes its text itself, as it grows.
    """
    wants_json = "--json" in (sys.argv[1:] if argv is None else argv)
    live = speaks and not wants_json
    try:
        arguments = parse(parser, argv)
        with contextlib.nullcontext() if live else _stdout_to_stderr(wants_json):
            result = answer(arguments)
    except LlmosError as problem:
        return _fail(str(problem), problem.exit_code, wants_json)
    except OSError as problem:
        if problem.errno is None or isinstance(problem, BrokenPipeError):
            raise
        return _fail(_os_text(problem), 1, wants_json)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130, wants_json)
    if not result.failure:
        return _say(json.dumps(result.json) if wants_json else result.text)
    refusal = {**result.json, "error": result.failure}
    _say(json.dumps(refusal) if wants_json else result.text)
    return _fail(result.failure, 1, wants_json=False)


@contextlib.contextmanager
def _stdout_to_stderr(wants_json: bool) -> Iterator[None]:
    """Send what Python and what C++ libraries (Gloo) print meanwhile to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            answering(kept if wants_json else None),
        ):
            yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C++ buffered belongs to stderr too
        os.dup2(kept, 1)
        os.close(kept)


def speak(text: str) -> None:
    """Write a piece of a growing answer to stdout at once."""
    print(text, end="", flush=True)


def _say(text: str) -> int:
    with contextlib.suppress(BrokenPipeError):
        if text:
            print(text, flush=True)
    return 0


def _fail(message: str, code: int, wants_json: bool) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    if wants_json:
        print(json.dumps({"error": message}), flush=True)
    return code


def _os_text(problem: OSError) -> str:
    where = f" ({problem.filename})" if problem.filename else ""
    if problem.errno == errno.ENOSPC:
        return (
            f"no space left on the disk{where}. Free some, or choose another folder "
            "with --set run.dir=... or LLMOS_CACHE."
        )
    return f"{problem.strerror}{where}."
