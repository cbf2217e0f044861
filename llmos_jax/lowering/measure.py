"""Turn the devices here into what they reach: matmuls, memory, links, as shares of a
data sheet.

About a second on an accelerator, each figure from a few repeats after one that compiles
and warms up. Kept in the cache folder by kind and number of devices and by
versions, so a plan measures once and later plans agree with it.

Known lies: one size each, large enough to be limited by what is measured; the links are
those of this process's devices together, and the data sheet's where there is only one.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llmos_jax.ir import MeshShape, Topology
from llmos_jax.lowering.devices import measure_matmul_flops_per_s
from llmos_jax.places import cache_folder
from llmos_jax.planner.collectives import gather_s, links_of
from llmos_jax.telemetry import log

REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What is computed, copied and gathered."""

    dtype: str
    matmul: int
    """Side of square matrices."""
    copy_bytes: int
    gather_bytes: int
    """Of the whole array."""


_ON_CHIPS = _Sizes(dtype="bfloat16", matmul=8192, copy_bytes=2**29, gather_bytes=2**28)
"""1 to 6 ms each on the chips of hardware/chips.py: far above what a dispatch takes."""
_ON_CPU = _Sizes(dtype="float32", matmul=1024, copy_bytes=2**26, gather_bytes=2**24)
"""Tens of milliseconds on one core; the copy is larger than its caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one device here reaches."""

    matmul_flops_per_s: float
    """bfloat16; float32 on a CPU."""
    hbm_bytes_per_s: float
    """Read and written."""
    gather_s: float | None
    """To gather `gather_bytes` over all devices; None where there is only one."""
    gather_bytes: int

    def efficiencies(self, topology: Topology) -> dict[str, float]:
        """Shares of the data sheet, at most 1, under the names of Chip's fields."""
        chip = topology.chip
        dtype = _ON_CPU.dtype if chip.vendor == "cpu" else _ON_CHIPS.dtype
        hbm = chip.hbm_bytes_per_s / chip.devices_per_chip
        found = {
            "matmul_efficiency": self.matmul_flops_per_s
            / topology.peak_flops_per_s(dtype),
            "hbm_efficiency": self.hbm_bytes_per_s / hbm,
        }
        if self.gather_s is not None:
            best = _best_gather_s(topology, self.gather_bytes)
            found["link_efficiency"] = best / self.gather_s
        return {name: min(1.0, share) for name, share in found.items()}


def measure(devices: Sequence[Any] | None = None) -> Measured:
    """Measure the devices of this process, or those named."""
    devices = list(jax.local_devices() if devices is None else devices)
    sizes = _ON_CPU if devices[0].platform == "cpu" else _ON_CHIPS
    return Measured(
        matmul_flops_per_s=measure_matmul_flops_per_s(
            sizes.matmul, REPEATS, sizes.dtype, devices[0]
        ),
        hbm_bytes_per_s=_copy_bytes_per_s(devices[0], sizes),
        gather_s=_gather_s(devices, sizes) if len(devices) > 1 else None,
        gather_bytes=sizes.gather_bytes,
    )


def measured_topology(
    topology: Topology, measuring: Callable[[], Measured] = measure
) -> Topology:
    """Return the machine here with measured efficiencies, from the cache if they are.

    Simulated devices stay nominal, since they share what would be measured; so do the
    machines of several processes, all of which must come to one plan.

    Args:
        topology: of all devices here.
        measuring: called if nothing is cached.
    """
    if topology.chip.vendor == "cpu" or jax.process_count() > 1:
        return topology
    found = _cached(_cache_path(topology), measuring)
    return with_efficiencies(topology, found)


def with_efficiencies(topology: Topology, found: Measured) -> Topology:
    """Return a machine whose chip does as well as was measured, under the same name."""
    shares = found.efficiencies(topology)
    chip = replace(
        topology.chip,
        matmul_efficiency=shares["matmul_efficiency"],
        hbm_efficiency=shares["hbm_efficiency"],
        link_efficiency=shares.get("link_efficiency", topology.chip.link_efficiency),
        is_measured=True,
        source=f"{topology.chip.source}; efficiencies measured on this machine",
    )
    return replace(topology, chip=chip)


def _cached(path: Path, measuring: Callable[[], Measured]) -> Measured:
    try:
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        # Absent, or of another release: measured afresh and written over.
        found = measuring()
    text = json.dumps(asdict(found), indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as problem:
        log(f"{path} cannot be written ({problem.strerror}): measured again next time.")
    return found


def _cache_path(topology: Topology) -> Path:
    device = jax.local_devices()[0]
    known = [
        *(device.device_kind, topology.name, topology.num_devices),
        *(jax.__version__, device.client.platform_version),
    ]
    here = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    return cache_folder() / "measured" / f"{topology.chip.name}-{here}.json"


def _copy_bytes_per_s(device: Any, sizes: _Sizes) -> float:
    row = jnp.zeros((sizes.copy_bytes // 4,), jnp.float32)
    moved = jax.jit(lambda a: a + jnp.float32(1))
    return 2 * sizes.copy_bytes / _median_s(moved, jax.device_put(row, device))


def _gather_s(devices: list[Any], sizes: _Sizes) -> float:
    mesh = Mesh(np.array(devices), ("all",))
    rows = sizes.gather_bytes // 4 // len(devices) * len(devices)
    split = jax.device_put(
        jnp.zeros((rows,), jnp.float32), NamedSharding(mesh, jax.P("all"))
    )
    whole = NamedSharding(mesh, jax.P())
    return _median_s(jax.jit(lambda a: a, out_shardings=whole), split)


def _best_gather_s(topology: Topology, gather_bytes: int) -> float:
    """What the planner expects of links that lose nothing."""
    lossless = replace(topology, chip=replace(topology.chip, link_efficiency=1.0))
    mesh = MeshShape(fsdp=topology.num_devices)
    return gather_s(links_of(lossless, mesh), ("fsdp",), gather_bytes, 1)


def _median_s(function: Callable[[jax.Array], jax.Array], value: jax.Array) -> float:
    jax.block_until_ready(function(value))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(value))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
