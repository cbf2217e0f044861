"""Name the dimensions of an activation; whoever lowers the model decides what follows.

A module calls `annotate(x_BTD, "batch", "seq", "embed")` and knows nothing of meshes.
By default that does nothing. While lowering traces a model it installs a Sharder that
turns the names into a sharding constraint, resolved strictly from the plan's rules.
`per_shard` is for what a partitioner cannot split by itself (a kernel, a loop that
sums): each device runs the function on its own part. `along` does so for some mesh axes
only (the stages of a pipeline, replicas that learn alone): inside it, annotations mean
the other axes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import jax

Axes = tuple[str | None, ...]
"""One logical axis per dimension; None is a dimension that nothing splits."""


class Stored(tuple[str | None, ...]):
    """The logical axes of a weight as it is stored: split as the rules split weights,
    not gathered for use."""

    __slots__ = ()


class Sharder(Protocol):
    """What lowering installs: it knows the mesh and the rules."""

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Return `x` with the sharding that its axes have."""

    def per_shard(
        self,
        function: Callable[..., Any],
        arrays: tuple[jax.Array, ...],
        in_axes: tuple[Axes, ...],
        out_axes: Any,
    ) -> Any:
        """Run `function` on every device's parts of `arrays`."""

    def along(
        self,
        mesh_axes: tuple[str, ...],
        function: Callable[..., Any],
        arrays: tuple[Any, ...],
        in_split: tuple[Any, ...],
        out_split: Any,
    ) -> Any:
        """Run `function` once per position along `mesh_axes`."""

    def mesh_axes(self, axis: str, size: int, stored: bool) -> tuple[str, ...]:
        """Mesh axes that split a logical axis of an activation, or of a weight."""

    def ways(self, mesh_axes: tuple[str, ...]) -> int:
        """Devices along mesh axes."""


_sharder: ContextVar[Sharder | None] = ContextVar("sharder", default=None)


def annotate(x: jax.Array, *axes: str | None) -> jax.Array:
    """Return `x`, constrained by whatever the surrounding lowering installed."""
    assert x.ndim == len(axes), (x.shape, axes)
    sharder = _sharder.get()
    return x if sharder is None else sharder.constrain(x, axes)


def per_shard(
    function: Callable[..., Any],
    *arrays: jax.Array,
    in_axes: tuple[Axes, ...],
    out_axes: Any,
) -> Any:
    """Return `function(*arrays)`, each device working on its part.

    Args:
        function: takes and returns parts. Where it needs a sum over devices it asks
            `mesh_axes_of` which mesh axes an axis lies on.
        arrays: whole arrays.
        in_axes: the logical axes of each; Stored for a weight as it lies.
        out_axes: a tree like the result, of Axes (or Stored); each axis occurs in
            `in_axes`.
    """
    assert len(arrays) == len(in_axes), (len(arrays), in_axes)
    sharder = _sharder.get()
    if sharder is None:
        return function(*arrays)
    return sharder.per_shard(function, arrays, in_axes, out_axes)


def along(
    mesh_axes: tuple[str, ...],
    function: Callable[..., Any],
    *arrays: Any,
    in_split: tuple[Any, ...],
    out_split: Any,
) -> Any:
    """Return `function(*arrays)`, run once per position along `mesh_axes`.

    Over those axes the function's collectives are its own business (`jax.lax.psum` and
    the like); over all others it is partitioned as its annotations say.

    Args:
        mesh_axes: e.g. ("stage",).
        function: takes and returns the parts of one position.
        arrays: trees of whole arrays.
        in_split: for each, a tree prefix of PartitionSpecs that name `mesh_axes` only.
        out_split: the same of the result; what is not split must be equal at all
            positions.
    """
    assert len(arrays) == len(in_split), (len(arrays), in_split)
    sharder = _sharder.get()
    assert sharder is not None, "along() is for what lowering traces"
    return sharder.along(mesh_axes, function, arrays, in_split, out_split)


def mesh_axes_of(axis: str, size: int, *, stored: bool = False) -> tuple[str, ...]:
    """Mesh axes over which a logical axis of `size` is split; () outside lowering.

    Args:
        axis: of an activation, or of a weight if `stored`.
        size: of the whole axis.
        stored: as weights lie in memory, before they are gathered for use.
    """
    sharder = _sharder.get()
    return () if sharder is None else sharder.mesh_axes(axis, size, stored)


def ways_of(axis: str, size: int) -> int:
    """Parts into which a logical axis of an activation is split; 1 outside lowering."""
    sharder = _sharder.get()
    return 1 if sharder is None else sharder.ways(sharder.mesh_axes(axis, size, False))


@contextlib.contextmanager
def annotated_by(sharder: Sharder) -> Iterator[None]:
    """Install `sharder` while a model is traced."""
    token = _sharder.set(sharder)
    try:
        yield
    finally:
        _sharder.reset(token)
