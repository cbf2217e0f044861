"""Turn a question into how far its answer can be trusted, and why.

The bands are what nine of ten published rows of the same chip and kind of model stayed
within when every row of their model's family had been left out of the fit; with fewer
than ten rows, the worst of them. `tools/bench/planner_time.py` measures them (2026-11).

Known lies: rows are few and come from people who tuned them, so an untuned run is
slower than its band says. Leaving rows out tests the constants, not the formulas, which
were chosen with all rows in sight; nor the priors and weights of the fit, some of which
were set after a first fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos_jax.ir.plan import MeshShape
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.sizes import Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Rows behind a prediction, and the relative error they stayed within."""

    rows: int
    error: float


BANDS: dict[tuple[str, str], Band] = {
    ("v4", "dense"): Band(rows=3, error=0.19),
    ("v5e", "dense"): Band(rows=24, error=0.26),
    ("v5p", "dense"): Band(rows=14, error=0.17),
    ("v6e", "dense"): Band(rows=9, error=0.20),
    ("tpu7x", "dense"): Band(rows=4, error=0.26),
    ("v5p", "moe"): Band(rows=2, error=0.14),
    ("tpu7x", "moe"): Band(rows=4, error=0.13),
    # JAX rows on GPUs of 700 W and more (--gpu): nothing was fitted to them.
    ("h100", "dense"): Band(rows=9, error=0.37),
    ("h200", "dense"): Band(rows=1, error=0.37),
    ("b200", "dense"): Band(rows=2, error=0.37),
}

DECODE_BANDS = {("v5e", "dense"): Band(rows=24, error=0.15)}
"""tools/bench/planner_decode.py; in sample, for the table is all there is."""

MARGIN = 0.03
"""What a mesh axis that splits more than the batch and the weights must win by before
it is chosen unasked, of a step's time. A judgement: a little below the median error on
published rows, 4 %; those tuned by hand are nearly all without such an axis."""

SEEN_AXES = {"context": ("tpu7x",), "stage": (), "expert": ()}
"""Mesh axis -> chips with a published row that has it above 1; others are on all."""


def domain_of(
    sizes: Sizes, mesh: MeshShape, topology: Topology, workload: Workload, parts: int
) -> tuple[float | None, str]:
    """Return the error band of a prediction and what supports it, or None and why."""
    error, words = _support(sizes, mesh, topology, workload, parts)
    if topology.chip.is_measured:
        words += "; efficiencies measured on this machine"
    return error, words


def _support(
    sizes: Sizes, mesh: MeshShape, topology: Topology, workload: Workload, parts: int
) -> tuple[float | None, str]:
    chip = topology.chip.name
    if topology.chip.vendor == "cpu":
        return None, "outside: cpu figures are nominal, they rank and are no speed"
    if all(product.tensor != "query" for product in sizes.products):
        return None, "outside: published rows are of transformers"
    kind = "moe" if sizes.experts else "dense"
    said = "mixture-of-experts" if sizes.experts else "dense"
    if workload.phase == "prefill":
        return None, f"outside: no published prefill rows for {chip}"
    bands = BANDS if workload.phase == "train" else DECODE_BANDS
    band = bands.get((chip, kind))
    if band is None:
        rows = "training" if workload.phase == "train" else "decode"
        return None, f"outside: no published {rows} row of a {said} model on {chip}"
    for axis, chips in SEEN_AXES.items():
        if mesh.sizes[axis] > 1 and chip not in chips:
            return None, f"outside: no published row on {chip} has {axis} above 1"
    if workload.phase == "decode":
        return band.error, f"fitted to {band.rows} {said} {chip} decode rows"
    notes = [] if parts == 1 else ["none with microbatches"]
    if workload.compute_dtype not in ("bfloat16", "int8", "float8"):
        notes.append(f"none in {workload.compute_dtype}")
    how = "fitted to" if topology.chip.vendor == "tpu" else "checked against"
    rows = f"{band.rows} {said} {chip} training row{'s' * (band.rows > 1)}"
    return band.error, "; ".join([f"{how} {rows}", *notes])
