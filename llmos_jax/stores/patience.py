"""Try again what may work later, at once give up what will not, and say why in a line.

The library (object_store) retries a single request after a 5xx, a 429, a refused or
dropped connection and a time-out, with exponential back-off and jitter. It leaves some:
a body that ends early, a dropped connection under a request that is not idempotent, a
garbled listing. `persist` repeats the whole operation for those, with full jitter
(Brooker 2015, "Exponential Backoff and Jitter", AWS Architecture Blog).
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)

from llmos_jax.errors import StoreError

T = TypeVar("T")

# Judgements. A minute outlives the restart of a gateway and the usual spell of
# SlowDown, and is short enough to wait for in front of a screen.
PATIENCE_S = 60.0
ATTEMPTS = 8
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 8.0
# The slowest line on which an upload is still given time: 1 MB/s.
SLOWEST_BYTES_PER_S = 1e6

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_LATER = {408, 425, 429}


class Refetch(Exception):
    """What arrived is not what was asked for; ask again."""


def patience_s() -> float:
    """Return for how many seconds an operation may be retried.

    Raises:
        StoreError: LLMOS_STORE_PATIENCE_S is not a number above 0.
    """
    return (
        above_0(
            "LLMOS_STORE_PATIENCE_S",
            f"seconds to go on trying, above 0; {PATIENCE_S:.0f} if unset",
        )
        or PATIENCE_S
    )


def above_0(variable: str, wanted: str) -> float | None:
    """Return the number that an environment variable holds; None: it is not set.

    Raises:
        StoreError: it is not a number above 0.
    """
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise StoreError(f"{variable} is {text!r}. Wanted {wanted}.")
    return number


def persist(
    url: str, server: str, operation: Callable[[], T], *, size_bytes: int = 0
) -> T:
    """Run `operation` until it succeeds, fails for good, or patience ends.

    Args:
        url: what it works on, for messages.
        server: where that lies, for messages.
        operation: may be run again from its start; raises what obstore raises, or
            Refetch.
        size_bytes: what it moves; large ones are given more time.

    Raises:
        FileNotFoundError: there is no such object; the caller knows what that means.
        StoreError: everything else, in one line.
    """
    started = time.monotonic()
    deadline = started + patience_s() + size_bytes / SLOWEST_BYTES_PER_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except (BaseError, Refetch, OSError) as problem:
            _raise_if_final(url, server, problem)
            pause_s = random.uniform(
                0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
            )
            if attempt == ATTEMPTS or time.monotonic() + pause_s > deadline:
                waited_s = time.monotonic() - started
                raise StoreError(
                    _exhausted(url, server, problem, attempt, waited_s)
                ) from problem
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def _raise_if_final(url: str, server: str, problem: Exception) -> None:
    """Raise a StoreError (or the FileNotFoundError) where a retry cannot help."""
    text = _head(problem)
    status = _STATUS.search(text)
    code = int(status.group(1)) if status else None
    if "NoSuchUpload" in text:  # its completion was done, but the answer was lost
        return
    if "NoSuchBucket" in text or "The specified bucket does not exist" in text:
        bucket = "/".join(url.split("/")[:3])
        raise StoreError(
            f"there is no bucket {bucket} at {server}. Check its name"
            + (", and AWS_ENDPOINT_URL." if url.startswith("s3") else ".")
        ) from problem
    if isinstance(problem, FileNotFoundError):
        raise problem
    if _asks_for_credentials(text):
        raise StoreError(_no_credentials(url)) from problem
    if isinstance(problem, PermissionDeniedError | UnauthenticatedError) or code in (
        401,
        403,
    ):
        raise StoreError(
            f"access to {url} at {server} is denied ({_said(text) or code or 403}). "
            "Check the keys in use and what they may do; "
            "without the right to list, a missing object looks the same."
        ) from problem
    if isinstance(problem, PreconditionError):
        raise StoreError(
            f"{url} was written anew while it was read. List its folder again."
        ) from problem
    if "redirect" in text or code in (301, 307):
        raise StoreError(
            f"{url} lies in another region than was asked. Set AWS_REGION to the "
            "region of its bucket."
        ) from problem
    final = (InvalidPathError, NotSupportedError, UnknownConfigurationKeyError)
    refused = code is not None and 400 <= code < 500 and code not in _LATER
    if isinstance(problem, final) or refused:
        raise StoreError(
            f"{server} refused {url}: {_said(text) or text[:200]}."
        ) from problem
    if isinstance(problem, OSError) and not isinstance(
        problem, ConnectionError | TimeoutError
    ):
        raise StoreError(
            f"{url} cannot be copied: {problem.strerror or problem}."
        ) from problem


def _exhausted(
    url: str, server: str, problem: Exception, tries: int, waited_s: float
) -> str:
    what = str(problem) if isinstance(problem, Refetch) else _cause(problem)
    return (
        f"{url}: {server} gave no right answer in {waited_s:.0f} s "
        f"({tries} {'try' if tries == 1 else 'tries'}, each with its own repeats): "
        f"{what}. Try later, or raise LLMOS_STORE_PATIENCE_S."
    )


def _head(problem: Exception) -> str:
    """Return the message without the Rust structure that is printed below it."""
    return str(problem).split("\n\nDebug source")[0].strip()


def _cause(problem: Exception) -> str:
    whole = str(problem)
    for sign, words in (
        ("Connection refused", "connection refused"),
        ("dns error", "its name is not known"),
        ("Connection reset", "connection reset"),
        ("IncompleteMessage", "connection closed early"),
        ("TimedOut", "no answer in time"),
        ("Timeout", "no answer in time"),
    ):
        if sign in whole:
            return words
    text = _head(problem)
    said = _said(text)
    status = _STATUS.search(text)
    if said:
        return f"{status.group(1)} {said}" if status else said
    return text.splitlines()[0][-200:] if text else type(problem).__name__


def _said(text: str) -> str:
    """Return `Code: Message` of an S3 error body, or ""."""
    code = re.search(r"<Code>([^<]*)</Code>", text)
    message = re.search(r"<Message>([^<]*)</Message>", text)
    return ": ".join(found.group(1).strip(". ") for found in (code, message) if found)


def _asks_for_credentials(text: str) -> bool:
    """Whether it failed at the service that gives a cloud machine its keys."""
    asked = ("/latest/api/token", "/latest/meta-data", "/computeMetadata/")
    return any(sign in text for sign in asked)


def _no_credentials(url: str) -> str:
    if url.startswith("gs"):
        return (
            f"no credentials for {url}. Set GOOGLE_APPLICATION_CREDENTIALS to a "
            "service account's file, or GOOGLE_SKIP_SIGNATURE=true for a public bucket."
        )
    return (
        f"no credentials for {url}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "or AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for a public bucket."
    )
