"""Turn a topology and a mesh into the seconds a collective takes.

Over a torus (scaling-book, sharding.md), V = bytes of the whole array, n = devices and
W = what all links of the mesh axis carry both ways: gather = scatter = V (n-1)/n / W,
sum = twice that, and never less than one hop of 1 us per step around the ring. An axis
that does not close halves W. Over NVLink, W is the egress of one GPU. Mesh axes take
the torus in the order tensor, fsdp, data: a whole physical axis where one fits, else a
part of one, which is a line.

Known lies: no contention between collectives; several axes add their links up; the two
devices of a tpu7x chip share its links evenly; what crosses DCN is spread over all
chips.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from llmos_jax.ir.plan import MeshShape
from llmos_jax.ir.topology import Topology
from llmos_jax.planner.layout import Group

HOP_S = 1e-6
"""Latency of one ICI hop (scaling-book, tpus.md)."""

DCN_EFFICIENCY = 0.33
"""microbench, v6e: psum over DCN at 4.1 GB/s where 12.5 GB/s are there per chip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What one mesh axis has inside a slice: devices, bytes/s per device, ring
    steps."""

    ways: int
    bytes_per_s: float
    hops: float


Links = dict[str, Link]


def links_of(topology: Topology, mesh: MeshShape) -> Links:
    """Return the link of every mesh axis; `data` counts its part inside one slice."""
    inside = {**mesh.sizes, "data": mesh.data // topology.slices}
    free = [
        _Dim(size=size, closes=closes)
        for size, closes in zip(topology.shape, topology.wraps, strict=True)
    ]
    if topology.chip.devices_per_chip > 1:
        free.append(_Dim(size=topology.chip.devices_per_chip, closes=False))
    order = [axis for axis in reversed(mesh.sizes) if axis != "data"] + ["data"]
    links = {}
    for axis in order:
        taken, free = _take(inside[axis], free)
        links[axis] = _link(topology, inside[axis], taken)
    return links


def gather_s(links: Links, axes: Group, whole_bytes: float, count: float) -> float:
    """Seconds to gather (or scatter) `whole_bytes` over mesh axes in `count` pieces."""
    used = [links[axis] for axis in axes if links[axis].ways > 1]
    if not used:
        return 0.0
    ways = math.prod(link.ways for link in used)
    rate = sum(link.bytes_per_s for link in used)
    latency = count * HOP_S * sum(link.hops for link in used)
    return max(whole_bytes * (ways - 1) / ways / rate, latency)


def sum_s(links: Links, axes: Group, whole_bytes: float, count: float) -> float:
    """Seconds to sum `whole_bytes` over mesh axes: a scatter, then a gather."""
    return 2 * gather_s(links, axes, whole_bytes, count)


def dcn_sum_s(topology: Topology, links: Links, gradient_bytes: float) -> float:
    """Seconds to sum a device's gradients over slices, once they are summed inside."""
    if topology.slices == 1:
        return 0.0
    shard = gradient_bytes / links["data"].ways
    crossing = 2 * shard * (topology.slices - 1) / topology.slices
    rate = topology.chip.dcn_bytes_per_s / topology.chip.devices_per_chip
    return crossing / (rate * DCN_EFFICIENCY)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dim:
    """A physical axis, or what is left of one."""

    size: int
    closes: bool


def _take(ways: int, free: list[_Dim]) -> tuple[list[_Dim], list[_Dim]]:
    """Give `ways` devices whole physical axes, the most there are, else parts."""
    for count in range(len(free), 0, -1):
        for chosen in itertools.combinations(range(len(free)), count):
            taken = [free[index] for index in chosen]
            if math.prod(dim.size for dim in taken) == ways:
                left = [dim for i, dim in enumerate(free) if i not in chosen]
                return taken, left
    taken, left, wanted = [], [], ways
    for dim in sorted(free, key=lambda dim: dim.size, reverse=True):
        part = math.gcd(wanted, dim.size)
        wanted //= part
        if part > 1:
            taken.append(_Dim(size=part, closes=dim.closes and part == dim.size))
        if part < dim.size:
            closes = dim.closes and part == 1
            left.append(_Dim(size=dim.size // part, closes=closes))
    return taken, left


def _link(topology: Topology, ways: int, taken: list[_Dim]) -> Link:
    chip = topology.chip
    rate = chip.link_bytes_per_s * chip.link_efficiency / chip.devices_per_chip
    real = [dim for dim in taken if dim.size > 1]
    if chip.torus_dims == 0:
        return Link(ways=ways, bytes_per_s=rate, hops=1)
    both_ways = sum(2 if dim.closes else 1 for dim in real)
    hops = sum(dim.size / 2 if dim.closes else dim.size - 1 for dim in real)
    return Link(ways=ways, bytes_per_s=rate * max(1, both_ways), hops=hops)
