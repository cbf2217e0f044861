"""Turn a machine and pins into meshes, and a mesh into ways to run the step on it.

This release searches data, fsdp and tensor; stage, context and expert stay 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmos_jax.errors import ConfigError, PlanError, did_you_mean
from llmos_jax.ir.plan import MeshShape, Pins
from llmos_jax.ir.rules import MESH_AXES
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload

SEARCHED = ("data", "fsdp", "tensor")
REMATS = ("none", "dots", "full")
"""What a backward pass finds saved: everything, the matmuls, or each layer's input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run the step: a mesh, a remat policy, a number of microbatches."""

    mesh: MeshShape
    remat: str
    microbatches: int

    def __str__(self) -> str:
        return f"{self.mesh}, remat={self.remat}, microbatches={self.microbatches}"


def check_pins(pins: Pins, topology: Topology, workload: Workload) -> None:
    """Raise ConfigError for a pin that means nothing, PlanError for one that cannot
    be."""
    for axis, size in (pins.mesh or {}).items():
        if axis not in MESH_AXES:
            hint = did_you_mean(axis, MESH_AXES)
            raise ConfigError(
                f"plan.mesh.{axis}: there is no mesh axis {axis!r}.{hint}"
            )
        if size < 1:
            raise ConfigError(f"plan.mesh.{axis} = {size}; it must be at least 1.")
        if axis not in SEARCHED and size > 1:
            raise PlanError(
                f"plan.mesh.{axis} = {size}: this release plans {', '.join(SEARCHED)} "
                f"only; leave {axis} at 1."
            )
    pinned, devices = math.prod((pins.mesh or {}).values()), topology.num_devices
    if devices % pinned:
        named = " x ".join(f"{axis}={size}" for axis, size in (pins.mesh or {}).items())
        raise PlanError(
            f"the pinned mesh {named} covers {pinned} devices, which does not divide "
            f"the {devices} of {topology.name}. Change or remove a plan.mesh pin."
        )
    if pins.remat is not None and pins.remat not in REMATS:
        hint = did_you_mean(pins.remat, REMATS)
        raise ConfigError(f"plan.remat = {pins.remat!r} is not known.{hint}")
    parts = pins.microbatches
    if parts is not None and parts < 1:
        raise ConfigError(f"plan.microbatches = {parts}; it must be at least 1.")
    if parts is not None and workload.global_batch % parts:
        raise PlanError(
            f"plan.microbatches = {parts} does not divide batch.global = "
            f"{workload.global_batch}."
        )


def enumerate_meshes(topology: Topology, pins: Pins) -> list[MeshShape]:
    """Return every mesh over all devices that agrees with the pins."""
    devices = topology.num_devices
    meshes = [
        MeshShape(data=devices // ways // tensor, fsdp=ways, tensor=tensor)
        for tensor in _divisors(devices)
        for ways in _divisors(devices // tensor)
    ]
    pinned = pins.mesh or {}
    return [
        mesh
        for mesh in meshes
        if all(mesh.sizes[axis] == size for axis, size in pinned.items())
    ]


def ways_of(mesh: MeshShape, share: int, workload: Workload, pins: Pins) -> list[Way]:
    """Return the ways to run on `mesh`, of whose batch each replica has `share`.

    Microbatches are the powers of two that divide the share, or the pinned number. Only
    training has something to save or to cut.
    """
    if workload.phase != "train":
        return [Way(mesh=mesh, remat="none", microbatches=1)]
    powers = [2**power for power in range(share.bit_length()) if share % 2**power == 0]
    counts = [pins.microbatches] if pins.microbatches else powers
    remats = [pins.remat] if pins.remat else REMATS
    return [
        Way(mesh=mesh, remat=remat, microbatches=count)
        for remat in remats
        for count in counts
    ]


def _divisors(number: int) -> list[int]:
    low = [small for small in range(1, math.isqrt(number) + 1) if number % small == 0]
    return sorted({*low, *(number // small for small in low)})
