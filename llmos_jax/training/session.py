"""Put a plan, a model and prepared text in place: mesh, programs, state, batches.

What the loop runs on. The state is drawn, or restored, shard by shard: no device and no
process ever holds the model whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llmos_jax.checkpoint import (
    CheckpointStore,
    check_same_model,
    check_same_replicas,
)
from llmos_jax.config.schema import RunConfig, SyncSection, TrainSection
from llmos_jax.data import TokenStream
from llmos_jax.errors import LowerError
from llmos_jax.ir import Plan, Quantization, Workload
from llmos_jax.lowering import (
    ByLength,
    Program,
    abstract,
    batch_sharding,
    device_mesh,
    lower,
    replicated,
)
from llmos_jax.models import Params, Skeleton
from llmos_jax.models.matrices import as_stored
from llmos_jax.training.evaluate import Score
from llmos_jax.training.local import (
    agreement,
    check_local,
    local_optimizer,
    local_replicas,
    local_step,
    state_shardings,
)
from llmos_jax.training.optimizer import make_optimizer
from llmos_jax.training.qat import check_qat, quantization_of
from llmos_jax.training.router import RouterWeights
from llmos_jax.training.scorer import Progress, Scorer, Windows, open_scorer
from llmos_jax.training.step import (
    Batch,
    Metrics,
    TrainState,
    init_state,
    train_step,
)
from llmos_jax.training.teacher import Taught, Teacher

if TYPE_CHECKING:
    from llmos_jax.training.classify.score import ClassScorer


class Origin(Protocol):
    """A model with weights, to begin with."""

    @property
    def skeleton(self) -> Skeleton:
        """What it is."""

    def params(
        self, shardings: dict[str, Any] | None = None, *, dtype: str | None = None
    ) -> Params:
        """Its parameters, on shardings."""


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
    program: Program | ByLength
    scorer: Scorer | ClassScorer
    teacher: Teacher | None = None
    """A model in the step to learn from."""
    mean_length: float | None = None
    """Tokens of a row on average, padding among them; None: all have the plan's."""
    least_loss: float = 0.0
    """Of a model that knows nothing, where losses can come near 0; else 0."""
    agreement: Program | None
    """(state) -> state in which replicas that learn alone agree; None if they do after
    every step."""

    @property
    def rows(self) -> list[int]:
        """Rows of each global batch that this process reads."""
        return self.scorer.places.rows

    @property
    def workload(self) -> Workload:
        """A step as it is on average."""
        step = self.plan.workload
        if self.mean_length is None:
            return step
        return replace(step, seq_len=max(1, round(self.mean_length)))

    @property
    def step(self) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """The program, with the teacher that it looks at."""
        if self.teacher is None:
            return self.program
        params = self.teacher.params
        assert isinstance(self.program, Program), "rows of one length"
        program = self.program
        return lambda state, batch: program(state, batch, params)

    @property
    def stored_as(self) -> Quantization | None:
        """As what `[qat]` trains the model to be stored."""
        return quantization_of(self.config.qat)

    def used(self, params: Params) -> Params:
        """The parameters as they will be stored, or as they are."""
        how = self.stored_as
        if how is None:
            return params
        rounded = functools.partial(as_stored, quantization=how)
        made: Params = jax.jit(rounded, out_shardings=self.param_shardings)(params)
        return made

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

    def begin_with(self, origin: Origin) -> TrainState:
        """The first state, with the weights of a model that has some; what it has not
        (LoRA's factors, a head for these classes) is drawn from `run.seed`."""
        shardings = self.param_shardings
        theirs = {row.path for row in origin.skeleton.table.rows}
        if _labels(origin.skeleton) != _labels(self.skeleton):
            theirs = {path for path in theirs if not path.startswith("classifier.")}
        missing = [path for path in shardings if path not in theirs]
        params = origin.params(
            {path: x for path, x in shardings.items() if path in theirs},
            dtype="float32",
        )

        def draw(key: jax.Array) -> Params:
            drawn = self.skeleton.init(key)
            return {path: drawn[path] for path in missing}

        drawn = jax.jit(draw, out_shardings={path: shardings[path] for path in missing})
        params = {**params, **drawn(jax.random.key(self.config.run.seed))}
        moments = jax.tree.map(lambda leaf: leaf.sharding, self.state_shape.optimizer)
        begun = jax.jit(self.optimizer.init, out_shardings=moments)(params)
        counter = jax.device_put(jnp.int32(0), replicated(self.mesh))
        return TrainState(counter, params, begun)

    def restore(self, store: CheckpointStore, step: int) -> TrainState:
        """Read a checkpoint of this model onto this mesh.

        Raises:
            PlanMismatch: the checkpoint holds another model, or replicas that learn
                alone where the plan has none, or others.
            CheckpointError: it cannot be read.
        """
        manifest = store.manifest(step)
        check_same_model(manifest, self.skeleton.spec, str(store.folder))
        check_same_replicas(manifest, local_replicas(self.plan), str(store.folder))
        restored = store.restore(
            step, params=self.state_shape.params, optimizer=self.state_shape.optimizer
        )
        counter = jax.device_put(jnp.int32(step), replicated(self.mesh))
        return TrainState(counter, restored["params"], restored["optimizer"])

    def concluded(self, state: TrainState, step: int) -> TrainState:
        """The state a run ends with: replicas that learnt alone have agreed."""
        every = self.plan.workload.local_steps
        if self.agreement is None or step % every == 0:
            return state
        agreed: TrainState = self.agreement(state)
        return agreed

    def batches(self, source: Iterator[dict[str, Any]]) -> Iterator[Batch]:
        """Global device arrays of each batch of `source`, which reads `rows`."""
        rows = self.rows
        for local in source:
            yield self.scorer.places.on_mesh(local, rows)

    def score(
        self,
        params: Params,
        tokens: TokenStream,
        limit: int | None,
        on_progress: Progress | None = None,
    ) -> Score:
        """Score a text, all of it or its first `limit` batches."""
        assert isinstance(self.scorer, Scorer), "a classifier scores labelled texts"
        return self.scorer.score(self.used(params), tokens, limit, on_progress)


def _labels(skeleton: Skeleton) -> tuple[str, ...]:
    classes = skeleton.spec.classes
    return () if classes is None else classes.labels


def open_session(
    skeleton: Skeleton,
    plan: Plan,
    config: RunConfig,
    *,
    is_chat: bool = False,
    taught: Taught | None = None,
) -> Session:
    """Lower the training step of a plan for the devices that are here.

    Args:
        skeleton: the model.
        plan: what to lower.
        config: as of `lower_train_step`.
        is_chat: whether only some tokens of the text are to be learnt.
        taught: by whom, if by a teacher.

    Raises:
        LowerError: the devices are not those the plan is for.
        ConfigError: replicas are to learn alone, and cannot.
    """
    mesh = device_mesh(plan)
    program = lower_train_step(
        skeleton, plan, config, mesh, is_chat=is_chat, taught=taught
    )
    optimizer = _optimizer(skeleton, plan, config.train, config.sync)
    windows = Windows(document_mask=config.data.is_masked)
    scorer = open_scorer(skeleton, plan, config.train.compute_dtype, windows, mesh)
    state_shape = program.arguments[0]
    return Session(
        skeleton=skeleton,
        plan=plan,
        config=config,
        mesh=mesh,
        optimizer=optimizer,
        state_shape=state_shape,
        program=program,
        scorer=scorer,
        teacher=None if taught is None else taught.teacher,
        agreement=_agreement(plan, mesh, optimizer, state_shape),
    )


def lower_train_step(
    skeleton: Skeleton,
    plan: Plan,
    config: RunConfig,
    mesh: Mesh,
    *,
    is_chat: bool = False,
    taught: Taught | None = None,
) -> Program:
    """Lower the training step of a plan for a mesh, whose devices need not be here.

    Args:
        skeleton: the model.
        plan: its workload says whether replicas learn alone, and for how long.
        config: the optimizers, the dtypes, and whether documents are masked.
        mesh: of the plan's shape.
        is_chat: whether batches weigh their tokens, and hold conversations.
        taught: by whom, if by a teacher.

    Raises:
        LowerError: the plan is of another phase.
        ConfigError: replicas are to learn alone, and cannot.
    """
    if plan.workload.phase != "train":
        raise LowerError(
            f"the plan is for a {plan.workload.phase} step; training needs "
            "plan.phase=train."
        )
    train = config.train
    optimizer = _optimizer(skeleton, plan, train, config.sync)
    shape = jax.eval_shape(functools.partial(init_state, skeleton, optimizer, 0))
    state_shape = abstract(shape, state_shardings(shape, plan, mesh))
    every = plan.workload.local_steps
    step = train_step(
        skeleton,
        _inner(skeleton, plan, train) if every else optimizer,
        compute_dtype=train.compute_dtype,
        way=plan.way,
        router_weights=RouterWeights(
            balance=train.router_balance_weight, z=train.router_z_weight
        ),
        lesson=None if taught is None else taught.lesson(config),
        stored_as=check_qat(skeleton.spec, config.qat),
        keep_zeros=train.keep_zeros,
    )
    if every:
        step = local_step(step, optimizer, every)
    size = (plan.workload.global_batch, plan.workload.seq_len)
    tokens = jax.ShapeDtypeStruct(size, jnp.int32, sharding=batch_sharding(plan, mesh))
    batch = dict.fromkeys(["inputs", "targets"], tokens)
    is_packed = is_chat or config.data.packing == "best_fit"
    if config.data.document_mask or is_packed:
        batch["segments"] = tokens
    if is_packed:
        batch["weights"] = jax.ShapeDtypeStruct(
            size, jnp.float32, sharding=tokens.sharding
        )
    teacher: tuple[Any, ...] = ()
    if taught is not None:
        batch |= taught.kept_shapes(tokens, config.distill.top_k)
        teacher = () if taught.teacher is None else (taught.teacher.shapes,)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shape)
    return lower(
        "train_step",
        step,
        plan,
        mesh,
        (state_shape, batch, *teacher),
        out_shardings=(shardings, replicated(mesh)),
        donate=(0,),
    )


def _inner(
    skeleton: Skeleton, plan: Plan, config: TrainSection
) -> optax.GradientTransformation:
    return make_optimizer(config, skeleton.table, plan.way.state_dtype)


def _optimizer(
    skeleton: Skeleton, plan: Plan, config: TrainSection, sync: SyncSection
) -> optax.GradientTransformation:
    """The optimizer whose state a run keeps: of a step, or of replicas that agree."""
    inner = _inner(skeleton, plan, config)
    if not plan.workload.local_steps:
        return inner
    check_local(plan)
    return local_optimizer(inner, sync, plan.mesh.data)


def _agreement(
    plan: Plan,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state_shape: TrainState,
) -> Program | None:
    if not plan.workload.local_steps:
        return None
    return lower(
        "agreement",
        agreement(optimizer),
        plan,
        mesh,
        (state_shape,),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state_shape),
        donate=(0,),
    )


def bits_per_byte(score: Score, tokens: TokenStream) -> float:
    """Bits per byte of a score over part of a text, by its share of the tokens that
    count: of conversations, those of answers."""
    counted = tokens.num_answer_tokens if tokens.is_chat else tokens.num_tokens - 1
    share = score.tokens / max(counted or 0, 1)
    return score.nats / math.log(2) / (tokens.num_bytes * share)
