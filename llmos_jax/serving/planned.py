"""Lower a plan's prefill or decode step: parameters, cache and token pool on a mesh.

B sequences (a slot each), T tokens of a prompt, S places of a slot, K key/value heads.

Parameters lie as the plan splits them. Cache and pool are split over the axes of the
batch, the cache besides over its key/value heads. Where a rule repeats these (`[decode]
repeat` in sharding_rules/) and a layer has fewer of them than devices, each is kept by
several devices: the model is lowered as one that has a head for each device, neighbours
being copies. Queries find theirs as before, for heads and queries are in the same
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from llmos_jax.config.schema import RunConfig
from llmos_jax.errors import LowerError
from llmos_jax.ir import ParamTable, Plan
from llmos_jax.lowering import (
    Program,
    abstract,
    activation_spec,
    lower,
    named,
    param_shardings,
    replicated,
)
from llmos_jax.models import KVCache, Params, Skeleton, param_table, skeleton
from llmos_jax.models.cache import SCALE_AXES, VALUE_AXES
from llmos_jax.scheduling import Sampling
from llmos_jax.serving.forward import KV_DTYPES, DecoderForward
from llmos_jax.serving.penalties import Counts
from llmos_jax.serving.sampler import Needs, SamplingRows, sample
from llmos_jax.serving.step import (
    NO_TOKEN,
    Choose,
    DecodeState,
    Row,
    Rows,
    empty_state,
    programs,
    rows_on_device,
)

ANY = Sampling(temperature=1.0, top_k=40, top_p=0.95)
"""Asks for a draw and for filters: the program serves greedy rows, too."""


def with_repeated_heads(plan: Plan) -> Plan:
    """The plan of a model whose key/value heads suffice for the devices of a layer.

    Itself, where they do. Parameters become those of its model by `repeated_params`.
    """
    spec = plan.params.spec
    axes = plan.rules.activations.get("kv_heads", ())
    ways = math.prod(plan.mesh.sizes[axis] for axis in axes)
    if spec is None or ways <= spec.num_kv_heads or "kv_heads" not in plan.rules.repeat:
        return plan
    wider = replace(spec, num_kv_heads=ways).check()
    return replace(plan, params=param_table(wider))


def repeated_params(params: Params, table: ParamTable) -> Params:
    """Parameters of a model as those of the one with repeated heads.

    Args:
        params: of any layout and dtype.
        table: the rows of the other model.
    """
    made = {}
    for row in table.rows:
        x = params[row.path]
        if "kv_heads" in row.axes:
            axis = row.axes.index("kv_heads")
            x = jnp.repeat(x, row.shape[axis] // x.shape[axis], axis=axis)
        made[row.path] = x
    return made


def lower_decode_step(
    plan: Plan, config: RunConfig, mesh: Mesh, sampling: Sampling = ANY
) -> Program:
    """Lower the decode step of a plan for a mesh, whose devices need not be here.

    Args:
        plan: of `with_repeated_heads`, for global_batch sequences in slots of seq_len.
        config: the dtypes.
        mesh: of the plan's shape.
        sampling: what rows may ask for.

    Returns:
        (params, state, rows, steps, fewest) -> (state, tokens [B, K]), as
        `step.Programs.decode`; the state is donated.

    Raises:
        LowerError: the plan is of another phase, or for what no step here does.
    """
    model = checked_model(plan, config, "decode")
    state, rows = _state(plan, config, mesh, model), _rows(plan, mesh, sampling)
    vocab_size = model.spec.vocab_size
    forward = DecoderForward(model, config.serve.kv_dtype)
    decode = programs(forward, vocab_size, choose=_chooser(plan, mesh)).decode

    def step(params: Params, *rest: Any) -> tuple[DecodeState, jax.Array]:
        made: tuple[DecodeState, jax.Array] = decode(
            model.cast(params, config.train.compute_dtype), *rest
        )
        return made

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    arguments = (params_of(plan, config, mesh, model), state, rows, count, count)
    return _lowered("decode_step", step, plan, mesh, arguments)


def lower_prefill_step(
    plan: Plan, config: RunConfig, mesh: Mesh, sampling: Sampling = ANY
) -> Program:
    """Lower the prefill step of a plan: whole prompts into fresh slots, one each.

    Args:
        plan: of `with_repeated_heads`, for global_batch prompts of at most seq_len.
        config: the dtypes.
        mesh: of the plan's shape.
        sampling: what rows may ask for.

    Returns:
        (params, state, tokens [B, S], rows) -> (state, token [B]): the first token
        after each prompt, whose length `rows.prompt` says. The state is donated, and
        what was in it is gone.

    Raises:
        LowerError: as `lower_decode_step`.
    """
    model = checked_model(plan, config, "prefill")
    choose = _chooser(plan, mesh)

    def step(
        params: Params, state: DecodeState, tokens_BS: jax.Array, rows: Rows
    ) -> tuple[DecodeState, jax.Array]:
        bound = model.bind(model.cast(params, config.train.compute_dtype))
        # Without positions: whole prompts have faster kernels.
        x_BSD, cache = bound.features(tokens_BS, None, state.cache)
        last_B = rows.prompt - 1
        last_B1D = jnp.take_along_axis(x_BSD, last_B[:, None, None], axis=1)
        logits_BV = bound.logits(last_B1D)[:, 0]
        token_B = choose(logits_BV, rows.sampling, None, rows.prompt)
        at_S = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None, :]
        end_B1 = rows.prompt[:, None]
        pool = jnp.where(at_S < end_B1, tokens_BS, NO_TOKEN)
        pool = jnp.where(at_S == end_B1, token_B[:, None], pool)
        return DecodeState(cache, pool, rows.prompt + 1), token_B

    size = (plan.workload.global_batch, plan.workload.seq_len)
    at = _named(plan, mesh, ("batch", None), size)
    arguments = (
        params_of(plan, config, mesh, model),
        _state(plan, config, mesh, model),
        jax.ShapeDtypeStruct(size, jnp.int32, sharding=at),
        _rows(plan, mesh, sampling),
    )
    return _lowered("prefill_step", step, plan, mesh, arguments)


def _lowered(
    name: str, step: Callable[..., Any], plan: Plan, mesh: Mesh, arguments: Any
) -> Program:
    B = plan.workload.global_batch
    kept = jax.tree.map(lambda leaf: leaf.sharding, arguments[1])
    made = _named(plan, mesh, ("batch",), (B,))
    return lower(
        name, step, plan, mesh, arguments, out_shardings=(kept, made), donate=(1,)
    )


def checked_model(plan: Plan, config: RunConfig, phase: str) -> Skeleton:
    """The plan's model, or an error for what no step here does."""
    spec, kept = plan.params.spec, config.serve.kv_dtype
    if plan.workload.phase != phase:
        raise LowerError(
            f"the plan is for a {plan.workload.phase} step; this one needs "
            f"plan.phase={phase}."
        )
    if spec is None:
        raise LowerError(
            f"{plan.params.name} is a module of your own, and the {phase} step is for "
            "models of our families. Plan it in closed form: --verify estimate."
        )
    few_bits = config.serve.weight_dtype in ("int8", "int4", "float8")
    if few_bits and spec.quantization is None:
        raise LowerError(
            f"{spec.name} has experts, whose few-bit product this release has not: its "
            "step is planned in closed form only. Set serve.weight_dtype=bfloat16, or "
            "leave --verify out."
        )
    if kept not in KV_DTYPES:
        raise LowerError(
            f"serve.kv_dtype = {kept} is planned in closed form only; a step keeps "
            f"keys and values as one of {', '.join(KV_DTYPES)}."
        )
    rare = [axis for axis in ("stage", "context") if plan.mesh.sizes[axis] > 1]
    if rare:
        raise LowerError(
            f"no {phase} step runs on {rare[0]}={plan.mesh.sizes[rare[0]]}: what "
            "serves is split by data, fsdp, expert and tensor. Set "
            f"plan.mesh.{rare[0]}=1."
        )
    return skeleton(spec)


def _chooser(plan: Plan, mesh: Mesh) -> Choose:
    """`sample`, with each device looking at rows of its own.

    The head makes a part of the vocabulary on each device, and sampling looks at a row
    many times. So each device gets whole rows, as far as there are enough of them; what
    is left of the devices samples the same rows.
    """
    apart = PartitionSpec(_sampling_axes(plan) or None)
    together = _named(plan, mesh, ("batch",), (plan.workload.global_batch,))

    def choose(
        logits_BV: jax.Array,
        rows: SamplingRows,
        counts: Counts | None,
        position_B: jax.Array,
    ) -> jax.Array:
        sampled = jax.shard_map(
            sample, mesh=mesh, in_specs=apart, out_specs=apart, check_vma=False
        )
        # Else the partitioner would split all that is one value per row this way.
        position_B = jax.lax.with_sharding_constraint(position_B, together)
        token_B = sampled(logits_BV, rows, counts, position_B)
        return jax.lax.with_sharding_constraint(token_B, together)

    return choose


def _sampling_axes(plan: Plan) -> tuple[str, ...]:
    """Mesh axes over which the rows of a batch are split to be sampled."""
    split: tuple[str, ...] = ()
    ways = 1
    of = plan.rules.activations
    for axis in (*of["batch"], *of.get("vocab", ())):
        size = plan.mesh.sizes[axis]
        if size > 1 and plan.workload.global_batch % (ways * size) == 0:
            split, ways = (*split, axis), ways * size
    return split


def params_of(
    plan: Plan, config: RunConfig, mesh: Mesh, model: Skeleton
) -> dict[str, Any]:
    """What the step is given: few bits as they are stored, all else in one dtype."""
    compute = config.train.compute_dtype
    rest = compute if model.spec.quantization is not None else plan.workload.param_dtype
    shardings = param_shardings(plan, mesh)
    return {
        row.path: jax.ShapeDtypeStruct(
            row.shape,
            row.dtype if model.keeps_dtype(row.path) else rest,
            sharding=shardings[row.path],
        )
        for row in plan.params.rows
    }


def _state(plan: Plan, config: RunConfig, mesh: Mesh, model: Skeleton) -> DecodeState:
    """ShapeDtypeStructs of the state, with shardings."""
    work = plan.workload
    forward = DecoderForward(model, config.serve.kv_dtype)
    shape = jax.eval_shape(
        lambda: empty_state(forward, work.global_batch, work.seq_len)
    )

    def placed(x: Any, *axes: str | None) -> Any:
        sharding = _named(plan, mesh, axes, x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    cache: KVCache = shape.cache
    values = {name: placed(getattr(cache, name), *VALUE_AXES) for name in ("k", "v")}
    scales = {
        name: placed(getattr(cache, name), *SCALE_AXES)
        for name in ("k_scale", "v_scale")
        if getattr(cache, name) is not None
    }
    return DecodeState(
        cache=cache._replace(**values, **scales),
        pool=placed(shape.pool, "batch", None),
        position=placed(shape.position, "batch"),
    )


def _rows(plan: Plan, mesh: Mesh, sampling: Sampling) -> Rows:
    """ShapeDtypeStructs of a batch's rows, with shardings."""
    row = Row(prompt=1, limit=1, stop=frozenset(), sampling=sampling)
    rows = [row] * plan.workload.global_batch
    shape = jax.eval_shape(lambda: rows_on_device(rows, Needs.of([sampling])))
    shardings = jax.tree.map(
        lambda x: _named(plan, mesh, ("batch", *[None] * (x.ndim - 1)), x.shape), shape
    )
    placed: Rows = abstract(shape, shardings)
    return placed


def _named(
    plan: Plan, mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> Any:
    return named(mesh, activation_spec(plan, axes, shape))
