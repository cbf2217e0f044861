"""List how a plan splits every parameter, as an aligned table."""

from __future__ import annotations

import math

from llmos_jax.ir import Plan, Spec, mesh_axes_in
from llmos_jax.units import format_bytes

_FLOAT32_BYTES = 4


def explain_params(plan: Plan) -> str:
    """Path, shape, logical axes, spec, and float32 bytes on one device of each row."""
    cells = [("parameter", "shape", "logical axes", "split over", "per device")]
    for row in plan.params.rows:
        spec = plan.specs[row.path]
        share = row.size * _FLOAT32_BYTES / _ways(spec, plan)
        cells.append(
            (
                row.path,
                " x ".join(map(str, row.shape)),
                " ".join(str(axis) for axis in row.axes),
                " ".join(_entry(entry) for entry in spec),
                format_bytes(share),
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip()
        for line in cells
    )


def _entry(entry: str | tuple[str, ...] | None) -> str:
    if entry is None:
        return "-"
    return entry if isinstance(entry, str) else "+".join(entry)


def _ways(spec: Spec, plan: Plan) -> int:
    sizes = plan.mesh.sizes
    return math.prod(sizes[axis] for axis in mesh_axes_in(spec))
