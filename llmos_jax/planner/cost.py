"""Turn a layout and a way into an Estimate: seconds per resource, and what they add to.

Each resource is busy for a time of its own: compute (matmuls at the chip's measured
share of peak), hbm, ici, dcn. Matmuls and memory traffic of the layers run together, so
the longer counts; the optimizer's traffic comes on top. Gathers of weights and sums of
gradients hide behind that work but for a tenth; tensor sums stand in its way whole.

Known lies:
- One efficiency for all matmuls: thin ones (small models, much tensor) run slower.
- XLA sums data-parallel gradients once per microbatch, and always overlaps the same.
- Elementwise work costs only its traffic; the vocabulary's sharded softmax, nothing.
- The traffic of attention scores is not counted: true of a fused kernel, while the
  plain one writes and reads them all and is slower than this on long sequences.
- Prefill and decode are sketches: no batching over time, no paging, no sampling.
"""

from __future__ import annotations

from llmos_jax.ir.plan import Candidate, Estimate
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.candidates import Way
from llmos_jax.planner.collectives import (
    Links,
    dcn_sum_s,
    gather_s,
    sum_s,
)
from llmos_jax.planner.layout import Group, Layout, dtype_bytes
from llmos_jax.planner.memory import Memory, saved_width
from llmos_jax.planner.sizes import Sizes, attention_flops, model_flops

OVERLAP = 0.9
"""Share of weight and gradient traffic that hides behind work. MaxText's 32B on v5e-256
(configs/tpu/v5e/README.md, 2023-12) runs at 66.9 % MFU under full remat, which is 89 %
of peak counting recompute, the matmul ceiling: nearly all traffic hides. Its 16B to
128B still lose 2 to 3.5 % per doubling of slices, so not quite all."""


def estimate(
    layout: Layout,
    way: Way,
    memory: Memory,
    links: Links,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
) -> Candidate:
    """Return the way with what it is predicted to cost."""
    compute_s = _compute_s(way, sizes, topology, workload)
    layers_s, update_s = _hbm_s(layout, way, sizes, topology, workload)
    weights_s = _weight_traffic_s(layout, way, links, sizes, workload)
    sums_s, dcn_s = _gradient_sums_s(layout, way, links, topology, workload)
    parts_s = _tensor_sums_s(layout, way, links, sizes, workload)
    busy_s = max(compute_s, layers_s) + update_s
    behind_s = weights_s + sums_s + dcn_s
    step_s = busy_s + parts_s + behind_s - OVERLAP * min(behind_s, busy_s)
    seconds = {
        "compute": compute_s,
        "hbm": layers_s + update_s,
        "ici": weights_s + sums_s + parts_s,
        "dcn": dcn_s,
    }
    flops = model_flops(sizes, workload)
    per_chip = flops / step_s / topology.chips
    peak = topology.peak_flops_per_s(workload.compute_dtype)
    return Candidate(
        mesh=way.mesh,
        microbatches=way.microbatches,
        remat=way.remat,
        predicted=Estimate(
            step_s=step_s,
            peak_hbm_bytes=sum(memory.values()),
            tflops_per_s_per_chip=per_chip / 1e12,
            mfu=per_chip / (peak * topology.chip.devices_per_chip),
            tokens_per_s=workload.tokens / step_s,
            bound_by=max(seconds, key=lambda name: seconds[name]),
            seconds=seconds,
            memory=memory,
        ),
    )


def _compute_s(way: Way, sizes: Sizes, topology: Topology, workload: Workload) -> float:
    flops = model_flops(sizes, workload)
    if workload.phase == "train" and way.remat != "none":
        flops += attention_flops(sizes, workload)
    if workload.phase == "train" and way.remat == "full":
        in_layers = sizes.matmul_params - sizes.vocab * sizes.embed
        flops += 2 * max(0, in_layers) * workload.tokens
    peak = topology.peak_flops_per_s(workload.compute_dtype)
    return flops / topology.num_devices / (peak * topology.chip.matmul_efficiency)


def _hbm_s(
    layout: Layout, way: Way, sizes: Sizes, topology: Topology, workload: Workload
) -> tuple[float, float]:
    """Seconds of traffic in the layers, and in the optimizer.

    Layers: each pass reads the weights as used and writes, then reads, what one layer
    makes. Optimizer: parameters, state and gradients are read, the first two written.
    """
    chip = topology.chip
    rate = chip.hbm_bytes_per_s * chip.hbm_efficiency / chip.devices_per_chip
    compute = dtype_bytes(workload.compute_dtype)
    params = layout.sharded * dtype_bytes(workload.param_dtype)
    passes = _passes(way, workload)
    used = layout.gathered_layer * sizes.layers + layout.gathered_rest
    tokens = workload.tokens / layout.batch_ways
    made = 2 * tokens * sizes.layers * saved_width(layout, sizes, "none") * compute
    traffic = passes * (way.microbatches * used * compute + made)
    if workload.phase == "decode":
        kv_width = sizes.kv_width / layout.width_ways["kv_heads"]
        traffic += 2 * sizes.layers * kv_width * tokens * workload.seq_len * compute
    if workload.phase != "train":
        return traffic / rate, 0.0
    update = 3 * params + 2 * layout.sharded * workload.optimizer_state_bytes
    return traffic / rate, update / rate


def _passes(way: Way, workload: Workload) -> int:
    """Times a layer's weights are used: forward, again if recomputed, backward
    twice."""
    if workload.phase != "train":
        return 1
    return 4 if way.remat == "full" else 3


def _weight_traffic_s(
    layout: Layout, way: Way, links: Links, sizes: Sizes, workload: Workload
) -> float:
    """Gather the weights forward and backward, scatter the gradients, per
    microbatch."""
    compute = dtype_bytes(workload.compute_dtype)
    times = 3 * way.microbatches if workload.phase == "train" else 1
    return sum(
        times * gather_s(links, axes, elements * compute, sizes.layers)
        for axes, elements in layout.gathers.items()
    )


def _gradient_sums_s(
    layout: Layout, way: Way, links: Links, topology: Topology, workload: Workload
) -> tuple[float, float]:
    """Sum gradients over the replicas: inside a slice, and across slices."""
    if workload.phase != "train":
        return 0.0, 0.0
    width = dtype_bytes(workload.param_dtype)
    inside = sum(
        sum_s(links, axes, elements * width, 1)
        for axes, elements in layout.sums.items()
    )
    crossing = sum(
        dcn_sum_s(topology, links, elements * width)
        for axes, elements in layout.sums.items()
        if "data" in axes
    )
    return inside * way.microbatches, crossing * way.microbatches


def _tensor_sums_s(
    layout: Layout, way: Way, links: Links, sizes: Sizes, workload: Workload
) -> float:
    """Sum the outputs of attention and feed-forward over the axes that split them.

    Two sums a layer in each direction (Megatron, arXiv 1909.08053), again where the
    forward pass is recomputed; and one for the embedding lookup, there and back.
    """
    compute = dtype_bytes(workload.compute_dtype)
    tokens = workload.tokens / layout.batch_ways / way.microbatches
    block = tokens * sizes.embed * compute
    passes = 1
    if workload.phase == "train":
        passes = 3 if way.remat == "full" else 2

    def one(axes: Group) -> float:
        return sum_s(links, axes, block, 1)

    widths = layout.width_axes
    per_layer = one(widths["heads"]) + one(widths["ffn"])
    total = passes * (sizes.layers * per_layer + one(widths["vocab"]))
    return total * way.microbatches
