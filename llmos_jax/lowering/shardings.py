"""Turn a plan's specs into NamedShardings: for parameters, state, batches, activations.

The rules were resolved by the planner; here names become objects, nothing is decided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax.ir import Plan, Spec
from llmos_jax.rules import resolve_activation


def named(mesh: Mesh, spec: Spec) -> NamedSharding:
    """A Spec of plain names as a NamedSharding."""
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(plan: Plan, mesh: Mesh) -> dict[str, NamedSharding]:
    """Parameter path -> sharding."""
    return {path: named(mesh, spec) for path, spec in plan.specs.items()}


def like_params(tree: Any, plan: Plan, mesh: Mesh) -> Any:
    """Shard any tree that holds copies of the parameter dict the way parameters are.

    An optimizer's state holds dicts keyed by parameter path (its moments); each such
    leaf follows its parameter if it has its shape. Everything else (counters) is
    replicated.
    """
    shardings = param_shardings(plan, mesh)
    shapes = {row.path: row.shape for row in plan.params.rows}

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None) if path else None
        if name in shapes and tuple(leaf.shape) == shapes[name]:
            return shardings[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(plan: Plan, mesh: Mesh) -> NamedSharding:
    """Sharding of a [B, T] batch of tokens."""
    shape = (plan.workload.global_batch, plan.workload.seq_len)
    return named(mesh, activation_spec(plan, ("batch", "seq"), shape))


def activation_spec(
    plan: Plan, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> Spec:
    """Resolve an activation's logical axes under the plan's rules and mesh."""
    return resolve_activation(plan.rules, axes, shape, plan.mesh)


def annotator(
    plan: Plan, mesh: Mesh
) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """What `models.annotate` does while a plan is lowered: constrain a sharding."""

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = activation_spec(plan, axes, x.shape)
        return jax.lax.with_sharding_constraint(x, named(mesh, spec))

    return constrain
