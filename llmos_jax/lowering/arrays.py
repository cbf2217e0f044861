"""Move batches from this process's memory onto the mesh, and numbers back.

B sequences of a global batch are split over the `data` and `fsdp` axes. A process needs
exactly the rows its own devices hold, which may overlap with other processes' rows when
`tensor` crosses them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


def local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> list[int]:
    """Global row numbers of a [B, ...] array that this process's devices hold."""
    rows: set[int] = set()
    for index in sharding.addressable_devices_indices_map(shape).values():
        assert index is not None
        rows.update(range(*index[0].indices(shape[0])))
    return sorted(rows)


def global_array(
    local: np.ndarray, rows: list[int], sharding: NamedSharding, num_rows: int
) -> jax.Array:
    """Make a global [num_rows, ...] array from the rows this process read.

    Args:
        local: [len(rows), ...] values of `rows`, in order.
        rows: what `local_rows` returned for the same sharding.
        sharding: of the global array.
        num_rows: global rows.
    """
    shape = (num_rows, *local.shape[1:])
    place = {row: position for position, row in enumerate(rows)}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        wanted = [place[row] for row in range(*index[0].indices(num_rows))]
        return local[wanted][(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, shard)


def placed(value: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, laid out over all their devices."""
    whole = np.asarray(value)
    return jax.make_array_from_callback(
        whole.shape, sharding, lambda index: whole[index]
    )


def fetch(value: jax.Array) -> np.ndarray:
    """A replicated device value as a host array; blocks until it is computed."""
    return np.asarray(value.addressable_data(0))
