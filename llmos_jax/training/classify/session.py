"""Put a classifier's plan, model and labelled texts in place, as `training.session`
does for text: the loop that runs on it is the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmos_jax.config.schema import ClassifySection, RunConfig
from llmos_jax.data.labelled import (
    LabelledBatches,
    LabelledData,
    LabelledSide,
    bucket_lengths,
)
from llmos_jax.errors import ConfigError
from llmos_jax.ir import Plan
from llmos_jax.lowering import (
    ByLength,
    abstract,
    batch_sharding,
    device_mesh,
    like_params,
    lower,
    replicated,
)
from llmos_jax.models import Params, Skeleton
from llmos_jax.training.classify.score import ClassScore, ClassScorer
from llmos_jax.training.classify.step import ClassLesson, class_step, class_sums
from llmos_jax.training.optimizer import make_optimizer
from llmos_jax.training.scorer import Places, Progress
from llmos_jax.training.session import Session
from llmos_jax.training.step import TrainState, init_state


def open_class_session(
    skeleton: Skeleton, plan: Plan, config: RunConfig, data: LabelledData
) -> Session:
    """Lower the training step of a classifier's plan, for every length of text.

    Args:
        skeleton: a model with `classes`.
        plan: of its training step.
        config: the optimizer, the dtypes, `[classify]`.
        data: for the lengths that occur, and the shares of the classes.

    Raises:
        LowerError: the devices are not those the plan is for.
        ConfigError: replicas are to learn alone, zeros are to stay; noise that is no
            share.
    """
    if plan.workload.local_steps:
        raise ConfigError(
            "sync.strategy = local: replicas of a classifier agree after every step. "
            "Leave it out."
        )
    if config.train.keep_zeros:
        raise ConfigError(
            "train.keep_zeros is for pruned models that predict tokens, and "
            f"{skeleton.spec.name} is a classifier. Leave it out."
        )
    mesh, train = device_mesh(plan), config.train
    lesson = lesson_of(config.classify, data.train, config.run.seed)
    optimizer = make_optimizer(train, skeleton.table, plan.way.state_dtype)
    shape = jax.eval_shape(functools.partial(init_state, skeleton, optimizer, 0))
    state_shape = abstract(shape, like_params(shape, plan, mesh))
    step = class_step(
        skeleton,
        optimizer,
        compute_dtype=train.compute_dtype,
        way=plan.way,
        lesson=lesson,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shape)

    def lowered(length: int) -> Any:
        return lower(
            f"class_step_{length}",
            step,
            plan,
            mesh,
            (state_shape, _batch_shape(plan, mesh, length)),
            out_shardings=(shardings, replicated(mesh)),
            donate=(0,),
        )

    lengths = bucket_lengths(data.train, plan.workload.seq_len)
    return Session(
        skeleton=skeleton,
        plan=plan,
        config=config,
        mesh=mesh,
        optimizer=optimizer,
        state_shape=state_shape,
        program=ByLength({length: lowered(length) for length in lengths}),
        scorer=open_class_scorer(skeleton, plan, train.compute_dtype, mesh),
        mean_length=mean_length(data.train, plan.workload.seq_len),
        least_loss=math.log(len(data.labels)),
        agreement=None,
    )


def lesson_of(asked: ClassifySection, train: LabelledSide, seed: int) -> ClassLesson:
    """What `[classify]` asks of training.

    Raises:
        ConfigError: shares that are none.
    """
    for key in ("dropout", "word_dropout", "label_smoothing"):
        if not 0 <= getattr(asked, key) < 1:
            raise ConfigError(
                f"classify.{key} = {getattr(asked, key)} is a share: 0 or more, and "
                "less than 1."
            )
    counts = train.counts
    even = sum(counts) / len(counts)
    is_balanced = asked.class_weights == "balanced"
    return ClassLesson(
        dropout=asked.dropout,
        word_dropout=asked.word_dropout,
        label_smoothing=asked.label_smoothing,
        class_weights=tuple(
            even / max(1, count) if is_balanced else 1.0 for count in counts
        ),
        seed=seed,
    )


def open_class_scorer(
    skeleton: Skeleton, plan: Plan, compute_dtype: str, mesh: Mesh | None = None
) -> ClassScorer:
    """Lower what scores labelled batches, for the devices that are here; a length is
    compiled when it first occurs."""
    mesh = device_mesh(plan) if mesh is None else mesh
    sums = class_sums(skeleton, compute_dtype=compute_dtype, way=plan.way)
    program = lower("class_sums", sums, plan, mesh, (), out_shardings=replicated(mesh))
    return ClassScorer(places=Places(plan=plan, mesh=mesh), program=program)


def class_batches(
    session: Session, data: LabelledData, start_step: int
) -> LabelledBatches:
    """Batches of the training texts, from a step on, for this process."""
    workload = session.plan.workload
    return LabelledBatches(
        data.train,
        seq_len=workload.seq_len,
        global_batch=workload.global_batch,
        seed=session.config.run.seed,
        rows=session.rows,
        start_step=start_step,
    )


def class_figures(
    session: Session,
    data: LabelledData,
    state: TrainState,
    beat: Callable[[int, int], None],
) -> dict[str, float]:
    """What the validation texts say of a state."""
    limit = session.config.train.eval_batches
    score = class_score(session, state.params, data.validation, limit, beat)
    return {
        "val_loss": score.loss,
        "val_accuracy": score.accuracy,
        "val_macro_f1": score.macro_f1,
        "val_error": 1 - score.accuracy,
    }


def class_score(
    session: Session,
    params: Params,
    side: LabelledSide,
    limit: int | None = None,
    beat: Progress | None = None,
) -> ClassScore:
    """Score a side, all of it or its first `limit` batches."""
    assert isinstance(session.scorer, ClassScorer)
    return session.scorer.score(params, side, limit, beat)


def mean_length(side: LabelledSide, seq_len: int) -> float:
    """Tokens that a row is padded to, on average."""
    lengths = np.asarray(bucket_lengths(side, seq_len))
    at = np.searchsorted(lengths, np.clip(side.lengths, 1, lengths[-1]))
    return float(lengths[at].mean())


def _batch_shape(
    plan: Plan, mesh: Mesh, length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    B, sharding = plan.workload.global_batch, batch_sharding(plan, mesh)

    def shape(width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((B, width), dtype, sharding=sharding)

    return {
        "inputs": shape(length, jnp.int32),
        "lengths": shape(1, jnp.int32),
        "labels": shape(1, jnp.int32),
        "weights": shape(1, jnp.float32),
    }
