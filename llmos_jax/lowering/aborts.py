"""Turn the abort of JAX's coordination client into a call of ours.

When the coordination service fails, or a process falls silent, the client's C++ thread
calls `missed_heartbeat_callback`. JAX passes none, so it prints a C++ stack trace and
aborts. Passing one from Python is possible and half broken in jax 0.10.2 and 0.12: the
status that it is to be called with has no Python type, so the call throws
`std::bad_cast`, which nobody catches, and `std::terminate` runs. That is where our
function is called, and only for that exception.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from jaxlib import _jax as library

_BAD_CAST = b"St8bad_cast"
"""`typeid(std::bad_cast).name()` in the Itanium C++ ABI, that of GNU's library."""

_kept_alive: list[Any] = []
"""What C++ holds a pointer to."""


@contextmanager
def failures_told_to(on_failure: Callable[[], None]) -> Iterator[None]:
    """Have the coordination client that is made meanwhile call `on_failure`.

    It is called on a thread of C++, and must end the process.

    NOTE: `jax.distributed.initialize` has no argument for this, so the factory it calls
    is replaced while it runs. A jax that passes a callback of its own keeps it.
    """
    _call_at_bad_cast(on_failure)
    factory = library.get_distributed_runtime_client

    def callback(*status: object) -> None:
        on_failure()

    library.get_distributed_runtime_client = partial(
        factory, missed_heartbeat_callback=callback
    )
    try:
        yield
    finally:
        library.get_distributed_runtime_client = factory


def _call_at_bad_cast(on_failure: Callable[[], None]) -> None:
    """Call a function where an uncaught `std::bad_cast` would end the process.

    Without GNU's C++ library there is nothing to hook, and JAX's abort stays.
    """
    with suppress(OSError, AttributeError):
        name = ctypes.util.find_library("stdc++") or "libstdc++.so.6"
        _install(ctypes.CDLL(name), on_failure)


def _install(cpp: ctypes.CDLL, on_failure: Callable[[], None]) -> None:
    signature = ctypes.CFUNCTYPE(None)
    current = cpp.__cxa_current_exception_type
    current.restype = ctypes.c_void_p
    replace = cpp._ZSt13set_terminatePFvvE
    replace.restype, replace.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def terminate() -> None:
        if _type_name(current()) == _BAD_CAST:
            on_failure()
        before()

    handler = signature(terminate)
    before = signature(replace(ctypes.cast(handler, ctypes.c_void_p)))
    _kept_alive.append(handler)


def _type_name(type_info: int | None) -> bytes | None:
    """The name in a `std::type_info`: its second word, after the table of methods."""
    if not type_info:
        return None
    words = ctypes.cast(type_info, ctypes.POINTER(ctypes.c_char_p))
    return words[1]
