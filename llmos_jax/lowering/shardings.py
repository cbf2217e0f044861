"""Turn a plan's specs into NamedShardings: for parameters, state, batches, activations.

The rules were resolved by the planner; here names become objects, nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax.ir import MESH_AXES, MeshShape, Plan, Spec, mesh_axes_in
from llmos_jax.models.annotate import Axes, Stored, annotated_by
from llmos_jax.rules import resolve_activation, resolve_weight


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


@dataclass(frozen=True, slots=True)
class MeshSharder:
    """What `models.annotate` asks while a plan is lowered."""

    plan: Plan
    mesh: Mesh
    manual: tuple[str, ...] = ()
    """Mesh axes of the surrounding `along`; annotations mean the others."""

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Constrain `x` to the sharding that the rules give its axes."""
        spec = resolve_activation(self.plan.rules, axes, x.shape, self._shape)
        return jax.lax.with_sharding_constraint(x, named(self._mesh, spec))

    @property
    def _shape(self) -> MeshShape:
        """The mesh as annotations see it: nothing is split over manual axes."""
        return replace(self.plan.mesh, **dict.fromkeys(self.manual, 1))

    @property
    def _mesh(self) -> Any:
        """The mesh, or inside `along` what JAX knows it by there."""
        return jax.sharding.get_abstract_mesh() if self.manual else self.mesh

    def along(
        self,
        mesh_axes: tuple[str, ...],
        function: Callable[..., Any],
        arrays: tuple[Any, ...],
        in_split: tuple[Any, ...],
        out_split: Any,
    ) -> Any:
        """Run `function` under a shard_map over some mesh axes; others stay automatic.

        Inside, a MeshSharder that knows of it answers to annotations.
        """
        inside = replace(self, manual=(*self.manual, *mesh_axes))

        def part(*parts: Any) -> Any:
            with annotated_by(inside):
                return function(*parts)

        mapped = jax.shard_map(
            part,
            mesh=self._mesh,
            in_specs=in_split,
            out_specs=out_split,
            axis_names=set(mesh_axes),
            check_vma=False,
        )
        return mapped(*arrays)

    def per_shard(
        self,
        function: Callable[..., Any],
        arrays: tuple[jax.Array, ...],
        in_axes: tuple[Axes, ...],
        out_axes: Any,
    ) -> Any:
        """Run `function` under shard_map; an axis is split the same way everywhere."""
        if self.mesh.size == 1:
            return function(*arrays)
        used: dict[str | None, Any] = {}
        stored: dict[str | None, Any] = {}
        in_specs = []
        for array, axes in zip(arrays, in_axes, strict=True):
            is_stored = isinstance(axes, Stored)
            resolve = resolve_weight if is_stored else resolve_activation
            spec = resolve(self.plan.rules, axes, array.shape, self._shape)
            (stored if is_stored else used).update(zip(axes, spec, strict=True))
            in_specs.append(PartitionSpec(*spec))

        def out_spec(axes: Axes) -> PartitionSpec:
            split = stored if isinstance(axes, Stored) else {**stored, **used}
            return PartitionSpec(*(axis and split[axis] for axis in axes))

        out_specs = jax.tree.map(
            out_spec,
            out_axes,
            is_leaf=lambda leaf: isinstance(leaf, tuple) and not _holds_tuples(leaf),
        )
        mapped = jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=tuple(in_specs),
            out_specs=out_specs,
            axis_names=set(MESH_AXES) - set(self.manual),
            check_vma=False,
        )
        return mapped(*arrays)

    def mesh_axes(self, axis: str, size: int, stored: bool) -> tuple[str, ...]:
        """Mesh axes that split an axis of an activation, or of a weight."""
        resolve = resolve_weight if stored else resolve_activation
        return mesh_axes_in(resolve(self.plan.rules, (axis,), (size,), self._shape))

    def ways(self, mesh_axes: tuple[str, ...]) -> int:
        """Devices along mesh axes."""
        return math.prod(self.plan.mesh.sizes[axis] for axis in mesh_axes)


def _holds_tuples(leaf: tuple[Any, ...]) -> bool:
    return any(isinstance(item, tuple) for item in leaf)
