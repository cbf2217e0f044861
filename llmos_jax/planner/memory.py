"""Turn a layout and a way into the memory stack of one device at its fullest moment.

A train step is fullest at one of two moments: in the backward pass of a layer
(gradients, a gathered layer, what is being recomputed), or at the loss (logits, the
gathered head). The stack shows the fuller one, so it always sums to the peak.

Known lies:
- Attention is the plain one, which writes its whole B N T S scores (QUERY_BLOCK).
- One layer is gathered at a time beside its gradient; a scheduler that prefetches more
  uses more. XLA's padding and fragmentation are in RESERVE, not modelled.
- Widths saved per layer are those of a Llama layer, whatever the module.

Checked against three programs that XLA compiled for TPUs without chips (2026-08):
tests/planner/test_memory_stack.py holds the comparisons.
"""

from __future__ import annotations

from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.candidates import Way
from llmos_jax.planner.layout import Layout, dtype_bytes
from llmos_jax.planner.sizes import Sizes

RESERVE = 0.05
"""Share of memory left free for what is not modelled: fragmentation, input prefetch, a
second program. Our choice, until tools/bench has measured it."""

QUERY_BLOCK: int | None = None
"""Query tokens whose scores exist at one time; None: all of them."""

SCORE_BYTES = 4
"""Softmax runs in float32 (kernels/attention), and its result is kept in compute
dtype."""

LOGIT_BYTES = 4
"""Logits in float32; their gradient takes the same buffer. With these four bytes the
peak
of MaxText's llama3.1-8b on v6e:2x4 (24 x 8192, 31.62 GiB) comes out 2 % low; six would
make it 17 % high."""

Memory = dict[str, float]


def memory_of(layout: Layout, way: Way, sizes: Sizes, workload: Workload) -> Memory:
    """Return bytes per device by name, largest moment, in stacking order."""
    if workload.phase == "train":
        return _train(layout, way, sizes, workload)
    return _serve(layout, sizes, workload)


def budget(topology: Topology) -> float:
    """Bytes per device that a plan may use: all but the reserve."""
    return topology.hbm_bytes_per_device * (1 - RESERVE)


def saved_width(layout: Layout, sizes: Sizes, remat: str) -> float:
    """Elements that one layer keeps per token for its backward pass, scores aside.

    full: the layer's input, D. dots (jax's dots_with_no_batch_dims_saveable): also q,
    k, v, gate, up (split over tensor) and the outputs of o and down (D each). none:
    counted over a Llama layer, input, two norms (in float32, twice as wide), the sum
    between, o,
    down: 8 D; q and k before and after rotation, v, context: 3 N H + 3 K H; gate, up,
    silu, product: 4 F.
    """
    D = sizes.embed / layout.width_ways["embed"]
    NH = sizes.query_width / layout.width_ways["heads"]
    KH = sizes.kv_width / layout.width_ways["kv_heads"]
    F = sizes.ffn / layout.width_ways["ffn"]
    if remat == "full":
        return D
    if remat == "dots":
        return 3 * D + NH + 2 * KH + 2 * F
    return 8 * D + 3 * NH + 3 * KH + 4 * F


def _train(layout: Layout, way: Way, sizes: Sizes, workload: Workload) -> Memory:
    compute = dtype_bytes(workload.compute_dtype)
    sequences = workload.global_batch / layout.batch_ways / way.microbatches
    tokens = sequences * workload.seq_len
    everything = tokens * saved_width(layout, sizes, "none") * compute
    scores = _score_bytes(layout, sizes, workload, sequences)
    saved = tokens * saved_width(layout, sizes, way.remat) * compute
    if way.remat == "none":
        saved += scores
    gradients = layout.sharded * dtype_bytes(workload.param_dtype)
    accumulated = gradients if way.microbatches > 1 else 0.0
    stack = {
        "params": layout.sharded * dtype_bytes(workload.param_dtype),
        "optimizer": layout.sharded * workload.optimizer_state_bytes,
    }
    activations = sizes.layers * saved + tokens * sizes.embed * compute
    in_layer = {
        "gradients": gradients + accumulated,
        "activations": activations,
        "gathered weights": 2 * _used_layer(layout, workload),
        "temporaries": everything + scores,
        "logits": 0.0,
    }
    vocab = sizes.vocab / layout.width_ways["vocab"]
    at_loss = {
        "gradients": accumulated,
        "activations": activations,
        "gathered weights": 2 * layout.gathered_rest * compute,
        "temporaries": 0.0,
        "logits": tokens * vocab * LOGIT_BYTES,
    }
    fullest = max(in_layer, at_loss, key=lambda moment: sum(moment.values()))
    return {**stack, **fullest}


def _serve(layout: Layout, sizes: Sizes, workload: Workload) -> Memory:
    compute = dtype_bytes(workload.compute_dtype)
    sequences = workload.global_batch / layout.batch_ways
    tokens = workload.tokens / layout.batch_ways
    kv_width = sizes.kv_width / layout.width_ways["kv_heads"]
    cached = 2 * sizes.layers * kv_width * sequences * workload.seq_len * compute
    widest = tokens * saved_width(layout, sizes, "none") * compute
    scores = _score_bytes(layout, sizes, workload, sequences)
    if workload.phase == "decode":
        scores /= workload.seq_len
    vocab = sizes.vocab / layout.width_ways["vocab"]
    return {
        "params": layout.sharded * dtype_bytes(workload.param_dtype),
        "KV cache": cached,
        "gathered weights": _used_layer(layout, workload),
        "temporaries": widest + scores,
        "logits": sequences * vocab * 4,  # of the last token, float32
    }


def _used_layer(layout: Layout, workload: Workload) -> float:
    """One layer as it is multiplied with: gathered, in compute dtype; 0 if kept so."""
    is_cast = workload.param_dtype != workload.compute_dtype
    if not (layout.is_layer_gathered or is_cast):
        return 0.0
    return layout.gathered_layer * dtype_bytes(workload.compute_dtype)


def _score_bytes(
    layout: Layout, sizes: Sizes, workload: Workload, sequences: float
) -> float:
    queries = min(QUERY_BLOCK or workload.seq_len, workload.seq_len)
    heads = sizes.heads / layout.width_ways["heads"]
    each = SCORE_BYTES + dtype_bytes(workload.compute_dtype)
    return sequences * heads * queries * workload.seq_len * each
