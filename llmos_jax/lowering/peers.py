"""Stop together: when one process of a run is gone, all others say so and stop.

A killed process cannot speak. What the others notice is a closed connection (a CPU), an
endless wait (a TPU), or a C++ abort (the coordination service died with process 0). So
each process beats in the key-value store of JAX's coordination service. Process 0
judges: who has been silent for too long is written down where all look, once a beat. A
process that fails by an error of its own writes itself down. Each of the others then
ends with one `error:` line, from its main thread if that is free within a moment and
from the watching thread if it waits in a collective; exit code 1, no goodbye to JAX,
which would wait for the dead.

Bounds, from death to the last exit: 1.4 * `silence_s` + 3 s, of which 4 beats (a beat
is a tenth of `silence_s`) are for noticing and for telling the others. The death of
process 0 closes the service and is noticed at once. JAX's own heartbeat, at twice
`silence_s`, stands behind this where the host of process 0 vanishes without a word.

NOTE: the watching thread cannot reach what the front door promises of stdout: where it
speaks, `--json` prints nothing.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, Protocol

from llmos_jax.errors import LlmosError, LowerError

_BEATS_A_SILENCE = 10
_GRACE_S = 3.0
"""How long the main thread may take to end by itself; a judgement."""
_STUCK_S = 10.0
"""How long leaving may take (other threads may wait for the dead); a judgement."""
_BEAT, _GONE = "llmos/beat/", "llmos/gone/"
_DONE = "done"

_MARKS = (
    *("Gloo", "NCCL", "onnection closed by peer", "onnection reset"),
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "oordination service", "heartbeat"),
)
"""Words of errors that a collective or a barrier raises when another process is gone:
seen with gloo and the coordination service (jax 0.10.2, 0.12); NCCL's by its name."""


class Store(Protocol):
    """The part of JAX's coordination client that is used here."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        """Write one value for all processes."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Read all (key, value) whose keys begin so."""


class Watch:
    """What one process knows of the others."""

    def __init__(self, store: Store, index: int, count: int, silence_s: float):
        self.advice: Callable[[], str] = _start_again
        self._store, self._index, self._count = store, index, count
        self._silence_s, self._beat_s = silence_s, silence_s / _BEATS_A_SILENCE
        self._lock = threading.Lock()
        self._has_spoken = False
        self._is_leaving = False
        self._ended = threading.Event()
        self._found = threading.Event()
        self._verdict = ""
        self._heard: dict[str, tuple[str, float]] = {}

    def begin(self) -> None:
        """Beat and look, in a thread, until the process ends."""
        now = time.monotonic()
        self._heard = {str(peer): ("", now) for peer in range(self._count)}
        atexit.register(self.end)
        threading.Thread(target=self._beat, daemon=True, name="peers").start()

    def end(self) -> None:
        """Leave in good order: silence means no harm from now on."""
        self._ended.set()
        with suppress(Exception):  # the service may be closed already
            self._store.key_value_set(_BEAT + str(self._index), _DONE, True)

    def lost_service(self) -> NoReturn:
        """End this process: the service, which lives in process 0, is gone."""
        self._set_verdict("0", "stopped answering")
        self._speak_and_leave()

    def explain(self, problem: BaseException) -> LlmosError | None:
        """Judge an error of this process; the one to raise if another is at fault.

        In any case this process leaves without JAX's goodbye when it exits.
        """
        if self._is_leaving:
            return None
        if any(mark in str(problem) for mark in _MARKS):
            self._found.wait(self._silence_s + 3 * self._beat_s)
            if self._found.is_set():
                self._claim_or_sleep()
                self._leave_at_exit(1)
                return LowerError(self._verdict)
        self._claim_or_sleep()
        first = (str(problem).splitlines() or [""])[0][:300]
        reason = f"failed: {first or type(problem).__name__}"
        with suppress(Exception):  # without the service, all others know already
            self._store.key_value_set(_GONE + str(self._index), reason, True)
        self._leave_at_exit(_exit_code(problem))
        return None

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(self._beat_s):
            beats += 1
            try:
                self._store.key_value_set(_BEAT + str(self._index), str(beats), True)
                if self._index == 0:
                    self._judge()
                gone = self._store.key_value_dir_get(_GONE)
            except Exception:  # of many types; all mean that the service is closed
                if self._ended.is_set():
                    return
                gone = [(_GONE + "0", "stopped answering")]
            others = [(_last(key), why) for key, why in gone]
            others = [(peer, why) for peer, why in others if peer != str(self._index)]
            if others:
                self._set_verdict(*others[0])
                time.sleep(_GRACE_S)
                self._speak_and_leave()

    def _judge(self) -> None:
        now = time.monotonic()
        for key, value in self._store.key_value_dir_get(_BEAT):
            before, _ = self._heard[_last(key)]
            if value != before:
                self._heard[_last(key)] = value, now
        for peer, (value, when) in self._heard.items():
            if value != _DONE and now - when > self._silence_s:
                self._store.key_value_set(_GONE + peer, "stopped answering", True)

    def _set_verdict(self, peer: str, why: str) -> None:
        if not self._found.is_set():
            who = f"process {peer} (of {self._count}, counted from 0)"
            self._verdict = f"{who} {why.rstrip('.')}; the run stops. {self.advice()}"
            self._found.set()

    def _claim_or_sleep(self) -> None:
        """Take the right to speak; who comes second waits for the end."""
        with self._lock:
            if not self._has_spoken:
                self._has_spoken = True
                return
        time.sleep(_STUCK_S)
        os._exit(1)

    def _speak_and_leave(self) -> NoReturn:
        self._claim_or_sleep()
        os.write(2, f"error: {self._verdict}\n".encode())  # whole, from any thread
        self._go(1)

    def _leave_at_exit(self, code: int) -> None:
        self._is_leaving = True
        atexit.register(self._go, code)
        bound = threading.Timer(2 * self._beat_s + _STUCK_S, os._exit, (code,))
        bound.daemon = True
        bound.start()

    def _go(self, code: int) -> NoReturn:
        """Exit now; process 0 stays until all others have read what it wrote."""
        if self._index == 0:
            time.sleep(2 * self._beat_s)
        _exit_now(code)


_watch: Watch | None = None


def watch_peers(store: Store, index: int, count: int, silence_s: float) -> None:
    """Begin to watch: once per process, right after it has joined the others."""
    global _watch
    _watch = Watch(store, index, count, silence_s)
    _watch.begin()


def lost_service() -> None:
    """What the coordination client calls when it has lost its service."""
    if _watch is not None:
        _watch.lost_service()


def leave_without_goodbye(code: int = 1) -> None:
    """Skip JAX's shutdown when this process exits: it would wait for the missing."""
    atexit.register(_exit_now, code)


@contextmanager
def shared_fate(advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Whatever ends this block in one process ends all processes of the run.

    One process alone: nothing changes.

    Args:
        advice: how to go on, as a sentence for the error; asked from any thread.

    Raises:
        LowerError: another process is gone, or failed.
    """
    watch = _watch
    if watch is None:
        yield
        return
    before, watch.advice = watch.advice, advice or watch.advice
    try:
        yield
    except BaseException as problem:
        instead = watch.explain(problem)
        if instead is not None:
            raise instead from None
        raise
    finally:
        watch.advice = before


def _start_again() -> str:
    return "Start all processes again."


def _exit_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _last(key: str) -> str:
    return key.rsplit("/", 1)[-1]


def _exit_code(problem: BaseException) -> int:
    if isinstance(problem, KeyboardInterrupt):
        return 130
    return problem.exit_code if isinstance(problem, LlmosError) else 1
