"""Rows travel to their experts and back, all of them, and nothing else does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from llmos_jax.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul
from llmos_jax.models.exchange import (
    Lane,
    Slices,
    arrived,
    bring,
    homeward,
    in_equal_parts,
    outward,
    put_back,
    send,
    spread,
)

E, N, K = 8, 6, 2
"""Experts; tokens of a device; experts of a token."""
WIDTHS: list[tuple[int, ...]] = [(), (3,)]
"""Rows are numbers (weights) or vectors."""


def drawn(X: int) -> np.ndarray:
    """Rows [X, E]: each token wants K different experts."""
    random = np.random.default_rng(X)
    chosen = [random.permutation(E)[:K] for _ in range(X * N)]
    return np.stack(
        [np.bincount(np.concatenate(part), minlength=E) for part in cut(chosen, X)]
    )


def cut(rows: Any, X: int) -> list[Any]:
    size = len(rows) // X
    return [rows[i * size : (i + 1) * size] for i in range(X)]


def all_to(experts: tuple[int, ...], X: int) -> np.ndarray:
    rows_XE = np.zeros((X, E), int)
    rows_XE[:, list(experts)] = N * K // len(experts)
    return rows_XE


ROUTINGS: dict[str, Callable[[int], np.ndarray]] = {
    "drawn": drawn,
    "all to one device": functools.partial(all_to, (2, 3)),
    "none to the first device": functools.partial(all_to, (6, 7)),
    "one expert of each": functools.partial(all_to, (0, 2, 4, 6)),
}
CASES = [(X, name) for X in (2, 4) for name in ROUTINGS] + [(8, "drawn")]


class Case:
    """What every device has, and where it should be once sent: by the definition."""

    def __init__(self, X: int, routing: str, width: tuple[int, ...] = (3,)):
        self.X, self.rows_XE = X, ROUTINGS[routing](X).astype(np.int32)
        self.lane = Lane(("expert",), N * K, N * min(K, E // X))
        total = np.random.default_rng(1).normal(size=(X * N * K, *width))
        self.have = np.stack(cut(total.astype(np.float32), X))

    @property
    def wanted(self) -> np.ndarray:
        """By expert and then by source, zeros after the last."""
        room = np.zeros((self.X, self.X * self.lane.most, *self.have.shape[2:]))
        mine = [
            np.split(rows, np.cumsum(count)[:-1])
            for rows, count in zip(self.have, self.rows_XE, strict=True)
        ]
        for holder, experts in enumerate(cut(range(E), self.X)):
            come = np.concatenate([mine[i][e] for e in experts for i in range(self.X)])
            room[holder, : len(come)] = come
        return room

    def slices(self, made: Callable[..., Slices]) -> list[Slices]:
        rows_XE = jnp.asarray(self.rows_XE)
        every = [made(rows_XE, jnp.int32(device)) for device in range(self.X)]
        return [Slices(*map(np.asarray, one)) for one in every]

    def run(self, function: Callable[..., Any], *given: Any) -> Any:
        """Run on X devices, each with its row of what is given."""
        mesh = Mesh(np.array(jax.devices()[: self.X]), ("expert",))

        def part(*rows: Any) -> Any:
            found = function(*jax.tree.map(lambda row: row[0], rows))
            return jax.tree.map(lambda leaf: leaf[None], found)

        split = PartitionSpec("expert")
        mapped = jax.shard_map(
            part, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
        )
        return jax.jit(mapped)(*given)


def simulated(x: np.ndarray, slices: list[Slices], room: int) -> np.ndarray:
    """`jax.lax.ragged_all_to_all` into zeros, as its documentation has it."""
    X, out = len(slices), np.zeros((len(slices), room, *x.shape[2:]))
    each = len(slices[0].start) // X
    for source, sent in enumerate(slices):
        for at, (start, size, landing, _) in enumerate(zip(*sent, strict=True)):
            target, expert = divmod(at, each)
            assert slices[target].arriving[source * each + expert] == size
            assert landing + size <= room and start + size <= x.shape[1]
            out[target, landing : landing + size] = x[source, start : start + size]
    return out


# --- slices ---


@pytest.mark.parametrize(("X", "routing"), CASES)
def test_slices_take_every_row_to_its_expert_and_back(X: int, routing: str) -> None:
    case = Case(X, routing)
    room = X * case.lane.most
    there = simulated(case.have, case.slices(outward), room)
    np.testing.assert_array_equal(there, case.wanted)
    back = simulated(there, case.slices(homeward), N * K)
    np.testing.assert_array_equal(back, case.have)


@pytest.mark.parametrize("made", [outward, homeward])
@pytest.mark.parametrize(("X", "routing"), CASES)
def test_equal_parts_make_what_the_ragged_exchange_does(
    X: int, routing: str, made: Callable[..., Slices]
) -> None:
    case = Case(X, routing)
    room = X * case.lane.most
    x, to = (case.have, room) if made is outward else (case.wanted, N * K)
    slices = case.slices(made)
    stacked = Slices(*(np.stack(column) for column in zip(*slices, strict=True)))
    run = functools.partial(in_equal_parts, case.lane, room=to)
    found = case.run(run, x.astype(np.float32), stacked)
    np.testing.assert_array_equal(found, simulated(x, slices, to).astype(np.float32))


# --- send and bring ---


def both_ways(case: Case) -> Callable[..., Any]:
    """What arrives, what returns, and the gradients of both."""

    def run(x: jax.Array, dy: jax.Array, y: jax.Array, dx: jax.Array) -> Any:
        rows_XE = jnp.asarray(case.rows_XE)
        there, sent = jax.vjp(lambda x: send(case.lane, x, rows_XE), x)
        back, brought = jax.vjp(lambda y: bring(case.lane, y, rows_XE), y)
        return there, back, sent(dy)[0], brought(dx)[0]

    return run


@pytest.mark.parametrize("width", WIDTHS, ids=["numbers", "vectors"])
@pytest.mark.parametrize(("X", "routing"), CASES)
def test_each_is_the_others_gradient_and_reads_no_row_that_did_not_arrive(
    X: int, routing: str, width: tuple[int, ...]
) -> None:
    case = Case(X, routing, width)
    spoiled = case.wanted.astype(np.float32)
    for device, count in enumerate(case.rows_XE.sum(axis=0).reshape(X, -1).sum(axis=1)):
        spoiled[device, count:] = np.nan
    given = (case.have, spoiled, spoiled, case.have)
    there, back, dx, dy = case.run(both_ways(case), *given)
    for found in (there, dy):
        np.testing.assert_array_equal(found, case.wanted.astype(np.float32))
    for found in (back, dx):
        np.testing.assert_array_equal(found, case.have)


def test_every_expert_knows_how_many_rows_come() -> None:
    case = Case(4, "drawn")
    found = case.run(
        lambda row: arrived(("expert",), row), np.stack([case.rows_XE] * 4)
    )
    np.testing.assert_array_equal(np.ravel(found), case.rows_XE.sum(axis=0))


# --- on a device ---


def test_spread_and_back_have_jaxs_gradients(key: jax.Array) -> None:
    n, k = 5, 3
    order_m = jax.random.permutation(key, n * k)
    place_m = jnp.argsort(order_m)
    x_nD = jax.random.normal(key, (n, 4))
    scale_m1 = jnp.arange(1.0, n * k + 1)[:, None]

    def by_hand(x_nD: jax.Array) -> jax.Array:
        rows = jnp.sin(spread(k, x_nD, order_m, place_m) * scale_m1)
        return jnp.sum(put_back(rows, order_m, place_m) * scale_m1)

    def plain(x_nD: jax.Array) -> jax.Array:
        rows = jnp.sin(jnp.repeat(x_nD, k, axis=0)[order_m] * scale_m1)
        return jnp.sum(jnp.zeros_like(rows).at[order_m].set(rows) * scale_m1)

    found, wanted = (
        jax.value_and_grad(function)(x_nD) for function in (by_hand, plain)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)


# --- rows of no group ---


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_zero_rows_past_the_groups_change_no_row_and_no_gradient(name: str) -> None:
    """What comes out for them may be anything, and nobody reads it."""
    real, spare, sizes = 200, 56, jnp.array([130, 0, 70, 0], jnp.int32)
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, real, 128)).astype(np.float32)
    w = jnp.asarray(random.normal(size=(4, 128, 128)), jnp.float32)

    def outcome(name: str, x: jax.Array, dy: jax.Array) -> Any:
        y, backward = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=name), x, w
        )
        dx, dw = backward(dy)
        return y[:real], dx[:real], dw

    padded = (jnp.pad(part, ((0, spare), (0, 0))) for part in (x, dy))
    found = jax.jit(functools.partial(outcome, name))(*padded)
    wanted = jax.jit(functools.partial(outcome, "reference"))(x, dy)
    for a, b in zip(found, wanted, strict=True):
        atol = 1e-5 * float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
