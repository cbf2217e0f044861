"""Turn a layout and a way into the memory stack of one device at its fullest moment.

A train step is fullest at one of two moments: in the backward pass of a layer (what is
recomputed, the gathered weights), or at the loss (logits, the head). The stack shows
the fuller one, so it always sums to the peak.

B sequences, T tokens, n tokens of one device and microbatch, D model, F feed-forward, N
query heads, K key/value heads, H head size, V vocabulary, L layers.

The peak is what libtpu calls the total: arguments and the heap as laid out.

Known lies: XLA's scheduler gathers ahead as it likes, so a layer's weights are counted
some fitted times; user modules are taken for Llama layers; the CPU is not fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedMemory:
    """What no shape gives: how much of what it makes XLA holds at one time."""

    gathered: float = 1.06
    """Layers' worth of gathered weights at the fullest moment of a layer's backward
    pass: its own, and now and then a part of the next one's."""
    between_embed: float = 2.9
    """Tensors as wide as the model, in compute dtype, that one layer's backward pass
    holds when it is recomputed."""
    between_heads: float = 2.8
    """... as wide as queries and keys together."""
    between_ffn: float = 3.0
    """... as wide as the feed-forward layer."""
    held_none: float = 0.69
    """The three above under remat `none`, over what they are when all is remade."""
    held_dots: float = 1.55
    """... and under `dots`."""
    log_sums: float = 3.4
    """Of B N T 128 float32: splash's log-sums, and rotation, which is as large for a
    head of 128."""
    all_embed: float = 7.7
    """Tensors as wide as the model that `none` saves in each layer: 2 to 3 times those
    that have names, for rotation is computed in float32."""
    all_heads: float = 8.0
    all_normed: float = 3.2
    """More of them where q and k are normalised."""
    all_ffn: float = 2.65
    accumulated: float = 0.92
    """Copies of the summed gradients while microbatches are added."""
    head_tokens: float = 5.9
    """Bytes per element of the head at a loss cut by tokens: gathered, and its gradient
    in float32 and in compute dtype."""
    head_vocab: float = 2.04
    """Bytes per element of one tile of the head at a loss cut by the vocabulary."""
    logit: float = 4.3
    """Bytes per logit of one tile."""


FITTED_MEMORY = FittedMemory()
"""Fitted together to 24 compiled programs (2026-11, jax 0.10.2, libtpu 0.0.42):
`tools/bench/planner_memory.py --fit` does it again."""

Memory = dict[str, float]


def memory_of(
    layout: Layout,
    way: Way,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
    fitted: FittedMemory = FITTED_MEMORY,
) -> Memory:
    """Return bytes per device by name, largest moment, in stacking order."""
    if workload.phase == "train":
        return _train(layout, way, sizes, topology, workload, fitted)
    return _serve(layout, sizes, workload, fitted)


def budget(topology: Topology) -> float:
    """Bytes per device that a plan may use: all but the reserve."""
    return topology.hbm_bytes_per_device * (1 - RESERVE)


def _saved_bytes(
    layout: Layout, way: Way, sizes: Sizes, workload: Workload, fitted: FittedMemory
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
        kept = compute * _everything(layout, sizes, fitted)
    return kept, away


def _everything(layout: Layout, sizes: Sizes, fitted: FittedMemory) -> float:
    """Elements per token that a layer's backward pass reads if nothing is remade."""
    width = _widths(layout, sizes)
    heads = fitted.all_heads + fitted.all_normed * sizes.normed_heads
    return (
        fitted.all_embed * sizes.embed
        + heads * width["heads"]
        + fitted.all_ffn * width["ffn"]
    )


def _widths(layout: Layout, sizes: Sizes) -> dict[str, float]:
    """Elements per token of q and k together, and of the feed-forward layer."""
    widths = tensor_widths(layout, sizes)
    return {"heads": widths["query"] + widths["key"], "ffn": widths["ffn_gate"]}


def _train(
    layout: Layout,
    way: Way,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
    fitted: FittedMemory,
) -> Memory:
    compute = dtype_bytes(workload.compute_dtype)
    param = dtype_bytes(workload.param_dtype)
    n = workload.tokens / layout.token_ways / way.microbatches
    kept, away = _saved_bytes(layout, way, sizes, workload, fitted)
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
    accumulated = fitted.accumulated * summed if way.microbatches > 1 else 0.0
    activations = (sizes.layers * kept + 2 * away) * n
    gradients = layout.sharded * compute + accumulated
    table = sizes.embed * sizes.vocab / layout.width_ways["vocab"]
    moments: list[Memory] = [
        {
            "gradients": gradients,
            "activations": activations,
            "gathered weights": fitted.gathered * layout.gathered_layer * compute
            if layout.is_layer_gathered
            else compute * layout.gathered_layer * whole_layers,
            "temporaries": _in_layer(layout, way, sizes, topology, workload, fitted, n),
        },
        {
            "gradients": accumulated,
            "activations": activations,
            **_at_loss(layout, way, sizes, workload, fitted, n, table),
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
    fitted: FittedMemory,
    n: float,
) -> float:
    """What one layer's backward pass makes and remakes."""
    width = _widths(layout, sizes)
    elements = fitted.between_embed * sizes.embed
    elements += fitted.between_heads * width["heads"]
    elements += fitted.between_ffn * width["ffn"]
    held = {"none": fitted.held_none, "dots": fitted.held_dots}.get(way.remat, 1.0)
    made = n * elements * dtype_bytes(workload.compute_dtype) * held
    return made + _attention_bytes(layout, sizes, topology, workload, fitted, n)


def _attention_bytes(
    layout: Layout,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
    fitted: FittedMemory,
    n: float,
) -> float:
    """Beside queries, keys and values: log-sums on a TPU, else blocks of scores."""
    heads = sizes.heads / layout.width_ways["heads"]
    if topology.chip.vendor == "tpu" and workload.seq_len > BLOCK:
        return fitted.log_sums * n * heads * LANES * 4
    rows = min(BLOCK, workload.seq_len)
    blocks = 3 * n / workload.seq_len
    return blocks * heads * rows * rows * 4


def _at_loss(
    layout: Layout,
    way: Way,
    sizes: Sizes,
    workload: Workload,
    fitted: FittedMemory,
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
        head, logits = fitted.head_tokens * table, tile * fitted.logit
    else:
        head = fitted.head_vocab * table / way.loss_tiles
        logits = tile * fitted.logit
        features += 4 * n * sizes.embed
    return {"gathered weights": head, "temporaries": features, "logits": logits}


def _serve(
    layout: Layout, sizes: Sizes, workload: Workload, fitted: FittedMemory
) -> Memory:
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
        "temporaries": tokens * _everything(layout, sizes, fitted) * compute,
        "logits": sequences * vocab * 4,  # of the last token, float32
    }


def _used_layer(layout: Layout, workload: Workload) -> float:
    """One layer as it is multiplied with: gathered, in compute dtype; 0 if kept so."""
    is_cast = workload.param_dtype != workload.compute_dtype
    if not (layout.is_layer_gathered or is_cast):
        return 0.0
    return layout.gathered_layer * dtype_bytes(workload.compute_dtype)
