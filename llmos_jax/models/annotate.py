"""Name the dimensions of an activation; whoever lowers the model decides what follows.

A module calls `annotate(x_BTD, "batch", "seq", "embed")` and knows nothing of meshes.
By default that does nothing. While lowering traces a model it installs a function that
turns the names into a sharding constraint, resolved strictly from the plan's rules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax

Annotator = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

_annotator: ContextVar[Annotator | None] = ContextVar("annotator", default=None)


def annotate(x: jax.Array, *axes: str | None) -> jax.Array:
    """Return `x`, constrained by whatever the surrounding lowering installed."""
    assert x.ndim == len(axes), (x.shape, axes)
    annotator = _annotator.get()
    return x if annotator is None else annotator(x, axes)


@contextlib.contextmanager
def annotated_by(annotator: Annotator) -> Iterator[None]:
    """Install `annotator` while a model is traced."""
    token = _annotator.set(annotator)
    try:
        yield
    finally:
        _annotator.reset(token)
