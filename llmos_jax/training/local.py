"""Turn a training step into one that every replica takes alone: DiLoCo.

After "DiLoCo: Distributed Low-Communication Training of Language Models" (arXiv
2311.08105, algorithm 1). A replica is one position of mesh axis `data` (whole slices,
where the topology has several); inside it the other axes split the work as ever. Each
replica has its own parameters and inner optimizer. After every H steps they agree: the
mean way from their parameters back to the last ones agreed upon (the anchor) is the
gradient of an outer Nesterov step, and all go on from where that leads. Their moments
stay their own.

`TrainState.params` is the anchor, in the shapes that parameters always have: whoever
evaluates, exports or reads a checkpoint sees the last agreement, which lags at most
H - 1 steps. A checkpoint holds the replicas too, so a run that was killed or stopped by
a signal goes on bit for bit. A run that ends, by its steps or its clock, agrees first
(`agreement`), and what it leaves is everyone's work.

Only an agreement moves parameters between replicas; any other step sends its metrics,
which are means over replicas. The agreement lies in a conditional: all devices count
the same steps, so all take part or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from llmos_jax.config.schema import SyncSection
from llmos_jax.errors import ConfigError
from llmos_jax.ir import Plan, mesh_axes_in
from llmos_jax.lowering import like_params, named
from llmos_jax.models import Params, along
from llmos_jax.training.step import Batch, Metrics, TrainState

AXIS = "data"
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class LocalState(NamedTuple):
    """`TrainState.optimizer` of a run whose R replicas learn alone."""

    inner: Any
    """Each replica's optimizer state: a leading axis R on every leaf."""
    replicas: Params
    """Each replica's own parameters, [R, *shape]."""
    outer: optax.OptState
    """The outer optimizer's: a velocity shaped like the parameters."""


_SPLIT: Any = TrainState(
    step=PartitionSpec(),  # type: ignore[arg-type]
    params=PartitionSpec(),  # type: ignore[arg-type]
    optimizer=LocalState(
        inner=PartitionSpec(AXIS),
        replicas=PartitionSpec(AXIS),  # type: ignore[arg-type]
        outer=PartitionSpec(),
    ),
)
"""What lies along `data` of a state."""


def local_optimizer(
    inner: optax.GradientTransformation, sync: SyncSection, replicas: int
) -> optax.GradientTransformation:
    """Return the outer optimizer; its state holds the inner one's of every replica.

    Its gradient is the mean way from the replicas' parameters back to the anchor.
    """
    outer = optax.sgd(sync.learning_rate, momentum=sync.momentum, nesterov=True)

    def copies(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (replicas, *x.shape)), tree)

    def init(params: optax.Params) -> LocalState:
        return LocalState(
            inner=copies(inner.init(params)),
            replicas=copies(params),
            outer=outer.init(params),
        )

    def update(
        gradients: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LocalState]:
        updates, velocity = outer.update(gradients, state.outer, params)
        return updates, state._replace(outer=velocity)

    return optax.GradientTransformation(init, update)


def local_step(step: Step, optimizer: optax.GradientTransformation, every: int) -> Step:
    """Return the step (state, batch) -> (state, metrics) in which replicas learn alone.

    Args:
        step: what a replica does with its rows, by the inner optimizer.
        optimizer: what `local_optimizer` returned.
        every: steps between agreements.
    """

    def one_replica(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        own = _own(state)
        after, metrics = step(TrainState(state.step, own.replicas, own.inner), batch)
        learnt = TrainState(
            step=after.step,
            params=state.params,
            optimizer=own._replace(inner=after.optimizer, replicas=after.params),
        )
        new = jax.lax.cond(
            after.step % every == 0,
            lambda state: _agree(state, optimizer),
            lambda state: state,
            learnt,
        )
        return _stacked(new), jax.lax.pmean(metrics, AXIS)

    def together(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        result: tuple[TrainState, Metrics] = along(
            (AXIS,),
            one_replica,
            *(state, batch),
            in_split=(_SPLIT, PartitionSpec(AXIS)),
            out_split=(_SPLIT, PartitionSpec()),
        )
        return result

    return together


def agreement(
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState], TrainState]:
    """Return the function state -> state in which replicas agree without a step."""

    def one_replica(state: TrainState) -> TrainState:
        return _stacked(_agree(state._replace(optimizer=_own(state)), optimizer))

    def together(state: TrainState) -> TrainState:
        result: TrainState = along(
            (AXIS,), one_replica, state, in_split=(_SPLIT,), out_split=_SPLIT
        )
        return result

    return together


def _agree(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """One outer step, by every replica alike; it has its own part of the state."""
    way_back = jax.tree.map(jnp.subtract, state.params, state.optimizer.replicas)
    mean = jax.lax.pmean(way_back, AXIS)
    updates, optimizer_state = optimizer.update(mean, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step, params, optimizer_state._replace(replicas=params))


def _own(state: TrainState) -> LocalState:
    """This replica's part of the optimizer's state, without the axis R."""
    optimizer: LocalState = state.optimizer
    inner, replicas = jax.tree.map(
        lambda x: jnp.squeeze(x, 0), (optimizer.inner, optimizer.replicas)
    )
    return optimizer._replace(inner=inner, replicas=replicas)


def _stacked(state: TrainState) -> TrainState:
    """Undo `_own`."""
    optimizer: LocalState = state.optimizer
    inner, replicas = jax.tree.map(
        lambda x: x[None], (optimizer.inner, optimizer.replicas)
    )
    return state._replace(optimizer=optimizer._replace(inner=inner, replicas=replicas))


def state_shardings(state: TrainState, plan: Plan, mesh: Mesh) -> TrainState:
    """Shardings of a state: as parameters are split, replicas over `data` besides."""
    shardings: TrainState = like_params(state, plan, mesh)
    if not isinstance(state.optimizer, LocalState):
        return shardings
    stacked = (state.optimizer.inner, state.optimizer.replicas)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
    inner, replicas = jax.tree.map(
        lambda found: named(mesh, (AXIS, *found.spec)), like_params(one, plan, mesh)
    )
    return shardings._replace(
        optimizer=shardings.optimizer._replace(inner=inner, replicas=replicas)
    )


def check_local(plan: Plan) -> None:
    """Refuse a plan whose replicas cannot learn alone.

    Raises:
        ConfigError: there is one replica, or replicas share weights.
    """
    if plan.mesh.data == 1:
        raise ConfigError(
            f"sync.strategy = local on mesh {plan.mesh}: one replica has nobody to "
            "agree with. Set plan.mesh.data to 2 or more, name a topology of several "
            "slices, or set sync.strategy=every_step."
        )
    for path, spec in plan.specs.items():
        if AXIS in mesh_axes_in(spec):
            raise ConfigError(
                f"sync.strategy = local needs whole weights in every replica, and the "
                f"rules split {path} over data. Take data out of [weights], or set "
                "sync.strategy=every_step."
            )


def local_replicas(plan: Plan) -> int:
    """Replicas that learn alone; 0 if all agree on every step."""
    return plan.mesh.data if plan.workload.local_steps else 0


def replica_bytes_per_step(plan: Plan) -> float:
    """Bytes that a device sends to other replicas in a step, on average.

    Its part of the float32 gradients (or of the way back), after the other axes have
    split them, is summed over R replicas: 2 (R - 1) / R of it goes out, the least there
    is for a sum (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009). That is
    every step, or once in H. Where replicas are slices, this is what crosses DCN. Left
    out: metrics; and, every step, the second sum of a tied table, whose gradients as a
    table and as a head are summed apart (tools/bench/sync.py counts it).
    """
    replicas, sizes = plan.mesh.data, plan.mesh.sizes
    held = 0.0
    for row in plan.params.rows:
        split = mesh_axes_in(plan.specs[row.path])
        held += 4 * row.size / math.prod(sizes[axis] for axis in split)
    every = max(plan.workload.local_steps, 1)
    return 2 * (replicas - 1) / replicas * held / every
