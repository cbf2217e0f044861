"""Run the serving programs: a prompt becomes chunks, a batch becomes dispatches.

Whoever holds a state hands it over and gets the next one back: its arrays are donated.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llmos_jax.serving.forward import Forward, Weights
from llmos_jax.serving.sampler import Needs
from llmos_jax.serving.step import (
    Chunk,
    DecodeState,
    Row,
    Rows,
    empty_state,
    programs,
    rows_on_device,
)

LONGEST_CHUNK = 512
"""Tokens of a prompt that one dispatch takes: enough for the weights to be read rarely,
few enough for activations to stay small."""
SHORTEST_CHUNK = 16
SHORTEST_SLOT = 128


class Runner:
    """A model's programs and parameters."""

    def __init__(
        self,
        model: Forward,
        params: Weights,
        *,
        vocab_size: int,
        longest_chunk: int = LONGEST_CHUNK,
    ):
        """Take a model; programs compile when they are first needed.

        Args:
            model: what the programs trace.
            params: as the model wants them.
            vocab_size: of the logits.
            longest_chunk: a power of two, at least SHORTEST_CHUNK.
        """
        self._model, self._params = model, params
        self.longest_chunk = longest_chunk
        self._sharding = _sharding_of(params)
        self._programs = programs(model, vocab_size, self._sharding)

    def slot_length(self, tokens: int, context: int) -> int:
        """Places of a slot for so many tokens of a model with this context.

        They are a power of two or a multiple of the longest chunk, so that the padding
        of no chunk reaches over the end.
        """
        most = -(-context // self.longest_chunk) * self.longest_chunk
        return min(max(SHORTEST_SLOT, power_of_two(tokens)), most)

    def empty_state(self, slots: int, length: int) -> DecodeState:
        """Room for `slots` sequences in slots of a `slot_length`."""
        state = empty_state(self._model, slots, length)
        if self._sharding is None:
            return state
        placed: DecodeState = jax.device_put(state, self._sharding)
        return placed

    def prefill(
        self, state: DecodeState, slot: int, prompt: np.ndarray, row: Row, needs: Needs
    ) -> tuple[DecodeState, int]:
        """Put a prompt into a slot, in chunks; return the first token after it."""
        token_1 = None
        for start in range(0, len(prompt), self.longest_chunk):
            state, token_1 = self.prefill_chunk(state, slot, prompt, start, row, needs)
        assert token_1 is not None, "an empty prompt"
        return state, int(token_1[0])

    def prefill_chunk(
        self,
        state: DecodeState,
        slot: int,
        prompt: np.ndarray,
        start: int,
        row: Row,
        needs: Needs,
    ) -> tuple[DecodeState, jax.Array]:
        """Put the next tokens of a prompt, from `start` on, into a slot.

        Until the prompt is whole, decode must see its row as FREE. Returns int32 [1]:
        the first token after the last chunk, NO_TOKEN before.
        """
        part = prompt[start : start + self.longest_chunk]
        tokens_1T = np.zeros(
            (1, max(SHORTEST_CHUNK, power_of_two(len(part)))), np.int32
        )
        tokens_1T[0, : len(part)] = part
        chunk = Chunk(
            tokens=tokens_1T,
            start=np.int32(start),
            length=np.int32(len(part)),
            is_last=np.bool_(start + len(part) == len(prompt)),
        )
        rows = rows_on_device(
            [row], needs, slots=None if len(state.position) == 1 else [slot]
        )
        return self._programs.prefill(self._params, state, chunk, rows)

    def decode(
        self, state: DecodeState, rows: Rows, *, steps: int, fewest: int = 1
    ) -> tuple[DecodeState, np.ndarray]:
        """Run up to `steps` steps, while at least `fewest` rows run.

        The tokens are int32 [B, MOST_STEPS], as `step.Programs.decode` says. No steps
        at all change nothing; what has to be compiled is, then.
        """
        state, tokens_BK = self._programs.decode(
            self._params, state, rows, np.int32(steps), np.int32(fewest)
        )
        return state, np.asarray(tokens_BK)


def power_of_two(count: int) -> int:
    """The next power of two, or the number itself."""
    return 1 << (count - 1).bit_length()


def _sharding_of(params: Weights) -> NamedSharding | None:
    """Where the state lives if parameters are split over a mesh: a copy on each device.

    None: on the one device that has the parameters.
    """
    some: Any = jax.tree.leaves(params)[0].sharding
    if not isinstance(some, NamedSharding) or some.mesh.size == 1:
        return None
    return NamedSharding(some.mesh, PartitionSpec())
