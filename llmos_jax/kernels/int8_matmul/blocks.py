"""Pick the tiles of the TPU kernels: from the table blocks.toml, or by a rule.

m rows, K summed inputs, N made outputs.

The rule, for up to FEW_ROWS rows (decoding): all rows and all inputs at once, and as
many outputs as make a piece of the matrix of a sixteenth of it, between 1 and 2 MiB:
large enough that a grid step's 0.35 microseconds (Pallas' TPU documentation, "grid step
overhead") hide behind reading it, small enough that the first piece, which nothing
hides, is little. More rows (prefilling): 1024 rows by 1024 outputs (2048 where rows
are int8), so that each byte read meets about a thousand operations, by inputs of at
most 1024. Where that is too much for VMEM, fewer outputs.

Blocks of inputs always divide K, or are all of it: what lies past the edge of a matrix
may be anything, and would be summed. Rows and outputs may hang over.
"""

from __future__ import annotations

import functools
import math
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import jax

_TABLE = Path(__file__).with_name("blocks.toml")

FEW_ROWS = 128
"""Up to here a step holds all rows."""

_LANES = 128
"""Columns of a TPU register, and of its smallest matrix unit."""

_LEAST_PIECE, _MOST_PIECE = 2**20, 2**21
"""Bytes of the matrix to a step that decodes."""

_PARTS = 16
"""Steps that a matrix takes, if its pieces are of those sizes."""

_MANY_ROWS = 1024
_MOST_INPUTS = 1024

VMEM_BYTES = 48 * 2**20
"""What a kernel may take: of v5p and tpu7x three quarters of a core's 64 MiB, less than
half of v5e's and v6e's 128 (jax, tpu_info.py, 2026-08)."""


class Blocks(NamedTuple):
    """The tile of one grid step."""

    rows: int
    outputs: int
    inputs: int


class Product(NamedTuple):
    """What is multiplied, as far as tiles depend on it."""

    kind: str
    """As in the table: weights, activations and inputs to a scale: int8-int8,
    int4-none-128."""
    m: int
    K: int
    N: int
    row_bytes: float
    """Of one input of a row, as the kernel gets it."""
    bits: int
    """Of one weight."""
    least: int
    """A block of inputs is a multiple of this, if it is not all of them."""


def blocks_for(product: Product, chip: str | None) -> Blocks:
    """The table's tile for this chip (v5e, v6e, ...), or the rule's.

    The table is asked for the next power of two of rows.
    """
    rows = 1 << (product.m - 1).bit_length()
    known = _table().get((chip, product.kind, rows, product.K, product.N))
    if known is None:
        return ruled(product)
    return Blocks(min(known.rows, product.m), known.outputs, known.inputs)


def ruled(product: Product) -> Blocks:
    """The rule's tile; where even 128 outputs do not fit VMEM, it is too large."""
    m, K, N = product.m, product.K, product.N
    if m <= FEW_ROWS:
        column_bytes = K * product.bits / 8
        piece = min(max(N * column_bytes / _PARTS, _LEAST_PIECE), _MOST_PIECE)
        outputs, inputs = int(piece / column_bytes), K
    else:
        outputs = 2048 if product.row_bytes == 1 else 1024
        inputs = _divisor(K, product.least, _MOST_INPUTS)
    tile = Blocks(min(m, _MANY_ROWS), _spread(N, outputs), inputs)
    while vmem_bytes(tile, product) > VMEM_BYTES and outputs > _LANES:
        outputs = outputs * 3 // 4
        tile = tile._replace(outputs=_spread(N, outputs))
    return tile


def vmem_bytes(blocks: Blocks, product: Product) -> int:
    """What a kernel holds at once: each operand and the result twice, sums, and the
    matrix once more as it is multiplied."""
    rows, outputs, inputs = (
        max(blocks.rows, 32),
        math.ceil(blocks.outputs / _LANES) * _LANES,
        math.ceil(blocks.inputs / _LANES) * _LANES,
    )
    row = rows * inputs * product.row_bytes + rows * _LANES * 4
    column = inputs * outputs * product.bits / 8
    converted = inputs * outputs * (4 if product.kind.count("-") == 2 else 2)
    made = rows * outputs * (2 * 4 + 2 * 4)
    return int(2 * row + 2 * column + converted + made) + 2**21


def generation() -> str | None:
    """The TPU that is lowered for, as the table names it, or None where it is unknown.

    Known inside `jax.shard_map`, whose mesh knows its devices, and where TPUs are.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind = device.device_kind
    elif jax.default_backend() == "tpu":
        kind = jax.devices()[0].device_kind
    else:
        return None
    return _GENERATIONS.get(kind)


_GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""What devices call themselves (jax, tpu_info.py, 2026-08)."""


def _spread(N: int, wanted: int) -> int:
    """About as many outputs as wanted, in multiples of 128 that leave little over."""
    if N <= _LANES:
        return N
    most = max(wanted // _LANES, 1)
    steps = math.ceil(N / _LANES / most)
    return math.ceil(N / _LANES / steps) * _LANES


def _divisor(K: int, least: int, most: int) -> int:
    """The largest multiple of `least` up to `most` that divides K; else K."""
    fit = (size for size in range(most - most % least, 0, -least) if K % size == 0)
    return next(fit, K)


@functools.cache
def _table() -> dict[tuple[str | None, str, int, int, int], Blocks]:
    rows: list[dict[str, Any]] = tomllib.loads(_TABLE.read_text()).get("blocks", [])
    return {
        (row["chip"], row["kind"], row["rows"], row["K"], row["N"]): Blocks(
            *row["tile"]
        )
        for row in rows
    }
