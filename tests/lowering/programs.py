"""A small training step with planned weights, for tests that look at compiled code.

L layers of x + relu(x up) down, scanned, with a squared loss: weights as a Llama-family
model splits them, and a hook that a test uses to do something wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llmos_jax import planner
from llmos_jax.ir import MESH_AXES, ParamRow, ParamTable, Pins, Plan, Rules, Workload
from llmos_jax.lowering import device_mesh

L, D, F = 4, 128, 384
B, T = 16, 48
"""Tokens of a device never match a weight's size: 96 divides 128 x 384 into 512."""

RULES = Rules(
    family="toy",
    weights={"layers": ("stage",), "embed": ("fsdp",), "norm": (), "ffn": ("tensor",)},
    activations={
        "batch": ("data", "fsdp"),
        "seq": (),
        "embed": (),
        "ffn": ("tensor",),
    },
)
"""What sharding_rules/llama.toml says of these axes."""

Weights = dict[str, jax.Array]
Hook = Callable[[Any, Mesh], Any]


def table() -> ParamTable:
    """Two stacked matrices and a norm."""
    rows = {
        "layers.down": ((L, F, D), ("layers", "ffn", "embed")),
        "layers.norm": ((L, D), ("layers", "norm")),
        "layers.up": ((L, D, F), ("layers", "embed", "ffn")),
    }
    return ParamTable(
        name="toy",
        rows=tuple(
            ParamRow(path=path, shape=shape, dtype="float32", axes=axes)
            for path, (shape, axes) in rows.items()
        ),
    )


def plan_of(topology: str, **mesh: int) -> Plan:
    """The plan of the step below on a mesh."""
    return planner.plan(
        table(),
        topology,
        Workload(phase="train", global_batch=B, seq_len=T),
        RULES,
        Pins(mesh=mesh),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrongs:
    """What a test may do wrong; each hook gets the value and the mesh."""

    stacked: Hook = lambda value, mesh: value
    """To all weights, before the scan."""
    layer: Hook = lambda value, mesh: value
    """To one layer's weights, inside it."""
    x: Hook = lambda value, mesh: value
    """To the activations between layers."""
    keep: Hook = lambda value, mesh: value
    """To the PartitionSpec of each weight."""


def compiled_text(
    plan: Plan,
    devices: list[Any] | None = None,
    mesh: Mesh | None = None,
    wrongs: Wrongs | None = None,
) -> tuple[str, Mesh]:
    """Compile the step for a plan; return the optimized HLO and its mesh."""
    mesh = device_mesh(plan, devices) if mesh is None else mesh
    wrongs = wrongs or Wrongs()
    batch = tuple(axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1)
    rows = NamedSharding(mesh, jax.P(batch or None))
    shardings = {
        path: NamedSharding(mesh, wrongs.keep(jax.P(*spec), mesh))
        for path, spec in plan.specs.items()
    }

    def body(x: jax.Array, layer: Weights) -> tuple[jax.Array, None]:
        layer = wrongs.layer(layer, mesh)
        scaled = x * layer["layers.norm"].astype(x.dtype)[None, None, :]
        hidden = jax.nn.relu(scaled @ layer["layers.up"])
        x = x + hidden @ layer["layers.down"]
        x = jax.lax.with_sharding_constraint(x, rows)
        return wrongs.x(x, mesh), None

    def loss(weights: Weights, x: jax.Array) -> jax.Array:
        cast = {path: value.astype(jnp.bfloat16) for path, value in weights.items()}
        cast = wrongs.stacked(cast, mesh)
        x, _ = jax.lax.scan(jax.checkpoint(body), x.astype(jnp.bfloat16), cast)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def step(weights: Weights, x: jax.Array) -> tuple[Weights, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(weights, x)
        rate = jnp.float32(1e-3)
        return jax.tree.map(lambda w, g: w - rate * g, weights, gradients), value

    abstract = {
        row.path: jax.ShapeDtypeStruct(
            row.shape, jnp.float32, sharding=shardings[row.path]
        )
        for row in plan.params.rows
    }
    x = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=rows)
    whole = NamedSharding(mesh, jax.P())
    jitted = jax.jit(step, out_shardings=(shardings, whole))
    return jitted.lower(abstract, x).compile().as_text(), mesh


def tpu_devices(name: str, **options: Any) -> list[Any]:
    """Compile-only devices of a TPU topology; libtpu may be loaded elsewhere, too."""
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="tpu", topology_name=name, **options
    ).devices
    return list(found)


def mesh_of(devices: list[Any], **sizes: int) -> Mesh:
    """A mesh of the six axes over devices in the order given."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=kinds)
