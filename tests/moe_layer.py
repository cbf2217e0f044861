"""One layer of experts as a function, on any mesh, and how near two results are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llmos_jax.ir import MESH_AXES, MeshShape, ModelSpec
from llmos_jax.lowering import MeshSharder
from llmos_jax.models.moe import MoE, Routing
from llmos_jax.rules import load_rules

RELATIVE = 1e-5
"""Of the largest entry; other orders of float32 sums."""

Params = dict[str, jax.Array]
Layer = Callable[[Params, jax.Array], tuple[jax.Array, Routing]]


def layer_of(spec: ModelSpec) -> tuple[Params, Layer]:
    """Parameters of one layer's experts, and the layer as a function."""
    with nnx.use_eager_sharding(False):
        made = MoE(spec, rngs=nnx.Rngs(0))
    graph, flat = nnx.graphdef(made), nnx.to_flat_state(nnx.state(made))

    def apply(params: Params, x: jax.Array) -> tuple[jax.Array, Routing]:
        state = [((name,), nnx.Param(params[name])) for name in params]
        found: tuple[jax.Array, Routing] = nnx.merge(graph, nnx.from_flat_state(state))(
            x
        )
        return found

    return {path[0]: leaf.get_value() for path, leaf in flat}, apply


def sharder_of(sizes: dict[str, int]) -> MeshSharder:
    """What a plan for this mesh would install."""
    shape = MeshShape(**sizes)
    devices = np.array(jax.devices()[: shape.num_devices])
    mesh = Mesh(devices.reshape(list(shape.sizes.values())), MESH_AXES)
    plan: Any = SimpleNamespace(rules=load_rules("moe"), mesh=shape)
    return MeshSharder(plan, mesh)


def near(found: Any, wanted: Any, relative: float = RELATIVE) -> None:
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max() + 1e-12)


def equations_of(jaxpr: Any, *, skip: str = "") -> Iterator[Any]:
    """Every equation of a jaxpr, wherever, but for the insides of a primitive."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name == skip:
            continue
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations_of(inner, skip=skip)
