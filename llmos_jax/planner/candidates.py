"""Turn a machine and pins into meshes, and a mesh into ways to run the step on it.

Free axes are data, fsdp and tensor. stage, context and expert are planned where they
are pinned: what they cost is known, and the programs that run them are not here yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from llmos_jax.errors import ConfigError, PlanError, did_you_mean
from llmos_jax.ir.plan import MeshShape, Pins, Way, saved_tensors
from llmos_jax.ir.rules import MESH_AXES
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload

SEARCHED = ("data", "fsdp", "tensor")
POLICIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "none": ((),),
    "dots": ((),),
    "attention": ((),),
    "full": ((), ("layer_input",)),
}
"""Remat policies that are tried, from most saved to least, each with what may wait in
host memory meanwhile. MaxText's hand-tuned configurations offload the layer's input
first (benchmarks/maxtext_trillium_model_configs.py). More can be pinned: with queries,
keys, values and context too, llama3_8b on v6e:2x4, 24 x 8192, was estimated at 24.2 GiB
and needed 32.3 by the compiler's word (`plan --verify compile`)."""

ALIASES = {"minimal": "dots", "nothing": "full", "everything": "none"}
"""Names that MaxText and AXLearn give to the same policies."""

DTYPES = ("float32", "bfloat16")
HEAD_BYTES = 2**30
"""Float32 gradient of one device's head that may exist whole while the loss is cut by
tokens; beyond, it is cut by the vocabulary, which makes the logits twice: 2 D V more
FLOPs a token beside the step's 6 N. A judgement."""

TILE_BYTES = 512 * 2**20
"""Float32 logits of one device that may exist at one time; beyond, the loss is tiled.
A judgement: small beside 16 GiB, large enough that each tile is a full-sized matmul."""


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
    pinned, devices = math.prod((pins.mesh or {}).values()), topology.num_devices
    if devices % pinned:
        named = " x ".join(f"{axis}={size}" for axis, size in (pins.mesh or {}).items())
        raise PlanError(
            f"the pinned mesh {named} covers {pinned} devices, which does not divide "
            f"the {devices} of {topology.name}. Change or remove a plan.mesh pin."
        )
    _check_saved(remat_named(pins.remat or "none"), pins.offload or ())
    for key in ("state_dtype", "gradient_dtype"):
        dtype = getattr(pins, key)
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(
                f"plan.{key} = {dtype!r}; it is float32 or bfloat16."
                f"{did_you_mean(dtype, DTYPES)}"
            )
    if pins.loss_tiles is not None and pins.loss_tiles < 1:
        raise ConfigError(f"plan.loss_tiles = {pins.loss_tiles}; at least 1.")
    parts = pins.microbatches
    if parts is not None and parts < 1:
        raise ConfigError(f"plan.microbatches = {parts}; it must be at least 1.")
    if parts is not None and workload.global_batch % parts:
        raise PlanError(
            f"plan.microbatches = {parts} does not divide batch.global = "
            f"{workload.global_batch}."
        )


def remat_named(name: str) -> str:
    """Return our name of a policy that other systems call otherwise."""
    return ALIASES.get(name, name)


def enumerate_meshes(topology: Topology, pins: Pins) -> list[MeshShape]:
    """Return every mesh over all devices that agrees with the pins."""
    pinned = pins.mesh or {}
    fixed = MeshShape(**{a: n for a, n in pinned.items() if a not in SEARCHED})
    devices = topology.num_devices // fixed.num_devices
    meshes = [
        replace(fixed, data=devices // ways // tensor, fsdp=ways, tensor=tensor)
        for tensor in _divisors(devices)
        for ways in _divisors(devices // tensor)
    ]
    return [
        mesh
        for mesh in meshes
        if all(mesh.sizes[axis] == size for axis, size in pinned.items())
    ]


def ways_of(
    mesh: MeshShape,
    share: int,
    logit_bytes: float,
    head_bytes: float,
    topology: Topology,
    workload: Workload,
    pins: Pins,
) -> Iterator[list[Way]]:
    """Yield the ways to run on `mesh`, in groups that differ in microbatches alone.

    Within a group the first is the fastest and the last takes the least memory.

    Args:
        mesh: a mesh of all devices.
        share: sequences of the batch that each replica has.
        logit_bytes: float32 logits of one device for one sequence.
        head_bytes: the head of one device, gathered, in float32.
        topology: a CPU has no other memory to offload to.
        workload: only training has something to save or to cut.
        pins: decisions already made.
    """
    if workload.phase != "train":
        yield [Way(mesh=mesh)]
        return
    powers = [2**power for power in range(share.bit_length()) if share % 2**power == 0]
    counts = [pins.microbatches] if pins.microbatches else powers
    for remat, offload in _policies(topology, pins):
        yield [
            Way(
                mesh=mesh,
                remat=remat,
                offload=offload,
                microbatches=count,
                loss_tiles=pins.loss_tiles or _tiles(share / count * logit_bytes),
                loss_over="tokens" if head_bytes <= HEAD_BYTES else "vocab",
                state_dtype=pins.state_dtype or "float32",
                gradient_dtype=pins.gradient_dtype or "float32",
            )
            for count in counts
        ]


def _policies(topology: Topology, pins: Pins) -> list[tuple[str, tuple[str, ...]]]:
    """(remat, offload) pairs to try."""
    if pins.remat is not None:
        remat = remat_named(pins.remat)
        tried = {remat: POLICIES.get(remat, ((),))}
    else:
        tried = POLICIES
    if pins.offload is not None:
        return [(name, pins.offload) for name in tried if _saves(name, pins.offload)]
    return [
        (name, offload)
        for name, choices in tried.items()
        for offload in choices
        if not offload or topology.chip.vendor != "cpu"
    ]


def _saves(remat: str, offload: tuple[str, ...]) -> bool:
    return set(offload) <= saved_tensors(remat)


def _check_saved(remat: str, offload: tuple[str, ...]) -> None:
    saved = saved_tensors(remat)
    for name in offload:
        if name not in saved:
            raise PlanError(
                f"plan.offload has {name!r}, which remat = {remat} does not save. Add "
                f"it to plan.remat, or leave it out.{did_you_mean(name, saved)}"
            )


def _tiles(logit_bytes: float) -> int:
    """The power of two that cuts this device's logits to at most TILE_BYTES."""
    return 1 << max(0, math.ceil(math.log2(max(1.0, logit_bytes / TILE_BYTES))))


def _divisors(number: int) -> list[int]:
    low = [small for small in range(1, math.isqrt(number) + 1) if number % small == 0]
    return sorted({*low, *(number // small for small in low)})
