"""What the laws of attention are stated with: arrays, the definition once more, and
outputs with gradients, whoever computes them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.kernels.attention import PLAIN, Score, cpu

Attend = Callable[..., jax.Array]

RELATIVE = 1e-5
"""Of the largest entry, in float32: sums of some hundred terms in another order, and a
polynomial for exp, differ by 2e-6 at most over the shapes of these tests."""

ABSOLUTE = 1e-6
"""Beside entries of about 1: what two equal products may leave where one key is seen
and the gradients of q and k are 0."""


def available(name: str) -> str:
    if name == "cpu" and (reason := cpu.unavailable()):
        pytest.skip(reason)
    return name


def inputs(shape: tuple[int, ...], key: jax.Array) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output."""
    B, T, S, N, K, H = shape
    q, dout = jax.random.normal(key, (2, B, T, N, H))
    k, v = jax.random.normal(jax.random.fold_in(key, 1), (2, B, S, K, H))
    return q, k, v, dout


def last_positions(shape: tuple[int, ...]) -> jax.Array:
    """The T queries stand at the end of the S keys."""
    B, T, S, *_ = shape
    return jnp.broadcast_to(jnp.arange(S - T, S)[None, :], (B, T))


def square(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As many keys as queries."""
    B, T, N, K, H = shape
    return B, T, T, N, K, H


def angles(B: int, T: int, H: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cos and sin of any angles."""
    angle = jax.random.uniform(key, (B, T, H // 2), maxval=7.0)
    return jnp.cos(angle), jnp.sin(angle)


def documents(shape: tuple[int, ...]) -> np.ndarray:
    """Documents of 1, 2, 3, ... tokens, numbered from -1; others in each sequence."""
    B, T = shape[:2]
    numbers = np.repeat(np.arange(T), np.arange(1, T + 1))
    rows = [numbers[7 * b : 7 * b + T] for b in range(B)]
    return np.stack(rows).astype(np.int32) - 1


def definition(q, k, v, position, segment=None, score: Score = PLAIN) -> np.ndarray:
    """Written once more, in float64 and loops."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out, G = np.zeros((B, T, N, H)), N // k.shape[2]
    for b, t, n in np.ndindex(B, T, N):
        seen = np.arange(int(position[b, t]) + 1)
        if score.window is not None:
            seen = seen[-score.window :]
        if segment is not None:
            seen = seen[segment[b, seen] == segment[b, t]]
        logits = k[b, seen, n // G] @ q[b, t, n]
        logits = logits / np.sqrt(H) if score.scale is None else logits * score.scale
        if score.softcap is not None:
            logits = score.softcap * np.tanh(logits / score.softcap)
        weights = np.exp(logits)
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // G]
    return out


def results(attend: Attend, *arrays: jax.Array) -> list[jax.Array]:
    """The output, and the gradients of q, k and v; the last array is the cotangent."""

    @jax.jit
    def run(*arrays: jax.Array) -> list[jax.Array]:
        *operands, dout = arrays
        out, pull = jax.vjp(attend, *operands)
        return [out, *pull(dout)]

    return run(*arrays)


def assert_near(
    got: list[jax.Array],
    expected: list[jax.Array],
    relative: float = RELATIVE,
    absolute: float = 0.0,
) -> None:
    """Within `relative` of the largest entry of each, and `absolute` besides."""
    for a, b in zip(got, expected, strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b, rtol=0, atol=relative * scale + absolute
        )


def assert_close(
    got: list[jax.Array], expected: list[jax.Array], relative: float = RELATIVE
) -> None:
    """Within `relative` of the largest entry of each, or ABSOLUTE."""
    assert_near(got, expected, relative, ABSOLUTE)
