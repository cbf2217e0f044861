"""Constants of the cost model that no data sheet gives, fitted to published steps.

The rest of the fit, one share of peak per chip, is `matmul_efficiency` in
hardware/chips.py. All were fitted together, 15 numbers for 60 published TPU steps (56
with mesh, batch, sequence and speed as printed), each drawn to the value it would have
had without them: `tools/bench/planner_time.py --fit` prints both and these lines.
What a row says about rows of other models is `planner_time.py` without `--fit`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Shared by all chips: what differs between chips is in their data sheets."""

    operands: float = 0.659
    """Of the time a product's operands take from memory, the share that its FLOPs do
    not hide. microbench, tpu7x: GEMM of 2048^3 at 71 % of the 32768^3 rate says 0.9."""
    elementwise: float = 1.093
    """Traffic between products over what it would be if each tensor was touched as
    often as `compute._between_width` counts."""
    kept: float = 5.6
    """Times a saved tensor crosses memory beside its use. Read and written on the way
    into the stack of all layers, and again out of it, makes 4."""
    attention: float = 0.822
    """Flash attention's share of what products reach. FlashAttention-2 and 3 reach
    0.72 and 0.75 of peak (arXiv 2307.08691, 2407.08608)."""
    grouped: float = 0.698
    """Of products with experts' weights: padding, sorting, uneven loads."""
    quantized: float = 0.881
    """Of products in int8 or float8: scales, casts, and what stays in bfloat16."""
    hidden_weights: float = 0.285
    """Share of weight gathers and gradient sums that hides behind products."""
    hidden_parts: float = 0.628
    """Share of sums and exchanges of activations that does."""
    hidden_crossing: float = 0.843
    """Share of gradient sums between slices that does."""
    jitter: float = 0.016
    """Growth of a step per doubling of slices, whatever is sent: the slowest of more
    hosts. v5e tables, 1 to 32 slices: 2 to 3.5 % per doubling, all causes."""


FITTED = Fitted()
"""What `planner_time.py --fit` printed on 2026-11-22."""
