"""Many processes serve as one: the first decides, the others do as it does.

A program over devices of many processes runs when all of them call it. The first
process plans and, before it sends a step, leaves the step's words in the key-value
store of JAX's coordination service; the others wait for them there and send the same
step. Nothing else differs: all have the same programs, parameters and pages.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed

from llmos_jax.serving.shapes import Shape

_KEY = "llmos/steps/{}"
_LOOK_MS = 1000
"""Between looks at whether there is anything to do."""
_READY_MS = 3_600_000
"""For all to have their programs: the largest models compile for minutes."""
_KEPT = 64
"""Steps whose words stay in the store: more than are ever under way."""


class Leader:
    """The first process: it leaves word of every step."""

    def __init__(self) -> None:
        self._client: Any = distributed.global_state.client
        self._number = 0

    def tell(self, shape: Shape | None, words: np.ndarray | None) -> None:
        """Have the others send this step; None: the end."""
        if jax.process_count() == 1:
            return
        said = pickle.dumps((shape, words))
        self._client.key_value_set_bytes(_KEY.format(self._number), said)
        # All took part in a step that is done, so they have read its words.
        if self._number >= _KEPT:
            self._client.key_value_delete(_KEY.format(self._number - _KEPT))
        self._number += 1


def follow(send: Callable[[Shape, np.ndarray], None]) -> None:
    """Send what the first process sends, until it ends."""
    client: Any = distributed.global_state.client
    for number in itertools.count():
        shape, words = pickle.loads(_next(client, _KEY.format(number)))
        if shape is None:
            return
        send(shape, words)


def _next(client: Any, key: str) -> bytes:
    while True:
        try:
            found: bytes = client.blocking_key_value_get_bytes(key, _LOOK_MS)
        except jax.errors.JaxRuntimeError as problem:
            if "DEADLINE_EXCEEDED" not in str(problem):
                raise
        else:
            return found


def wait_for_all() -> None:
    """Block until every process has come here."""
    if jax.process_count() > 1:
        client: Any = distributed.global_state.client
        client.wait_at_barrier("llmos/ready", _READY_MS)
