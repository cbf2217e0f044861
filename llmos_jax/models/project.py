"""Multiply activations by a weight, with the gradient in the order memory likes.

B sequences, T tokens. JAX derives a weight's gradient as the transpose of a product; on
CPUs XLA then transposes an activation element by element first, fused with what makes
it. Written out, every product runs as it lies, or on a copy made in tiles.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.models.weight import Held, quantized_product


def project(
    x: jax.Array,
    w: jax.Array | Held,
    *,
    name: str = "projection",
    contract: int = 1,
    bias: jax.Array | None = None,
    beside: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Contract the last `contract` dimensions of x with the first of w.

    Args:
        x: [B, T, *inside].
        w: [*inside, *outside], or what stands for it in few bits.
        name: what remat policies call the result (ir/plan.py, TENSORS).
        contract: how many dimensions `inside` has.
        bias: [*outside], added to every token.
        beside: what else is made of x and added (LoRA's factors).

    Returns:
        [B, T, *outside], in the dtype of x.
    """
    _observe(name, x)
    y = product(x, w, contract)
    if bias is not None:
        y = y + bias[None, None]
    if beside is not None:
        y = y + beside(x)
    return checkpoint_name(y, name)


def product(x: jax.Array, w: jax.Array | Held, contract: int) -> jax.Array:
    """`project` without a name."""
    if isinstance(w, Held):
        assert len(w.inside) == contract, (w.inside, contract)
        return quantized_product(x, w)
    assert x.shape[2:] == w.shape[:contract], (x.shape, w.shape)
    return _project(x, w, contract)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: jax.Array, w: jax.Array, contract: int) -> jax.Array:
    inside = tuple(range(contract))
    return jax.lax.dot_general(x, w, ((tuple(i + 2 for i in inside), inside), ((), ())))


def _forward(
    x: jax.Array, w: jax.Array, contract: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project(x, w, contract), (x, w)


def _backward(
    contract: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    outside = tuple(range(2, dy.ndim))
    in_w = tuple(range(contract, w.ndim))
    dx = jax.lax.dot_general(dy, w, ((outside, in_w), ((), ())))
    dw = jax.lax.platform_dependent(x, dy, cpu=_dw_cpu, default=_dw)
    return dx, dw


def _dw(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, dy, (((0, 1), (0, 1)), ((), ())))


def _dw_cpu(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Keep what makes x out of the transpose: alone, XLA:CPU transposes it in tiles."""
    B, T = x.shape[:2]
    x, dy = jax.lax.optimization_barrier((x, dy))
    inside, outside = x.shape[2:], dy.shape[2:]
    dw = x.reshape(B * T, -1).T @ dy.reshape(B * T, -1)
    return dw.reshape(*inside, *outside)


_project.defvjp(_forward, _backward)


Observer = Callable[[str, jax.Array], None]
"""Takes the name of a product and the activations that go into it."""

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Within it, `observer` is shown what every `project` takes.

    Under jit it is shown tracers, while the function is traced: what is made of them
    must be returned by that function.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def _observe(name: str, x: jax.Array) -> None:
    observer = _observer.get()
    if observer is not None:
        observer(name, x)
