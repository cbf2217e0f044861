"""Say which arrays lie in a checkpoint, and read them, without knowing its model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from llmos_jax.checkpoint.explain import explained


class Stored(NamedTuple):
    """One array as it lies on the disk."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def stored_arrays(folder: Path, item: str) -> dict[str, Stored]:
    """What an item of checkpoint `folder` holds, by dotted name; reads no array.

    Raises:
        CheckpointError: its index cannot be read.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(_tree(folder, item))
    return {
        ".".join(_word(key) for key in path): Stored(tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in flat
    }


def read_all(folder: Path, item: str) -> None:
    """Read every array of an item to the host, one item at a time.

    Raises:
        CheckpointError: one cannot be read.
    """
    tree = _tree(folder, item)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with explained(f"checkpoint {folder} cannot be read"):
        ocp.PyTreeCheckpointHandler().restore(
            folder / item, args=ocp.args.PyTreeRestore(tree, restore_args=as_numpy)
        )


def _tree(folder: Path, item: str) -> Any:
    with explained(f"checkpoint {folder} cannot be read"):
        found = ocp.PyTreeCheckpointHandler().metadata(folder / item)
        return getattr(found, "tree", found)


def _word(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
