"""Turn a layout into the seconds of one decode step: one new token per sequence.

A step streams every weight a device holds past B tokens, reads the cache, and sums the
outputs of attention and feed-forward over the devices that share a layer:

    product   the longer of its bytes from memory and its FLOPs, plus `UNHIDDEN` of the
              shorter: they overlap, not fully
    cache     2 L K H S elements per sequence (and scales, if they are int8), of which
              half are filled on average over a sequence's life; a ragged kernel reads
              no more (jax-llm-examples, llama3)
    sums      two per layer of B x D over the tensor axis; their latency hides behind
              the weights of the next product, their bandwidth does not

Checked against the 23 decode speeds of Llama-3.1-70B with int8 weights and cache on
v5e-16 (jax-llm-examples llama3/README.md, jax 0.6.0): tools/bench/planner_decode.py.

Tokens that are quantized on their way into a product are multiplied at the peak of
that dtype, where a chip has one.

Known lies: sampling, scheduling and the host cost nothing; weights in another dtype
than the compute dtype are converted for free, tokens are quantized for free; prompts
are not prefilled in between.
"""

from __future__ import annotations

from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.collectives import HOP_S, Links, exchange_s, gather_s
from llmos_jax.planner.compute import multiplied_in
from llmos_jax.planner.layout import Layout
from llmos_jax.planner.sizes import Product, Sizes
from llmos_jax.planner.stored import dtype_bytes

STREAM = 0.97
"""Share of memory bandwidth that reading weights reaches. TP16 at batch 8 keeps 85 %
of 819 GB/s while it also reads the cache and sums 160 times (llama3/README.md)."""

UNHIDDEN = 0.28
"""Share of the shorter of a product's two times that does not hide behind the longer;
fitted to the same table."""

FILLED = 0.5
"""Of a cache that is made for `seq_len` tokens, over the life of its sequence."""


def decode_s(
    layout: Layout,
    links: Links,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
) -> tuple[dict[str, float], float]:
    """Return the seconds each resource is busy, and those of the step."""
    tokens = workload.tokens / layout.batch_ways
    read_s = math_s = products_s = 0.0
    for product in sizes.products:
        read, work = _product_s(product, tokens, layout, topology, workload)
        read_s += read
        math_s += work
        products_s += max(read, work) + UNHIDDEN * min(read, work)
    cache_s = _cache_s(layout, sizes, topology, workload)
    sums_s, sum_hops = _sums(layout, links, sizes, workload, tokens)
    weights_s = _gathers_s(layout, links, sizes)
    latency_s = max(0.0, sum_hops * HOP_S - products_s)
    step_s = products_s + cache_s + sums_s + weights_s + latency_s
    seconds = {
        "compute": math_s,
        "hbm": read_s + cache_s,
        "ici": sums_s + weights_s + latency_s,
        "dcn": 0.0,
        "host": 0.0,
    }
    return seconds, step_s


def _product_s(
    product: Product,
    tokens: float,
    layout: Layout,
    topology: Topology,
    workload: Workload,
) -> tuple[float, float]:
    """Seconds to read a product's weights, and to multiply, over all its layers."""
    ways = layout.width_ways
    size = product.summed / ways.get(product.summed_axis or "", 1)
    size *= product.made / ways.get(product.made_axis or "", 1)
    layers = product.layers / layout.mesh.stage
    chosen = min(product.experts, tokens * layout.mesh.expert * product.chosen)
    held = max(1.0, chosen / layout.mesh.expert)
    few_bits = product.few_bits
    stored = few_bits.bytes_ if few_bits else dtype_bytes(workload.param_dtype)
    read = layers * held * size * stored
    flops = 2 * tokens * product.chosen * layers * size
    peak = topology.peak_flops_per_s(multiplied_in(product, workload))
    return (
        read / _stream_rate(topology),
        flops / (peak * topology.chip.matmul_efficiency),
    )


def _cache_s(
    layout: Layout, sizes: Sizes, topology: Topology, workload: Workload
) -> float:
    token = sizes.cached_bytes(workload.kv_dtype) / layout.width_ways["kv_heads"]
    sequences = workload.global_batch / layout.batch_ways
    filled = sequences * workload.seq_len * FILLED
    layers = sizes.layers / layout.mesh.stage
    read = layers * token * filled
    return read / _stream_rate(topology)


def _sums(
    layout: Layout, links: Links, sizes: Sizes, workload: Workload, tokens: float
) -> tuple[float, float]:
    """Seconds to sum over the tensor axis by bandwidth, and the hops of all sums."""
    block = tokens * sizes.embed * dtype_bytes(workload.compute_dtype)
    seconds = hops = 0.0
    for name in ("heads", "ffn"):
        used = [axis for axis in layout.width_axes[name] if links[axis].ways > 1]
        seconds += 2 * sizes.layers * gather_s(links, tuple(used), block, 0)
        hops += 2 * sizes.layers * sum(links[axis].hops for axis in used)
    routed = block * sizes.experts_per_token
    seconds += 2 * sizes.layers * exchange_s(links, "expert", routed, 1)
    return seconds, hops


def _gathers_s(layout: Layout, links: Links, sizes: Sizes) -> float:
    """Weights that are kept in shards are gathered for every token."""
    return sum(
        gather_s(links, axes, size, sizes.layers)
        for axes, size in layout.served.gathers.items()
    )


def _stream_rate(topology: Topology) -> float:
    chip = topology.chip
    return chip.hbm_bytes_per_s * STREAM / chip.devices_per_chip
