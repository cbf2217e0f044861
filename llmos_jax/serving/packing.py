"""Many small arrays as one: what a step is told of its rows, in one transfer.

Every array becomes int32 words in one vector; the program takes it apart again by
shapes that it was compiled for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORDS = (np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.float32))
"""What packs: dtypes of 32 bits."""


def packed(tree: Any) -> np.ndarray:
    """Return int32 [words] of a pytree of numpy arrays with dtypes of WORDS."""
    leaves = jax.tree.leaves(tree)
    assert all(leaf.dtype in WORDS for leaf in leaves), [leaf.dtype for leaf in leaves]
    return np.concatenate([leaf.ravel().view(np.int32) for leaf in leaves])


def unpacked(words: jax.Array, like: Any) -> Any:
    """Take a vector apart.

    Args:
        words: int32, of `packed`.
        like: a pytree of arrays or ShapeDtypeStructs, as it was packed.
    """
    leaves, structure = jax.tree.flatten(like)
    bounds = np.cumsum([0, *(leaf.size for leaf in leaves)])
    assert words.shape == (bounds[-1],), (words.shape, bounds[-1])
    return jax.tree.unflatten(structure, _parts(words, leaves, bounds.tolist()))


def _parts(words: jax.Array, leaves: Sequence[Any], bounds: list[int]) -> list[Any]:
    made = []
    for leaf, begin, end in zip(leaves, bounds, bounds[1:]):
        part = words[begin:end].reshape(leaf.shape)
        if leaf.dtype != jnp.int32:
            part = jax.lax.bitcast_convert_type(part, leaf.dtype)
        made.append(part)
    return made
