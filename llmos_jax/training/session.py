"""Put a plan, a model and prepared text in place: mesh, programs, state, batches.

What the loop runs on. The state is drawn, or restored, shard by shard: no device and no
process ever holds the model whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llmos_jax.checkpoint import CheckpointStore, check_same_model
from llmos_jax.config.schema import RunConfig, TrainSection
from llmos_jax.data import TokenFile, TrainBatches, evaluation_batches
from llmos_jax.errors import LowerError
from llmos_jax.ir import Plan
from llmos_jax.lowering import (
    Program,
    abstract,
    batch_sharding,
    device_mesh,
    fetch,
    global_array,
    like_params,
    local_rows,
    lower,
    replicated,
)
from llmos_jax.models import Params, Skeleton
from llmos_jax.training.evaluate import Score, score_step, total_score
from llmos_jax.training.optimizer import make_optimizer
from llmos_jax.training.router import RouterWeights
from llmos_jax.training.step import Batch, TrainState, init_state, train_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Everything in place to train one plan on one set of devices."""

    skeleton: Skeleton
    plan: Plan
    config: RunConfig
    mesh: Mesh
    optimizer: optax.GradientTransformation
    state_shape: TrainState
    """ShapeDtypeStructs with shardings."""
    program: Program
    scorer: Program
    """(params, batch with weights) -> nats, tokens, correct."""

    @property
    def rows(self) -> list[int]:
        """Rows of each global batch that this process reads."""
        shape = (self.plan.workload.global_batch, self.plan.workload.seq_len)
        return local_rows(batch_sharding(self.plan, self.mesh), shape)

    @property
    def param_shardings(self) -> dict[str, Any]:
        """Parameter path -> sharding on this mesh."""
        return {path: x.sharding for path, x in self.state_shape.params.items()}

    def fresh(self) -> TrainState:
        """Draw a new state from `run.seed`, already sharded."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_shape)
        initialise = functools.partial(
            init_state, self.skeleton, self.optimizer, self.config.run.seed
        )
        return jax.jit(initialise, out_shardings=shardings)()

    def restore(self, store: CheckpointStore, step: int) -> TrainState:
        """Read a checkpoint of this model onto this mesh.

        Raises:
            PlanMismatch: the checkpoint holds another model.
            CheckpointError: it cannot be read.
        """
        manifest = store.manifest(step)
        check_same_model(manifest, self.skeleton.spec, str(store.folder))
        restored = store.restore(
            step, params=self.state_shape.params, optimizer=self.state_shape.optimizer
        )
        counter = jax.device_put(jnp.int32(step), replicated(self.mesh))
        return TrainState(counter, restored["params"], restored["optimizer"])

    def batches(self, source: TrainBatches) -> Iterator[Batch]:
        """Global device arrays of each batch of `source`, which reads `rows`."""
        for local in source:
            yield self._on_mesh(local, self.rows)

    def score(self, params: Params, tokens: TokenFile, limit: int | None) -> Score:
        """Score a text, all of it or its first `limit` batches."""
        workload = self.plan.workload
        found = evaluation_batches(
            tokens,
            seq_len=workload.seq_len,
            batch=workload.global_batch,
            limit=limit,
        )
        everything = list(range(workload.global_batch))
        return total_score(
            fetch(self.scorer(params, self._on_mesh(batch, everything)))
            for batch in found
        )

    def _on_mesh(self, local: dict[str, Any], rows: list[int]) -> Batch:
        sharding = batch_sharding(self.plan, self.mesh)
        count = self.plan.workload.global_batch
        return {
            name: global_array(value, rows, sharding, count)
            for name, value in local.items()
        }


def open_session(skeleton: Skeleton, plan: Plan, config: RunConfig) -> Session:
    """Lower the training step of a plan for the devices that are here.

    Raises:
        LowerError: the devices are not those the plan is for.
    """
    mesh = device_mesh(plan)
    program = lower_train_step(skeleton, plan, config.train, mesh)
    scorer = lower(
        "score_step",
        score_step(skeleton, compute_dtype=config.train.compute_dtype),
        plan,
        mesh,
        (),
        out_shardings=replicated(mesh),
    )
    return Session(
        skeleton=skeleton,
        plan=plan,
        config=config,
        mesh=mesh,
        optimizer=make_optimizer(config.train, skeleton.table, plan.way.state_dtype),
        state_shape=program.arguments[0],
        program=program,
        scorer=scorer,
    )


def lower_train_step(
    skeleton: Skeleton, plan: Plan, config: TrainSection, mesh: Mesh
) -> Program:
    """Lower the training step of a plan for a mesh, whose devices need not be here.

    Raises:
        LowerError: the plan is of another phase, or uses a mesh axis that no program
            here runs on.
    """
    if plan.workload.phase != "train":
        raise LowerError(
            f"the plan is for a {plan.workload.phase} step; training needs "
            "plan.phase=train."
        )
    for axis in ("stage", "context", "expert"):
        if plan.mesh.sizes[axis] > 1:
            raise LowerError(
                f"the plan has {axis}={plan.mesh.sizes[axis]}, which is planned and "
                "not yet run: training splits over data, fsdp and tensor. Set "
                f"plan.mesh.{axis}=1."
            )
    optimizer = make_optimizer(config, skeleton.table, plan.way.state_dtype)
    shape = jax.eval_shape(functools.partial(init_state, skeleton, optimizer, 0))
    state_shape = abstract(shape, like_params(shape, plan, mesh))
    step = train_step(
        *(skeleton, optimizer),
        compute_dtype=config.compute_dtype,
        way=plan.way,
        router_weights=RouterWeights(
            balance=config.router_balance_weight, z=config.router_z_weight
        ),
    )
    size = (plan.workload.global_batch, plan.workload.seq_len)
    tokens = jax.ShapeDtypeStruct(size, jnp.int32, sharding=batch_sharding(plan, mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shape)
    return lower(
        "train_step",
        step,
        plan,
        mesh,
        (state_shape, {"inputs": tokens, "targets": tokens}),
        out_shardings=(shardings, replicated(mesh)),
        donate=(0,),
    )


def bits_per_byte(score: Score, tokens: TokenFile) -> float:
    """Bits per byte of a score over part of a text, by its share of the tokens."""
    share = score.tokens / max(tokens.num_tokens - 1, 1)
    return score.nats / math.log(2) / (tokens.num_bytes * share)
