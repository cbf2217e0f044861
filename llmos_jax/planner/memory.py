"""Turn a layout and a way into the memory stack of one device at its fullest moment.

A train step is fullest at one of two moments: in the backward pass of a layer (what is
recomputed, the gathered weights), or at the loss (logits, the head). The stack shows
the fuller one, so it always sums to the peak.

B sequences, T tokens, n tokens of one device and microbatch, D model, F feed-forward, N
query heads, K key/value heads, H head size, V vocabulary, L layers, P stages, M
microbatches, R rounds, C contexts, X experts' ways, E experts, k of a token.

- Pipelines: each turn of a forward pass keeps its layers' activations, M + (P - 1) / R
  times those of one microbatch in L / P layers, and the loss has M n / P tokens, whose
  features wait for it, with their gradients. `1f1b` keeps one microbatch's, and the
  stage inputs of 2 P - 1; its loss has n / P tokens. `circular` holds its layers twice
  in compute dtype, and their summed gradients: as stored, and as run.
- Contexts: `ring` holds two pieces of keys and values and of their float32 gradients,
  `gather` those of a whole sequence, of one layer.
- Experts: room for the worst case, X n min(k, E / X) rows: in a layer four times D
  wide, thrice F; and wherever what is F wide is saved.
- Local steps: beside the agreed parameters, a replica's own and the outer velocity.

The peak is what libtpu calls the total: arguments and the heap as laid out.

Known lies: XLA's scheduler gathers ahead as it likes, so a layer's weights are counted
some fitted times; user modules are taken for Llama layers; the CPU is not fitted; nor
are pipelines, contexts, experts and local steps. Programs with `tensor` were compiled
for the fit when tokens between blocks were not yet split over it; compiled since, nine
of ten are within 1.5 %, and one small one needs 7 % more than this says.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos_jax.ir.facts import loss_parts, ticks_of
from llmos_jax.ir.plan import Way, saved_tensors
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.compute import tensor_widths
from llmos_jax.planner.layout import Layout
from llmos_jax.planner.sizes import Sizes
from llmos_jax.planner.stored import dtype_bytes

RESERVE = 0.05
"""Share of memory left free for what no compiler sees: fragmentation over time, input
prefetch, a second program. Our choice."""

BLOCK = 512
"""Queries and keys whose scores exist at one time (kernels/attention/blocked.py)."""

WHOLE = 3.5
"""Tensors as wide as the model that a layer holds whole where its tokens are split
between blocks: a block gathers what goes in, and what comes out is whole before it is
scattered, there and back. By hand, to ten compiled programs with `tensor` 2 to 8."""

ROWS_EMBED, ROWS_FFN = 4.0, 3.0
"""Tensors of rows sent to experts that exist at one time, as wide as the model (those
that came, those that go, and a gradient of each) and as the feed-forward layer (gate,
up, and a gradient). By hand, to mixtral_8x7b on v5p:2x4x4, remat `full`: 51.5 GB with
expert=8, 48.7 GB with expert=4."""

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
    widths = _held_widths(layout, sizes)
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
        _as_wide(fitted.all_embed, layout, sizes)
        + heads * width["heads"]
        + fitted.all_ffn * width["ffn"]
    )


def _as_wide(count: float, layout: Layout, sizes: Sizes) -> float:
    """Elements per token of `count` tensors as wide as the model, of which all but
    WHOLE are split along the tokens."""
    if layout.residual_ways == 1:
        return count * sizes.embed
    return (WHOLE + (count - WHOLE) / layout.residual_ways) * sizes.embed


def _held_widths(layout: Layout, sizes: Sizes) -> dict[str, float]:
    """Elements per token of one layer's tensors, with room for the rows that experts
    may be sent at worst."""
    widths = tensor_widths(layout, sizes)
    if layout.mesh.expert > 1:
        room = _rows(layout, sizes) / sizes.experts_per_token
        widths |= {name: room * widths[name] for name in ("ffn_gate", "ffn_up")}
    return widths


def _rows(layout: Layout, sizes: Sizes) -> float:
    """Rows per token of its own that a device may be sent at worst: all of all devices'
    tokens go to as many of its experts as they may."""
    X = layout.mesh.expert
    return X * min(sizes.experts_per_token, sizes.experts / X)


def _widths(layout: Layout, sizes: Sizes) -> dict[str, float]:
    """Elements per token of q and k together, and of the feed-forward layer."""
    widths = _held_widths(layout, sizes)
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
        "optimizer": layout.trained
        * workload.optimizer_moments
        * dtype_bytes(way.state_dtype),
        "cast weights": layout.sharded * compute * is_cast,
        **_replicas(layout, workload),
        **_waiting(layout, way, sizes, n, compute),
    }
    summed = layout.trained * dtype_bytes(way.gradient_dtype)
    accumulated = fitted.accumulated * summed if way.microbatches > 1 else 0.0
    layers = sizes.layers / layout.mesh.stage
    activations = (_microbatches_kept(way) * layers * kept + 2 * away) * n
    gradients = layout.trained * compute + accumulated
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
    elements = _as_wide(fitted.between_embed, layout, sizes)
    elements += fitted.between_heads * width["heads"]
    if layout.mesh.expert == 1:
        elements += fitted.between_ffn * width["ffn"]
    held = {"none": fitted.held_none, "dots": fitted.held_dots}.get(way.remat, 1.0)
    compute = dtype_bytes(workload.compute_dtype)
    made = n * elements * compute * held
    made += n * _routed(layout, sizes) * compute
    made += n * _exchanged_bytes(layout, way, sizes, compute)
    return made + _attention_bytes(layout, sizes, topology, workload, fitted, n)


def _routed(layout: Layout, sizes: Sizes) -> float:
    """Elements per token of the rows that a layer of experts may be sent at worst."""
    if layout.mesh.expert == 1:
        return 0.0
    F = sizes.ffn / layout.width_ways["ffn"]
    return _rows(layout, sizes) * (ROWS_EMBED * sizes.embed + ROWS_FFN * F)


def _exchanged_bytes(layout: Layout, way: Way, sizes: Sizes, compute: int) -> float:
    """Per token, keys and values of others that one layer's attention holds, and their
    float32 gradients."""
    C = layout.mesh.context
    if C == 1:
        return 0.0
    pieces = C if way.context_exchange == "gather" else 2
    held = 2 * sizes.kv_width / layout.width_ways["kv_heads"]
    return pieces * held * (compute + 4)


def _microbatches_kept(way: Way) -> float:
    """Microbatches whose activations in the layers of a device wait for its backward
    pass."""
    if way.mesh.stage == 1 or way.schedule == "1f1b":
        return 1.0
    return ticks_of(way) / way.rounds


def _waiting(layout: Layout, way: Way, sizes: Sizes, n: float, compute: int) -> Memory:
    """What a pipeline keeps beside the activations of its layers."""
    P, M = way.mesh.stage, way.microbatches
    if P == 1:
        return {}
    if way.schedule == "1f1b":
        inputs = n * sizes.embed / layout.residual_ways
        return {"stage inputs": (2 * P - 1) * inputs * compute}
    found = {"features": 2 * M * n * sizes.embed / P * compute}
    if way.schedule == "circular":
        each = compute + dtype_bytes(way.gradient_dtype)
        found["moved weights"] = (layout.sharded - layout.unstaged) * each
    return found


def _replicas(layout: Layout, workload: Workload) -> Memory:
    """What replicas that take steps alone keep beside the parameters they agreed on:
    their own, and the outer optimizer's velocity, in float32."""
    if not workload.local_steps:
        return {}
    return {"replicas": layout.sharded * 4, "velocity": layout.sharded * 4}


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
    vocab = sizes.logits / layout.width_ways["vocab"]
    if layout.mesh.stage > 1:
        n *= loss_parts(way) / layout.mesh.stage
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
    token = sizes.cached_bytes(workload.kv_dtype) / layout.width_ways["kv_heads"]
    layers = sizes.layers / layout.mesh.stage
    vocab = sizes.logits / layout.width_ways["vocab"]
    return {
        "params": layout.served.kept,
        "KV cache": layers * token * sequences * workload.seq_len,
        "gathered weights": _used_layer(layout, sizes, workload),
        "temporaries": tokens * _everything(layout, sizes, fitted) * compute,
        "logits": sequences * vocab * 4,  # of the last token, float32
    }


def _used_layer(layout: Layout, sizes: Sizes, workload: Workload) -> float:
    """One layer as it is multiplied with: gathered, in compute dtype or in few bits; 0
    if kept so."""
    if sizes.is_quantized:
        return layout.served.layer * layout.is_layer_gathered
    is_cast = workload.param_dtype != workload.compute_dtype
    if not (layout.is_layer_gathered or is_cast):
        return 0.0
    return layout.gathered_layer * dtype_bytes(workload.compute_dtype)
