"""Move rows to the experts that want them, and back: on a device and between devices.

n tokens, k experts each and m = n k rows (assignments) of one device; E experts, spread
over X devices; M rows of room on a device for those that may arrive.

`spread` puts a device's rows in the order of their experts, `put_back` undoes it.
`send` moves ordered rows to the devices that hold their experts, where they again lie
by expert, and those of one expert by source; `bring` returns them. Nothing is dropped:
there is room for the worst case, and rows past those that arrived are zeros. Gradients
are written out, as lookups and as exchanges the other way; JAX's own are scatters.

A slice is what one device sends for one expert. Once every device knows the size of
every slice (`counted`), where it lies at both ends is a sum. XLA's ragged all-to-all
takes slices from anywhere and lands them anywhere, so no row moves but by it. XLA:CPU
has none (jax-ml/jax issue 34755): there slices travel in parts of equal size.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmos_jax.kernels.target import current_target

# --- between devices ---


class Lane(NamedTuple):
    """What is known of an exchange before tokens are routed."""

    axes: tuple[str, ...]
    """Mesh axes that experts are spread over, major first."""
    rows: int
    """m, which every device sends."""
    most: int
    """Rows that one device may send to one, itself included."""


class Slices(NamedTuple):
    """One device's side of an exchange, as `jax.lax.ragged_all_to_all` wants it: by
    device at the other end, then by expert."""

    start: jax.Array
    """Row of each slice that leaves."""
    size: jax.Array
    landing: jax.Array
    """Row where it is to lie at the other end."""
    arriving: jax.Array
    """Size of each slice that comes."""


def lane_of(axes: tuple[str, ...], n: int, k: int, E: int) -> Lane:
    """The exchange of n tokens of each device, each with k different experts of E."""
    return Lane(axes, n * k, n * min(k, E // jax.lax.axis_size(axes)))


def counted(axes: tuple[str, ...], count_E: jax.Array) -> jax.Array:
    """Rows [X, E] of each device for each expert, from this device's [E]."""
    return jax.lax.all_gather(count_E, axes)


def arrived(axes: tuple[str, ...], rows_XE: jax.Array) -> jax.Array:
    """Rows that `send` brings for each of this device's experts [E / X]."""
    arriving = outward(rows_XE, jax.lax.axis_index(axes)).arriving
    return jnp.sum(arriving.reshape(rows_XE.shape[0], -1), axis=0)


def outward(rows_XE: jax.Array, device: jax.Array) -> Slices:
    """Slices from the ordered rows of `device` to the experts of all."""
    landing_XE, arriving = _landing(rows_XE), _held(rows_XE, device)
    return Slices(
        _leaving(rows_XE)[device], rows_XE[device], landing_XE[device], arriving
    )


def homeward(rows_XE: jax.Array, device: jax.Array) -> Slices:
    """The same slices from the experts of `device` back to the rows of all."""
    start, size = _held(_landing(rows_XE), device), _held(rows_XE, device)
    return Slices(start, size, _held(_leaving(rows_XE), device), rows_XE[device])


def _leaving(rows_XE: jax.Array) -> jax.Array:
    """Where each device's ordered rows for each expert start."""
    return jnp.cumsum(rows_XE, axis=1) - rows_XE


def _landing(rows_XE: jax.Array) -> jax.Array:
    """Where each device's rows start among all that the holder of an expert gets."""
    total_Xe = jnp.sum(rows_XE, axis=0).reshape(rows_XE.shape[0], -1)
    start_E = (jnp.cumsum(total_Xe, axis=1) - total_Xe).reshape(-1)
    return start_E[None, :] + jnp.cumsum(rows_XE, axis=0) - rows_XE


def _held(table_XE: jax.Array, device: jax.Array) -> jax.Array:
    """The columns of the experts of `device`, row after row."""
    X, E = table_XE.shape
    e = E // X
    return jax.lax.dynamic_slice_in_dim(table_XE, device * e, e, axis=1).reshape(E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(lane: Lane, x_m: jax.Array, rows_XE: jax.Array) -> jax.Array:
    """Return the rows that arrive here, by expert; x_m are this device's, by expert.

    Rows may be numbers or vectors. Room M is X * lane.most; the rest is zeros.
    """
    slices = outward(rows_XE, jax.lax.axis_index(lane.axes))
    return _exchanged(lane, x_m, slices, rows_XE.shape[0] * lane.most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def bring(lane: Lane, y_M: jax.Array, rows_XE: jax.Array) -> jax.Array:
    """Return what became of this device's m rows, as they lay before `send`.

    Rows of y_M past those that arrived are never read.
    """
    slices = homeward(rows_XE, jax.lax.axis_index(lane.axes))
    return _exchanged(lane, y_M, slices, lane.rows)


def _send_forward(
    lane: Lane, x_m: jax.Array, rows_XE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return send(lane, x_m, rows_XE), rows_XE


def _send_backward(
    lane: Lane, rows_XE: jax.Array, dy_M: jax.Array
) -> tuple[jax.Array, None]:
    return bring(lane, dy_M, rows_XE), None


def _bring_forward(
    lane: Lane, y_M: jax.Array, rows_XE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return bring(lane, y_M, rows_XE), rows_XE


def _bring_backward(
    lane: Lane, rows_XE: jax.Array, dx_m: jax.Array
) -> tuple[jax.Array, None]:
    return send(lane, dx_m, rows_XE), None


send.defvjp(_send_forward, _send_backward)
bring.defvjp(_bring_forward, _bring_backward)


def _exchanged(lane: Lane, x: jax.Array, slices: Slices, room: int) -> jax.Array:
    """`room` rows with the slices that come where they land, zeros elsewhere."""
    if current_target().platform == "cpu":
        return in_equal_parts(lane, x, slices, room)
    out = jnp.zeros((room, *x.shape[1:]), x.dtype)
    made: jax.Array = jax.lax.ragged_all_to_all(x, out, *slices, axis_name=lane.axes)
    return made


def in_equal_parts(lane: Lane, x: jax.Array, slices: Slices, room: int) -> jax.Array:
    """What the ragged all-to-all makes of the same slices, from portable parts.

    The slices for one device are packed into one part of `lane.most` rows.
    """
    X = jax.lax.axis_size(lane.axes)
    swap = functools.partial(
        jax.lax.all_to_all, axis_name=lane.axes, split_axis=0, concat_axis=0, tiled=True
    )
    packed = _in_parts(slices.size, X, lane.most)
    parts = _moved(x, slices.start, slices.size, packed, X * lane.most)
    came = _in_parts(slices.arriving, X, lane.most)
    landed = swap(slices.landing)
    return _moved(swap(parts), came, slices.arriving, landed, room)


def _in_parts(size: jax.Array, X: int, most: int) -> jax.Array:
    """Where slices start, packed one after the other into X parts of `most` rows."""
    size_Xe = size.reshape(X, -1)
    part_X1 = jnp.arange(X, dtype=jnp.int32)[:, None] * most
    return (part_X1 + jnp.cumsum(size_Xe, axis=1) - size_Xe).reshape(-1)


def _moved(
    x: jax.Array, start: jax.Array, size: jax.Array, landing: jax.Array, room: int
) -> jax.Array:
    """`room` rows with each slice of x where it lands, zeros elsewhere."""
    past_rs = jnp.arange(room, dtype=jnp.int32)[:, None] - landing[None, :]
    is_in_rs = (past_rs >= 0) & (past_rs < size[None, :])
    from_r = jnp.sum(jnp.where(is_in_rs, past_rs + start[None, :], 0), axis=1)
    is_in_r = jnp.any(is_in_rs, axis=1).reshape(room, *[1] * (x.ndim - 1))
    return jnp.where(is_in_r, x[from_r], 0)


# --- on a device ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread(k: int, x: jax.Array, order_m: jax.Array, place_m: jax.Array) -> jax.Array:
    """Return each row of x k times, the m = n k rows then put in order."""
    del place_m
    return x[order_m // k]


def _spread_forward(
    k: int, x: jax.Array, order_m: jax.Array, place_m: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return spread(k, x, order_m, place_m), (order_m, place_m)


def _spread_backward(
    k: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, None, None]:
    dx = dy[saved[1]]
    return jnp.sum(dx.reshape(-1, k, *dx.shape[1:]), axis=1), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def put_back(y_mD: jax.Array, order_m: jax.Array, place_m: jax.Array) -> jax.Array:
    """Return the rows where they were before they were put in order."""
    del order_m
    return y_mD[place_m]


def _put_back_forward(
    y_mD: jax.Array, order_m: jax.Array, place_m: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return put_back(y_mD, order_m, place_m), order_m


def _put_back_backward(
    order_m: jax.Array, dy_mD: jax.Array
) -> tuple[jax.Array, None, None]:
    return dy_mD[order_m], None, None


put_back.defvjp(_put_back_forward, _put_back_backward)
