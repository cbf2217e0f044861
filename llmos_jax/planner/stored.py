"""Turn a ParamTable into bytes: what its matrices take where they have few bits.

A matrix in few bits is two rows, `<path>.values` and `<path>.scale` (ir.Quantization);
the second belongs to the first's product. Bytes of int4 hold two weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmos_jax.ir.model import Quantization
from llmos_jax.ir.params import ParamRow, ParamTable
from llmos_jax.ir.workload import Workload

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
    "float8": 1,
    "float8_e4m3fn": 1,
}

SCALE_BYTES = 4
"""Of the float32 scale of a cached int8 key or value of one token and head."""


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element; 4 for a dtype that is not known."""
    return DTYPE_BYTES.get(dtype, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class FewBits:
    """How one matrix is kept and multiplied."""

    bytes_: float
    """Of one weight, with its share of the scales."""
    activations: str
    """What tokens become on their way in; `none`: they stay as they are."""


def few_bits_of(table: ParamTable) -> dict[str, FewBits]:
    """Return path of the values -> how they are kept, of matrices in few bits.

    Beside float8 the tables are int8 (models/weight.py): their tokens are not
    quantized.
    """
    how = quantization_of(table)
    if how is None:
        return {}
    rows = {row.path: row for row in table.rows}
    found = {}
    for path in scale_paths(table):
        values, scale = rows[f"{path.removesuffix('scale')}values"], rows[path]
        all_bytes = values.size + scale.size * dtype_bytes(scale.dtype)
        fits = values.dtype.startswith(how.activations)
        found[values.path] = FewBits(
            bytes_=all_bytes / (values.size * weights_in(values)),
            activations=how.activations if fits else "none",
        )
    return found


def served_bytes(table: ParamTable, workload: Workload) -> dict[str, int]:
    """Return parameter path -> bytes of one element in a step that serves.

    Matrices in few bits and their scales are as they are stored; what is beside them
    has the dtype of activations. A model without has one dtype, the workload's.
    """
    scales = scale_paths(table)
    rest = workload.compute_dtype if scales else workload.param_dtype
    own = scales | {f"{path.removesuffix('scale')}values" for path in scales}
    return {
        row.path: dtype_bytes(row.dtype if row.path in own else rest)
        for row in table.rows
    }


def quantization_of(table: ParamTable) -> Quantization | None:
    """What a table's spec says of few bits, if it has a spec."""
    return None if table.spec is None else table.spec.quantization


def scale_paths(table: ParamTable) -> frozenset[str]:
    """Paths of the scales of matrices in few bits."""
    return frozenset(
        f"{row.path.removesuffix('values')}scale"
        for row in table.rows
        if row.path.endswith(".values")
    )


def without_scales(table: ParamTable) -> ParamTable:
    """The table with one row for each matrix: groups of inputs are no axis's size."""
    scales = scale_paths(table)
    rows = tuple(row for row in table.rows if row.path not in scales)
    return replace(table, rows=rows)


def weights_in(row: ParamRow) -> int:
    """Weights in one element of a row."""
    return 2 if row.dtype == "uint8" else 1
