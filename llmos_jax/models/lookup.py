"""Look tokens up in a table that is split, without ever having it whole.

B sequences, T tokens, V vocabulary, D model; on one device b sequences, v rows and d
columns of the table. Gathering the table would move V D elements to look up b T D, and
its gradient as many back. Instead each device looks all its group's tokens up in its
own columns, and the columns change places: b T D elements, each way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmos_jax.models.annotate import Stored, mesh_axes_of, per_shard

_TABLE, _TOKENS, _X = (
    Stored(("vocab", "embed")),
    ("batch", "seq"),
    ("batch", "seq", None),
)


@jax.custom_vjp
def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Return the rows [B, T, D] of the tokens.

    Args:
        table_VD: logical axes ("vocab", "embed").
        tokens_BT: int32 token ids.
    """
    x_BTD: jax.Array = per_shard(
        functools.partial(_rows, _split(table_VD, tokens_BT)),
        table_VD,
        tokens_BT,
        in_axes=(_TABLE, _TOKENS),
        out_axes=_X,
    )
    return x_BTD


def lookup_scaled(
    values_VD: jax.Array, scale_V: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Return the rows [B, T, D] of a table in few bits, in `dtype`; no gradient.

    Args:
        values_VD: logical axes ("vocab", "embed").
        scale_V: what each row is multiplied with.
        tokens_BT: int32 token ids.
        dtype: of the result.
    """
    split = _split(values_VD, tokens_BT)

    def part(
        values_vd: jax.Array, scale_v: jax.Array, tokens_bt: jax.Array
    ) -> jax.Array:
        def rows(index: jax.Array) -> jax.Array:
            scale = scale_v[index][:, :, None]
            return (values_vd[index].astype(jnp.float32) * scale).astype(dtype)

        return _found(split, rows, values_vd.shape[0], tokens_bt)

    x_BTD: jax.Array = per_shard(
        part,
        *(values_VD, scale_V, tokens_BT),
        in_axes=(_TABLE, Stored(("vocab",)), _TOKENS),
        out_axes=_X,
    )
    return x_BTD


def _forward(
    table_VD: jax.Array, tokens_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lookup(table_VD, tokens_BT), (table_VD, tokens_BT)


def _backward(
    saved: tuple[jax.Array, jax.Array], dx_BTD: jax.Array
) -> tuple[jax.Array, None]:
    table_VD, tokens_BT = saved
    dtable_VD = per_shard(
        functools.partial(_sums, _split(table_VD, tokens_BT)),
        table_VD,
        tokens_BT,
        dx_BTD,
        in_axes=(_TABLE, _TOKENS, _X),
        out_axes=_TABLE,
    )
    return dtable_VD, None


lookup.defvjp(_forward, _backward)

Mesh = tuple[str, ...]


class _Split(NamedTuple):
    """Mesh axes of the table's rows and columns, and of the tokens."""

    rows: Mesh
    columns: Mesh
    tokens: Mesh

    @property
    def swapped(self) -> Mesh:
        """Axes of the columns over which tokens differ: columns change places."""
        return tuple(axis for axis in self.columns if axis in self.tokens)

    @property
    def gathered(self) -> Mesh:
        """Axes of the columns over which tokens are the same."""
        return tuple(axis for axis in self.columns if axis not in self.tokens)

    @property
    def summed(self) -> Mesh:
        """Axes of the tokens that do not split the columns."""
        return tuple(axis for axis in self.tokens if axis not in self.columns)


def _split(table_VD: jax.Array, tokens_BT: jax.Array) -> _Split:
    (V, D), (B, T) = table_VD.shape, tokens_BT.shape
    return _Split(
        rows=mesh_axes_of("vocab", V, stored=True),
        columns=mesh_axes_of("embed", D, stored=True),
        tokens=(*mesh_axes_of("batch", B), *mesh_axes_of("seq", T)),
    )


def _rows(split: _Split, table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    return _found(split, lambda index: table_vd[index], table_vd.shape[0], tokens_bt)


def _found(
    split: _Split,
    rows: Callable[[jax.Array], jax.Array],
    v: int,
    tokens_bt: jax.Array,
) -> jax.Array:
    """What `rows` has for each token, wherever it is among the devices."""
    tokens = _all(tokens_bt, split.swapped)
    index, is_here = _local(tokens, v, split.rows)
    x = rows(index)
    x = jnp.where(is_here[:, :, None], x, jnp.zeros((), x.dtype))
    if split.rows:
        x = jax.lax.psum(x, split.rows)
    if split.swapped:
        x = jax.lax.all_to_all(
            x, split.swapped, split_axis=0, concat_axis=2, tiled=True
        )
    if split.gathered:
        x = jax.lax.all_gather(x, split.gathered, axis=2, tiled=True)
    return x


def _sums(
    split: _Split, table_vd: jax.Array, tokens_bt: jax.Array, dx_btD: jax.Array
) -> jax.Array:
    dx = dx_btD
    if split.gathered:
        d = dx.shape[2] // jax.lax.axis_size(split.gathered)
        start = jax.lax.axis_index(split.gathered) * d
        dx = jax.lax.dynamic_slice_in_dim(dx, start, d, axis=2)
    if split.swapped:
        dx = jax.lax.all_to_all(
            dx, split.swapped, split_axis=2, concat_axis=0, tiled=True
        )
    tokens = _all(tokens_bt, split.swapped)
    index, is_here = _local(tokens, table_vd.shape[0], split.rows)
    dx = jnp.where(is_here[:, :, None], dx.astype(jnp.float32), jnp.float32(0))
    dtable_vd = jnp.zeros(table_vd.shape, jnp.float32).at[index].add(dx)
    dtable_vd = dtable_vd.astype(table_vd.dtype)
    return jax.lax.psum(dtable_vd, split.summed) if split.summed else dtable_vd


def _all(tokens_bt: jax.Array, swapped: Mesh) -> jax.Array:
    """The tokens of all devices that columns are swapped with."""
    if not swapped:
        return tokens_bt
    return jax.lax.all_gather(tokens_bt, swapped, axis=0, tiled=True)


def _local(tokens_bt: jax.Array, v: int, rows: Mesh) -> tuple[jax.Array, jax.Array]:
    """Where each token's row is among this device's, and whether it is there."""
    if not rows:
        return tokens_bt, jnp.ones(tokens_bt.shape, bool)
    index = tokens_bt - jax.lax.axis_index(rows) * v
    is_here = (index >= 0) & (index < v)
    return jnp.where(is_here, index, 0), is_here
