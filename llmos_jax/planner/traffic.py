"""Turn a layout into the seconds its links are busy in one microbatch.

    weights    gathered before use over the axes that shard them, and their gradients
               scattered: three times the same bytes in compute dtype
    sums       gradients in parameter dtype, over the token axes that do not split them;
               inside a slice, then across slices
    blocks     outputs of attention and feed-forward over the axes that split a layer:
               two sums there, two back (Megatron, arXiv 1909.08053), and half of that
               again where the forward pass is recomputed
    exchanged  tokens to their experts and back
    permuted   a stage's output to the next stage

Known lies: keys and values of a split sequence are gathered, not passed around a ring.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.collectives import (
    Links,
    dcn_rate,
    dcn_sum_s,
    exchange_s,
    gather_s,
    sum_s,
)
from llmos_jax.planner.compute import compute_bytes, tensor_widths
from llmos_jax.planner.layout import Layout, dtype_bytes
from llmos_jax.planner.sizes import Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Seconds of one device over one microbatch; forward only, but for sums."""

    weights: float
    sums: float
    crossing: float
    """Sums of gradients across slices."""
    blocks: float
    exchanged: float
    permuted: float
    offloaded: dict[str, float]
    """Saved tensor -> seconds to host memory and back."""


def traffic_of(
    layout: Layout,
    links: Links,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
    parts: int,
) -> Traffic:
    """Return the seconds over one of `parts` microbatches."""
    width, wide = compute_bytes(workload), dtype_bytes(workload.param_dtype)
    tokens = workload.tokens / layout.token_ways / parts
    block = tokens * sizes.embed * width
    layers = sizes.layers / layout.mesh.stage
    chip = topology.chip
    host_rate = chip.host_bytes_per_s / chip.devices_per_chip
    return Traffic(
        weights=sum(
            gather_s(links, axes, elements * width, sizes.layers)
            for axes, elements in layout.gathers.items()
        ),
        sums=sum(
            sum_s(links, axes, elements * wide, 1)
            for axes, elements in layout.sums.items()
        ),
        crossing=sum(
            dcn_sum_s(topology, links, elements * wide)
            for axes, elements in layout.sums.items()
            if "data" in axes
        ),
        blocks=_blocks_s(layout, links, sizes, tokens, width, layers),
        exchanged=2
        * _expert_layers(sizes, layout)
        * exchange_s(links, "expert", block * sizes.experts_per_token, 1),
        permuted=_permuted_s(links, topology, block),
        offloaded={
            name: 2 * layers * size * tokens * width / host_rate
            for name, size in tensor_widths(layout, sizes).items()
        },
    )


def _blocks_s(
    layout: Layout,
    links: Links,
    sizes: Sizes,
    tokens: float,
    width: int,
    layers: float,
) -> float:
    block = tokens * sizes.embed * width
    axes = layout.width_axes
    seconds = layers * sum_s(links, axes["heads"], block, 1)
    seconds += layers * sum_s(links, axes["ffn"], block, 1)
    seconds += sum_s(links, axes["vocab"], block, 1)
    if layout.mesh.context > 1:
        kv_width = 2 * sizes.kv_width / layout.width_ways["kv_heads"]
        whole = tokens * layout.mesh.context * kv_width * width
        seconds += layers * gather_s(links, ("context",), whole, 1)
    return seconds


def _permuted_s(links: Links, topology: Topology, block: float) -> float:
    if links.slices["stage"] > 1:
        return block / dcn_rate(topology)
    link = links["stage"]
    return block / link.bytes_per_s if link.ways > 1 else 0.0


def _expert_layers(sizes: Sizes, layout: Layout) -> float:
    layers = [item.layers for item in sizes.products if item.experts > 1]
    return max(layers, default=0) / layout.mesh.stage
