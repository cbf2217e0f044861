"""Turn a layout and a way into the memory stack of one device at its fullest moment.

A train step is fullest at one of two moments: in the backward pass of a layer (what is
recomputed, the gathered weights), or at the loss (logits, the head). The stack shows
the fuller one, so it always sums to the peak.

B sequences, T tokens, n tokens of one device and microbatch, D model, F feed-forward, N
query heads, K key/value heads, H head size, V vocabulary, L layers.

The peak is what libtpu calls the total: arguments and the heap as laid out.
The constants below were fitted together, by random search on relative errors, to 24
programs of tools/bench/planner_memory.py (2026-11, libtpu 0.0.42): the residuals it
prints are in sample.

Known lies: XLA's scheduler gathers ahead as it likes, so a layer's weights are counted
some fitted times; user modules are taken for Llama layers; the CPU is not fitted.
"""

from __future__ import annotations

from llmos_jax.ir.plan import Way, saved_tensors
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.compute import tensor_widths
from llmos_jax.planner.layout import Layout, dtype_bytes
from llmos_jax.planner.sizes import Sizes

RESERVE = 0.05
"""Share of memory left free for what no compiler sees: fragmentation over time, input
prefetch, a second program. Our choice."""

BLOCK = 512
"""Queries and keys whose scores exist at one time (kernels/attention/blocked.py)."""

LANES = 128
"""A TPU vector's lanes: splash writes each log-sum once in every lane, in float32."""

GATHERED = 1.06
"""Layers' worth of gathered weights at the fullest moment of a layer's backward pass:
its own, and now and then a part of the next one's. Fitted."""

BETWEEN = {"D": 2.9, "heads": 2.8, "ffn": 3.0}
"""Tensors of each width, in compute dtype, that one layer's backward pass holds when it
is recomputed. Fitted."""

HELD = {"none": 0.69, "dots": 1.55}
"""BETWEEN under policies that save part of it, over what it is when all is remade."""

LOG_SUMS = 3.4
"""Of B N T 128 float32: splash's log-sums, and rotation, which is as large for a head
of 128. Fitted."""

EVERYTHING = {"D": 7.7, "heads": 8.0, "normed": 3.2, "ffn": 2.65}
"""The same for what `none` saves, which is 2 to 3 times what has names: rotation is
computed in float32; `normed` where q and k are normalised. Fitted."""

ACCUMULATED = 0.92
"""Copies of the summed gradients while microbatches are added. Fitted."""

HEAD_BYTES = {"tokens": 5.9, "vocab": 2.04}
"""Per element of the head at the loss, or of one tile of it: gathered, and its gradient
in float32 and in compute dtype. Fitted, as is LOGIT_BYTES."""

LOGIT_BYTES = 4.3
"""Per logit of one tile."""

Memory = dict[str, float]


def memory_of(
    layout: Layout, way: Way, sizes: Sizes, topology: Topology, workload: Workload
) -> Memory:
    """Return bytes per device by name, largest moment, in stacking order."""
    if workload.phase == "train":
        return _train(layout, way, sizes, topology, workload)
    return _serve(layout, sizes, workload)


def budget(topology: Topology) -> float:
    """Bytes per device that a plan may use: all but the reserve."""
    return topology.hbm_bytes_per_device * (1 - RESERVE)


def saved_bytes(
    layout: Layout, way: Way, sizes: Sizes, workload: Workload
) -> tuple[float, float]:
    """Bytes per token and layer kept for the backward pass: on the device, on the host.

    `full` keeps the layer's input; the named tensors add their widths; `none` also
    keeps what lies between them.
    """
    compute = dtype_bytes(workload.compute_dtype)
    widths = tensor_widths(layout, sizes)
    saved = saved_tensors(way.remat)
    # What the last product makes is the next layer's input, which is saved already.
    saved = saved - {"ffn_out"}
    kept = sum(widths[name] for name in saved - set(way.offload)) * compute
    away = sum(widths[name] for name in saved & set(way.offload)) * compute
    if "context" in saved:
        kept += 4 * sizes.heads / layout.width_ways["heads"]
    if way.remat == "none":
        kept = compute * _everything(layout, sizes)
    return kept, away


def _everything(layout: Layout, sizes: Sizes) -> float:
    """Elements per token that a layer's backward pass reads if nothing is remade."""
    width = _widths(layout, sizes)
    heads = EVERYTHING["heads"] + EVERYTHING["normed"] * sizes.normed_heads
    return (
        EVERYTHING["D"] * sizes.embed
        + heads * width["heads"]
        + EVERYTHING["ffn"] * width["ffn"]
    )


def _widths(layout: Layout, sizes: Sizes) -> dict[str, float]:
    """Elements per token of q and k together, and of the feed-forward layer."""
    ways = layout.width_ways
    return {
        "heads": sizes.query_width / ways["heads"] + sizes.kv_width / ways["kv_heads"],
        "ffn": tensor_ffn(layout, sizes),
    }


def tensor_ffn(layout: Layout, sizes: Sizes) -> float:
    """Elements per token of the feed-forward width, over the experts it goes to."""
    return max(1, sizes.experts_per_token) * sizes.ffn / layout.width_ways["ffn"]


def _train(
    layout: Layout, way: Way, sizes: Sizes, topology: Topology, workload: Workload
) -> Memory:
    compute = dtype_bytes(workload.compute_dtype)
    param = dtype_bytes(workload.param_dtype)
    n = workload.tokens / layout.token_ways / way.microbatches
    kept, away = saved_bytes(layout, way, sizes, workload)
    is_cast = workload.param_dtype != workload.compute_dtype
    whole_layers = sizes.layers if way.unrolled else 1
    stack = {
        "params": layout.sharded * param,
        "optimizer": layout.sharded
        * workload.optimizer_moments
        * dtype_bytes(way.state_dtype),
        "cast weights": layout.sharded * compute * is_cast,
    }
    summed = layout.sharded * dtype_bytes(way.gradient_dtype)
    accumulated = ACCUMULATED * summed if way.microbatches > 1 else 0.0
    activations = (sizes.layers * kept + 2 * away) * n
    gradients = layout.sharded * compute + accumulated
    table = sizes.embed * sizes.vocab / layout.width_ways["vocab"]
    moments: list[Memory] = [
        {
            "gradients": gradients,
            "activations": activations,
            "gathered weights": GATHERED * layout.gathered_layer * compute
            if layout.is_layer_gathered
            else compute * layout.gathered_layer * whole_layers,
            "temporaries": _in_layer(layout, way, sizes, topology, workload, n),
        },
        {
            "gradients": accumulated,
            "activations": activations,
            **_at_loss(layout, way, sizes, workload, n, table),
        },
    ]
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    return {**stack, **fullest}


def _in_layer(
    layout: Layout,
    way: Way,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
    n: float,
) -> float:
    """What one layer's backward pass makes and remakes."""
    width = _widths(layout, sizes)
    elements = BETWEEN["D"] * sizes.embed + BETWEEN["heads"] * width["heads"]
    elements += BETWEEN["ffn"] * width["ffn"]
    made = n * elements * dtype_bytes(workload.compute_dtype)
    return made * HELD.get(way.remat, 1.0) + _attention_bytes(
        layout, sizes, topology, workload, n
    )


def _attention_bytes(
    layout: Layout, sizes: Sizes, topology: Topology, workload: Workload, n: float
) -> float:
    """Beside queries, keys and values: log-sums on a TPU, else blocks of scores."""
    heads = sizes.heads / layout.width_ways["heads"]
    if topology.chip.vendor == "tpu" and workload.seq_len > BLOCK:
        return LOG_SUMS * n * heads * LANES * 4
    rows = min(BLOCK, workload.seq_len)
    blocks = 3 * n / workload.seq_len
    return blocks * heads * rows * rows * 4


def _at_loss(
    layout: Layout,
    way: Way,
    sizes: Sizes,
    workload: Workload,
    n: float,
    table: float,
) -> Memory:
    """The head, its gradient, and the logits of one tile with their gradient."""
    compute = dtype_bytes(workload.compute_dtype)
    vocab = sizes.vocab / layout.width_ways["vocab"]
    tile = n * vocab / way.loss_tiles
    features = 3 * n * sizes.embed * compute
    if way.loss_tiles == 1:
        head, logits = 2 * compute * table, tile * (4 + compute)
    elif way.loss_over == "tokens":
        head, logits = HEAD_BYTES["tokens"] * table, tile * LOGIT_BYTES
    else:
        head = HEAD_BYTES["vocab"] * table / way.loss_tiles
        logits = tile * LOGIT_BYTES
        features += 4 * n * sizes.embed
    return {"gathered weights": head, "temporaries": features, "logits": logits}


def _serve(layout: Layout, sizes: Sizes, workload: Workload) -> Memory:
    """Weights, the cache full to the end, and one layer's work."""
    compute = dtype_bytes(workload.compute_dtype)
    sequences = workload.global_batch / layout.batch_ways
    tokens = workload.tokens / layout.batch_ways
    kv_width = sizes.kv_width / layout.width_ways["kv_heads"]
    cached = 2 * sizes.layers * kv_width * sequences * workload.seq_len
    vocab = sizes.vocab / layout.width_ways["vocab"]
    return {
        "params": layout.sharded * dtype_bytes(workload.param_dtype),
        "KV cache": cached * dtype_bytes(workload.kv_dtype),
        "gathered weights": _used_layer(layout, workload),
        "temporaries": tokens * _everything(layout, sizes) * compute,
        "logits": sequences * vocab * 4,  # of the last token, float32
    }


def _used_layer(layout: Layout, workload: Workload) -> float:
    """One layer as it is multiplied with: gathered, in compute dtype; 0 if kept so."""
    is_cast = workload.param_dtype != workload.compute_dtype
    if not (layout.is_layer_gathered or is_cast):
        return 0.0
    return layout.gathered_layer * dtype_bytes(workload.compute_dtype)
