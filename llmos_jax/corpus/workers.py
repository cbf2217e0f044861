"""Do pieces of work in processes of their own and take the results in order.

Processes, not threads: what tokenizers and ftfy return passes through Python. Each is
forked from a server that has imported this room once and has no threads; when the
process that asked dies, however it dies, they end too.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from llmos_jax.errors import DataError

Work = TypeVar("Work")
Result = TypeVar("Result")

_AHEAD = 3
"""Pieces under way for each worker: one that is done and waits its turn, one in work,
one that waits."""


def num_workers(asked: int | None) -> int:
    """Return how many processes to use: one for each core that this one may use."""
    if asked is not None and asked < 1:
        raise DataError(f"prepare.workers is {asked}; it must be at least 1.")
    return asked or len(os.sched_getaffinity(0))


def in_order(
    do: Callable[[Work], Result],
    pieces: Iterable[Work],
    workers: int,
    begin: Callable[..., None] | None = None,
    *arguments: Any,
) -> Iterator[tuple[Work, Result]]:
    """Yield (piece, result) in the order of the pieces, which are read as needed.

    Args:
        do: a function of a module; its errors are raised here, in order.
        pieces: plain data.
        workers: processes.
        begin: called once in each process, with `arguments`.

    Raises:
        DataError: a process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmos_jax.corpus.sift", "llmos_jax.corpus.jobs"])
    pool = ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(begin, arguments)
    )
    waiting: deque[tuple[Work, Future[Result]]] = deque()
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(do, piece)))
            if len(waiting) >= _AHEAD * workers:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps for want of memory. Start again with "
            "fewer (prepare.workers): what is done stays done."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each process
    if begin is not None:
        begin(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
