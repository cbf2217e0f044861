"""Deal layers out to pipeline stages in rounds, from where they are stored.

A stage stores consecutive layers: R chunks, of the P R of the model. A circular
pipeline wants every P-th chunk there. So before a step chunks change places, and their
gradients go back; checkpoints keep the order that every other reader has. Each stage
has R chunks to send and R to get, so R collective permutes do it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "stage"


def dealt(x: jax.Array, rounds: int) -> jax.Array:
    """Return this stage's chunks [R, l, ...]: the (r P + stage)-th of the model.

    Args:
        x: the layers stored here, [R l, ...]; inside `along(("stage",), ...)`.
        rounds: R.
    """
    at = jax.lax.axis_index(AXIS)
    chunks = x.reshape(rounds, x.shape[0] // rounds, *x.shape[1:])
    got = jnp.zeros_like(chunks)
    for to, sent, placed in _permutes(jax.lax.axis_size(AXIS), rounds):
        chunk = jax.lax.dynamic_index_in_dim(
            chunks, jnp.asarray(sent)[at], keepdims=False
        )
        chunk = jax.lax.ppermute(chunk, AXIS, list(enumerate(to)))
        got = jax.lax.dynamic_update_index_in_dim(
            got, chunk, jnp.asarray(placed)[at], axis=0
        )
    return got


Permute = tuple[tuple[int, ...], np.ndarray, np.ndarray]
"""Where each stage sends, which of its chunks, and the slot of what it gets."""


@functools.cache
def _permutes(P: int, R: int) -> tuple[Permute, ...]:
    """R permutations that bring every chunk to its stage."""
    left: list[dict[int, list[int]]] = [{} for _ in range(P)]
    for chunk in range(P * R):
        left[chunk // R].setdefault(chunk % P, []).append(chunk)
    found = []
    for _ in range(R):
        to = _matching(left)
        chunks = [left[source][goal].pop() for source, goal in enumerate(to)]
        for source, goal in enumerate(to):
            if not left[source][goal]:
                del left[source][goal]
        placed = np.zeros(P, np.int32)
        placed[list(to)] = [chunk // P for chunk in chunks]
        found.append((to, np.array([c % R for c in chunks], np.int32), placed))
    return tuple(found)


def _matching(left: list[dict[int, list[int]]]) -> tuple[int, ...]:
    """One goal for each source, all different: there is one, for every source has as
    many chunks left as every goal still wants (Hall's theorem)."""
    source_of: dict[int, int] = {}

    def place(source: int, seen: set[int]) -> bool:
        for goal in left[source]:
            if goal not in seen:
                seen.add(goal)
                if goal not in source_of or place(source_of[goal], seen):
                    source_of[goal] = source
                    return True
        return False

    for source in range(len(left)):
        assert place(source, set()), left
    return tuple(goal for goal, _ in sorted(source_of.items(), key=lambda kv: kv[1]))
