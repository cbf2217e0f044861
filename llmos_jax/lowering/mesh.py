"""Turn a plan's mesh sizes into a JAX Mesh over real (or compile-only) devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llmos_jax.errors import LowerError
from llmos_jax.ir import MESH_AXES, Plan


def device_mesh(plan: Plan, devices: Sequence[Any] | None = None) -> Mesh:
    """Place the plan's six axes on devices: ICI inside a slice; `data`, then `stage`,
    across slices.

    Args:
        plan: its mesh must cover exactly the devices.
        devices: jax devices; None takes all that are here.

    Raises:
        LowerError: the plan is for another number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = plan.mesh.sizes
    if plan.mesh.num_devices != len(devices):
        raise LowerError(
            f"the plan splits the work over {plan.mesh.num_devices} devices "
            f"({plan.topology.name}: {plan.mesh}), and {len(devices)} are here. "
            "Plan for this machine (leave `topology` out), or run where the plan fits."
        )
    return Mesh(
        _arrange(plan, devices, tuple(sizes.values())),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
    )


def _arrange(plan: Plan, devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    if devices[0].platform == "cpu":
        return np.array(devices).reshape(shape)
    slices = plan.topology.slices
    if slices == 1:
        return mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    over_data = math.gcd(plan.mesh.data, slices)
    across = [over_data, slices // over_data, *(1 for _ in shape[2:])]
    inside = [size // ways for size, ways in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )
