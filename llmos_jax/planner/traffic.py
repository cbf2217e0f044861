"""Turn a layout into the seconds its links are busy in one microbatch.

n tokens of one device and microbatch, D model, K H keys' width, C contexts, P stages, X
experts' ways, k experts of a token.

    weights    gathered before use over the axes that shard them, and their gradients
               scattered: three times the same bytes in compute dtype
    sums       gradients in parameter dtype, over the token axes that do not split them;
               inside a slice, then across slices
    blocks     what goes into attention and feed-forward is gathered over the axes that
               split a layer, and what comes out is scattered: as many bytes as two sums
               (Megatron, arXiv 1909.08053 and 2205.05198), and as many back
    keys       of a split sequence, passed around a ring in C - 1 hops, n 2 K H at a
               time, and in the backward pass with their gradients in float32; or
               gathered, and the gradients scattered
    exchanged  n k rows of D to their experts and back
    sent       n D to the next stage
    shared     the last stage's n D, in equal parts to all, for the loss: at every
               turn, but for `1f1b` only at those that end a microbatch
    staged     gradients of what every stage has, summed over stages once a step
    moved      layers to the stage that a circular schedule runs them on, in compute
               dtype, and their gradients back: all but 1 / P of a device's
    agreed     local steps: how far float32 parameters moved, summed over replicas once
               in that many steps

Known lies: rows of experts are evenly spread; the layers that a circular schedule moves
cross the middle of the stages as if each went to all.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.collectives import (
    HOP_S,
    Links,
    dcn_gather_s,
    dcn_rate,
    dcn_sum_s,
    exchange_s,
    gather_s,
    neighbour_s,
    sum_s,
)
from llmos_jax.planner.compute import compute_bytes, tensor_widths
from llmos_jax.planner.layout import Layout
from llmos_jax.planner.sizes import Sizes
from llmos_jax.planner.stored import dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Seconds to exchange the keys and values of a split sequence, all layers."""

    hop: float
    """One hop of the ring."""
    hop_back: float
    """One hop of their float32 gradients."""
    latency: float
    """Of one time around the ring."""
    gathered: float
    scattered: float
    """Gradients of what was gathered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Seconds that a pipeline sends, and over what."""

    over: str
    """`ici` or `dcn`."""
    sent: float
    shared: float
    staged: float
    moved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Seconds of one device over one microbatch; forward only, but for sums."""

    weights: float
    sums: float
    crossing: float
    """Sums of gradients across slices."""
    blocks: float
    keys: Keys
    exchanged: float
    stages: Stages
    agreed: float
    """A step's share, inside a slice."""
    agreed_crossing: float
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
    moves = layout.sharded * wide / max(1, workload.local_steps)
    is_alone = workload.local_steps > 0
    return Traffic(
        weights=_weights_s(layout, links, sizes, workload),
        sums=sum(
            sum_s(links, axes, elements * wide, 1)
            for axes, elements in layout.sums.items()
        ),
        crossing=sum(
            dcn_sum_s(topology, links, elements * wide)
            for axes, elements in layout.sums.items()
            if "data" in axes
        ),
        blocks=_blocks_s(layout, links, sizes, block, layers),
        keys=_keys(layout, links, sizes, topology, tokens, width),
        exchanged=2
        * _expert_layers(sizes, layout)
        * exchange_s(links, "expert", block * sizes.experts_per_token, 1),
        stages=_stages(layout, links, topology, workload, block),
        agreed=is_alone * sum_s(links, ("data",), moves, 1),
        agreed_crossing=is_alone * dcn_sum_s(topology, links, moves),
        offloaded={
            name: 2 * layers * size * tokens * width / host_rate
            for name, size in tensor_widths(layout, sizes).items()
        },
    )


def _weights_s(layout: Layout, links: Links, sizes: Sizes, workload: Workload) -> float:
    """Training gathers weights that are cast; few bits are gathered as they are."""
    width = compute_bytes(workload)
    gathered = {axes: elements * width for axes, elements in layout.gathers.items()}
    if sizes.is_quantized:
        gathered = layout.served.gathers
    return sum(
        gather_s(links, axes, size, sizes.layers) for axes, size in gathered.items()
    )


def _blocks_s(
    layout: Layout, links: Links, sizes: Sizes, block: float, layers: float
) -> float:
    axes = layout.width_axes
    seconds = layers * sum_s(links, axes["heads"], block, 1)
    seconds += layers * sum_s(links, axes["ffn"], block, 1)
    return seconds + sum_s(links, axes["vocab"], block / layout.mesh.stage, 1)


def _keys(
    layout: Layout,
    links: Links,
    sizes: Sizes,
    topology: Topology,
    tokens: float,
    width: int,
) -> Keys:
    C, layers = layout.mesh.context, sizes.layers / layout.mesh.stage
    if C == 1:
        return Keys(hop=0, hop_back=0, latency=0, gathered=0, scattered=0)
    held = tokens * 2 * sizes.kv_width / layout.width_ways["kv_heads"]

    def hop_s(size: float) -> float:
        return layers * (neighbour_s(links, topology, "context", size) - HOP_S)

    def whole_s(size: float) -> float:
        return layers * gather_s(links, ("context",), C * size, 1)

    return Keys(
        hop=hop_s(held * width),
        hop_back=hop_s(held * 4),
        latency=layers * (C - 1) * HOP_S,
        gathered=whole_s(held * width),
        scattered=whole_s(held * 4),
    )


def _stages(
    layout: Layout, links: Links, topology: Topology, workload: Workload, block: float
) -> Stages:
    P = layout.mesh.stage
    width, wide = compute_bytes(workload), dtype_bytes(workload.param_dtype)
    if P == 1:
        return Stages(over="ici", sent=0, shared=0, staged=0, moved=0)
    leaving = (layout.sharded - layout.unstaged) * (P - 1) / P * (width + wide)
    between = block / layout.residual_ways
    sent = neighbour_s(links, topology, "stage", between)
    if links.slices["stage"] > 1:
        return Stages(
            over="dcn",
            sent=sent,
            shared=dcn_gather_s(topology, links, "stage", between),
            staged=2 * dcn_gather_s(topology, links, "stage", layout.unstaged * wide),
            moved=leaving / dcn_rate(topology),
        )
    return Stages(
        over="ici",
        sent=sent,
        shared=gather_s(links, ("stage",), between, 1),
        staged=sum_s(links, ("stage",), layout.unstaged * wide, 1),
        moved=exchange_s(links, "stage", leaving, 1),
    )


def _expert_layers(sizes: Sizes, layout: Layout) -> float:
    layers = [item.layers for item in sizes.products if item.experts > 1]
    return max(layers, default=0) / layout.mesh.stage
