"""Turn down pins that mean nothing, or that cannot be on any mesh.

What depends on a mesh (does a dimension divide?) is found out by the search.
"""

from __future__ import annotations

import math

from llmos_jax.errors import ConfigError, PlanError, did_you_mean
from llmos_jax.ir.plan import EXCHANGES, SCHEDULES, Pins, saved_tensors
from llmos_jax.ir.rules import MESH_AXES
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.candidates import remat_named
from llmos_jax.rules.resolve import nearest_text

DTYPES = ("float32", "bfloat16")


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
        near = nearest_text(tuple(pins.mesh or ()), devices, pinned)
        raise PlanError(
            f"the pinned mesh {named} covers {pinned} devices, which does not divide "
            f"the {devices} of {topology.name}; {near}. Change or remove a plan.mesh "
            "pin."
        )
    _check_saved(remat_named(pins.remat or "none"), pins.offload or ())
    _check_schedule(pins)
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
        near = nearest_text(("microbatches",), workload.global_batch, parts)
        raise PlanError(
            f"plan.microbatches = {parts} does not divide batch.global = "
            f"{workload.global_batch}; {near}."
        )


def _check_schedule(pins: Pins) -> None:
    """Raise for a schedule or an exchange that is none, or that orders nothing."""
    for key, known, axis in (
        ("schedule", SCHEDULES, "stage"),
        ("context_exchange", EXCHANGES, "context"),
    ):
        name = getattr(pins, key)
        if name is None:
            continue
        if name not in known:
            raise ConfigError(
                f"plan.{key} = {name!r}; it is one of {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
        if (pins.mesh or {}).get(axis, 1) == 1:
            raise PlanError(
                f"plan.{key} = {name!r} means nothing without plan.mesh.{axis} above "
                f"1. Pin that too, or leave plan.{key} out."
            )
    rounds, stages = pins.rounds, (pins.mesh or {}).get("stage", 1)
    if pins.offload and stages > 1:
        raise PlanError(
            f"plan.offload = {', '.join(pins.offload)} cannot be in a pipeline "
            f"(stage={stages}): the TPU compiler refuses it. Leave plan.offload out, "
            "or set plan.mesh.stage=1."
        )
    if rounds is not None and rounds < 1:
        raise ConfigError(f"plan.rounds = {rounds}; it must be at least 1.")
    if rounds is not None and rounds > 1 and pins.schedule != "circular":
        raise PlanError(
            f"plan.rounds = {rounds} needs plan.schedule = 'circular': other schedules "
            "pass each stage once."
        )
    parts = pins.microbatches
    if parts is not None and parts % stages:
        raise PlanError(
            f"plan.microbatches = {parts} is not a multiple of stage={stages}; "
            f"nearest: {_multiples(parts, stages)}."
        )


def check_layers(pins: Pins, layers: int) -> None:
    """Raise PlanError for rounds that do not divide a stage's layers."""
    stages, rounds = (pins.mesh or {}).get("stage", 1), pins.rounds or 1
    if layers % stages == 0 and layers // stages % rounds:
        near = nearest_text(("rounds",), layers // stages, rounds)
        raise PlanError(
            f"layers = {layers} is not divisible by stage={stages} x rounds={rounds}; "
            f"{near}."
        )


def _multiples(number: int, of: int) -> str:
    """The multiples of `of` around `number`, as pins."""
    below = number // of * of
    near = [below, below + of] if below else [of]
    return " or ".join(f"microbatches={count}" for count in near)


def _check_saved(remat: str, offload: tuple[str, ...]) -> None:
    saved = saved_tensors(remat)
    for name in offload:
        if name not in saved:
            raise PlanError(
                f"plan.offload has {name!r}, which remat = {remat} does not save. Add "
                f"it to plan.remat, or leave it out.{did_you_mean(name, saved)}"
            )
