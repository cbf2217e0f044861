"""Put a teacher in place: in the student's step, or before it, to keep its answers.

B sequences, T tokens, V vocabulary, k kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmos_jax.config.schema import DistillSection, RunConfig
from llmos_jax.errors import ConfigError, TrainingError
from llmos_jax.ir import Plan, mesh_axes_in
from llmos_jax.lowering import (
    MeshSharder,
    device_mesh,
    fetch,
    lower,
    param_shardings,
    replicated,
)
from llmos_jax.models import Params, Pass, Skeleton
from llmos_jax.planner import budget
from llmos_jax.training.answers import Ask, Batch
from llmos_jax.training.lesson import (
    KEPT,
    Lesson,
    TeacherModel,
    in_pieces,
    num_pieces,
)
from llmos_jax.training.scorer import Places

Read = Callable[[dict[str, Any]], Params]
"""Shardings by path -> parameters in the dtypes they are computed with."""

LEAST_MASS = 1e-8
"""What lies beneath the kept tokens is at least this: float32 knows sums near 1 to
1e-7, and a logarithm of 0 is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A model that another learns from in one step, on the student's mesh."""

    model: TeacherModel
    params: Params

    @property
    def shapes(self) -> Any:
        """ShapeDtypeStructs with shardings."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            self.params,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """How a session's student learns from a teacher."""

    vocab_size: int
    """Tokens that teacher and student both have."""
    teacher: Teacher | None = None
    """In the step; None: batches carry its kept answers."""

    def lesson(self, config: RunConfig) -> Lesson:
        """What a step learns beside the text."""
        return Lesson(
            asked=config.distill,
            steps=config.train.steps,
            teacher=None if self.teacher is None else self.teacher.model,
            vocab_size=self.vocab_size,
        )

    def kept_shapes(self, tokens: Any, top_k: int | None) -> dict[str, Any]:
        """What batches carry beside `tokens`, a ShapeDtypeStruct [B, T]."""
        if self.teacher is not None:
            return {}
        assert top_k is not None, "a teacher is in the step, or its answers are kept"
        kinds = zip(KEPT, (jnp.int32, jnp.float16, jnp.float32), (top_k, top_k, 2))
        return {
            name: jax.ShapeDtypeStruct(
                (*tokens.shape, width), dtype, sharding=tokens.sharding
            )
            for name, dtype, width in kinds
        }


def check_distill(config: RunConfig) -> None:
    """Refuse a `[distill]` that cannot be meant.

    Raises:
        ConfigError: with the key to set.
    """
    asked = config.distill
    for name in ("temperature", "final_temperature"):
        value = getattr(asked, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(
                f"distill.{name} = {value}: logits are divided by it, so it must be "
                "more than 0 (1 leaves them as they are)."
            )
    for name in ("weight", "final_weight"):
        value = getattr(asked, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(
                f"distill.{name} = {value}: the teacher's part of the loss is 0 to 1."
            )
    if asked.top_k is not None and asked.top_k < 1:
        raise ConfigError(
            f"distill.top_k = {asked.top_k}: keep at least 1 token, or leave it out to "
            "have the teacher in the step."
        )
    if asked.cache is not None and asked.top_k is None:
        raise ConfigError(
            f"distill.cache = {asked.cache} is for kept answers: set distill.top_k, 64 "
            "for example, too."
        )
    if asked.top_k is None and config.sync.strategy == "local":
        raise ConfigError(
            "sync.strategy = local: replicas that learn alone have no teacher among "
            "them. Set distill.top_k, or sync.strategy=every_step."
        )


def check_mesh(plan: Plan, asked: DistillSection) -> None:
    """Refuse a pipeline, and several processes where answers are kept.

    Raises:
        ConfigError: with what to do.
    """
    if plan.mesh.stage > 1:
        raise ConfigError(
            f"distill.teacher cannot run on stage={plan.mesh.stage}: a pipeline takes "
            "one model's loss. Set plan.mesh.stage=1."
        )
    if asked.top_k is not None and jax.process_count() > 1:
        raise ConfigError(
            f"distill.top_k keeps answers for one process, and this run has "
            f"{jax.process_count()}. Leave it out: teacher and student then share a "
            "step."
        )


def check_room(student: Plan, teacher: Plan, name: str) -> None:
    """Refuse two models that are too large for a device together, by the estimate.

    Raises:
        TrainingError: with the figures, and the remedy.
    """
    gib = 2.0**30
    theirs = _bytes_per_device(teacher)
    ours, limit = student.predicted.peak_hbm_bytes, budget(student.topology)
    if ours + theirs <= limit:
        return
    raise TrainingError(
        f"the step needs {ours / gib:.2f} GiB per device and the weights of "
        f"distill.teacher = {name} {theirs / gib:.2f} GiB more, and {limit / gib:.2f} "
        f"GiB are there ({student.topology.name}). Set distill.top_k=64: the teacher "
        "is asked before training and is not in memory then. Or use more devices."
    )


def _bytes_per_device(plan: Plan) -> float:
    sizes = plan.mesh.sizes
    total = 0.0
    for row in plan.params.rows:
        axes = mesh_axes_in(plan.specs[row.path])
        width = jnp.dtype(row.dtype).itemsize
        if jnp.issubdtype(jnp.dtype(row.dtype), jnp.floating):
            width = min(width, jnp.dtype(plan.workload.compute_dtype).itemsize)
        total += row.size * width / math.prod(sizes[axis] for axis in axes)
    return total


def open_teacher(
    skeleton: Skeleton, plan: Plan, mesh: Mesh, compute_dtype: str, read: Read
) -> Teacher:
    """Read a teacher onto the student's mesh.

    Args:
        skeleton: the teacher.
        plan: of it, for that mesh.
        mesh: the student's.
        compute_dtype: in which both are computed.
        read: gives its parameters.
    """
    return Teacher(
        model=TeacherModel(
            skeleton=skeleton,
            compute_dtype=compute_dtype,
            sharder=MeshSharder(plan, mesh),
        ),
        params=read(dict(param_shardings(plan, mesh))),
    )


def asker(
    skeleton: Skeleton,
    plan: Plan,
    read: Read,
    *,
    compute_dtype: str,
    top_k: int,
    vocab_size: int,
    has_segments: bool,
) -> Ask:
    """Lower the program that asks a teacher, and read its parameters.

    Args:
        skeleton: the teacher.
        plan: how it runs a batch, for prefill, without `stage` and `context`.
        read: gives its parameters.
        compute_dtype: in which it computes.
        top_k: k.
        vocab_size: of all its tokens, the first so many count.
        has_segments: whether tokens see those of their own document alone.
    """
    mesh = device_mesh(plan)
    step = answer_step(skeleton, compute_dtype, plan.way.unrolled, top_k, vocab_size)
    program = lower("answer_step", step, plan, mesh, (), out_shardings=replicated(mesh))
    params = read(dict(param_shardings(plan, mesh)))
    places = Places(plan=plan, mesh=mesh)

    def ask(batch: Batch) -> Batch:
        wanted = {"inputs", "segments"} if has_segments else {"inputs"}
        assert set(batch) == wanted, (set(batch), wanted)
        made = program(params, places.on_mesh(batch, places.rows))
        return {name: np.asarray(fetch(x)) for name, x in made.items()}

    return ask


def answer_step(
    skeleton: Skeleton, compute_dtype: str, unrolled: bool, top_k: int, vocab_size: int
) -> Callable[[Params, dict[str, jax.Array]], dict[str, jax.Array]]:
    """Return (params, batch) -> KEPT of every token."""
    model = TeacherModel(skeleton=skeleton, compute_dtype=compute_dtype)
    V, k = vocab_size, top_k

    def answer(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        B, T = batch["inputs"].shape
        features_BTD, logits = model.look(params, batch, Pass(unroll=unrolled))
        count = num_pieces(B, T, skeleton.spec.vocab_size)

        def piece(x_BtD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            logits_BtV = logits(x_BtD)[..., :V].astype(jnp.float32)
            log_p_BtV = jax.nn.log_softmax(logits_BtV)
            log_p_Btk, ids_Btk = jax.lax.top_k(log_p_BtV, k)
            left = [
                jnp.sum(jnp.exp(b * log_p_BtV), -1)
                - jnp.sum(jnp.exp(b * log_p_Btk), -1)
                for b in (jnp.float32(1), jnp.float32(0.5))
            ]
            rest_Bt2 = jnp.log(
                jnp.maximum(jnp.stack(left, -1), jnp.float32(LEAST_MASS))
            )
            return ids_Btk.astype(jnp.int32), log_p_Btk, rest_Bt2

        found = jax.lax.map(piece, in_pieces(features_BTD, count))
        whole = [jnp.moveaxis(x, 0, 1).reshape(B, T, x.shape[-1]) for x in found]
        return dict(zip(KEPT, whole, strict=True))

    return answer
