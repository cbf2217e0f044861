"""Lower the engine's own programs for a plan: decode steps, and chunks of prompts,
over pages of keys and values.

They are for plans that split no sequences: any sequence may come to have any page, so
the devices share every layer. The shapes are those of an engine with a seat for each
sequence of the plan, and pages for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmos_jax.config.schema import RunConfig
from llmos_jax.ir import Plan
from llmos_jax.lowering import Program, lower, replicated
from llmos_jax.models import Params
from llmos_jax.scheduling import DRAWN, FULL, Room
from llmos_jax.serving.dispatch import empty_state
from llmos_jax.serving.forward import DecoderForward, Forward
from llmos_jax.serving.opening import OnMesh, placed
from llmos_jax.serving.packing import packed
from llmos_jax.serving.planned import checked_model, params_of
from llmos_jax.serving.programs import Programs
from llmos_jax.serving.shapes import Shape
from llmos_jax.serving.steps import decode_program, step_program

_PAGE = 128
"""Tokens of a page on a TPU, and here on whatever a plan is for."""


def serves_pages(plan: Plan) -> bool:
    """Whether an engine could serve by this plan."""
    return plan.mesh.sizes["data"] == plan.mesh.sizes["fsdp"] == 1


def lower_paged_decode(plan: Plan, config: RunConfig, mesh: Mesh) -> Program:
    """Lower the engine's decode steps of a plan: a token of each sequence at a time.

    Args:
        plan: of `with_repeated_heads`, for global_batch sequences of seq_len tokens.
        config: the dtypes.
        mesh: of the plan's shape.

    Returns:
        (params, state, words) -> (state, tokens), as `steps.decode_program`; the state
        is donated.

    Raises:
        LowerError: the plan is of another phase, or for what no step here does.
    """
    B, S = plan.workload.global_batch, plan.workload.seq_len
    shape = Shape("decode", B, 1, B, DRAWN)
    return _lowered("decode", plan, config, mesh, shape, _room(plan, S))


def lower_paged_chunk(plan: Plan, config: RunConfig, mesh: Mesh) -> Program:
    """Lower the engine's step that takes a chunk of prompts.

    Args:
        plan: of `with_repeated_heads`. For decoding: a chunk of serve.step_tokens of
            one prompt, beside global_batch sequences of seq_len places. For prefill:
            seq_len tokens of each of global_batch prompts, of serve.context places if
            these are more.
        config: the dtypes, and those sizes.
        mesh: of the plan's shape.

    Returns:
        (params, state, words) -> (state, chosen), as `steps.step_program`; the state is
        donated.

    Raises:
        LowerError: as `lower_paged_decode`.
    """
    B, S = plan.workload.global_batch, plan.workload.seq_len
    if plan.workload.phase == "decode":
        shape = Shape("step", 1, config.serve.step_tokens, 1, FULL)
        return _lowered("decode", plan, config, mesh, shape, _room(plan, S))
    shape = Shape("step", B, S, B, FULL)
    room = _room(plan, max(S, config.serve.context or 0))
    return _lowered("prefill", plan, config, mesh, shape, room)


def _room(plan: Plan, context: int) -> Room:
    """Pages for all places of all seats."""
    seats, M = plan.workload.global_batch, -(-context // _PAGE)
    spec = plan.params.spec
    return Room(
        seats=seats,
        pages=seats * M,
        page_size=_PAGE,
        context=M * _PAGE,
        step_tokens=context,
        vocab_size=0 if spec is None else spec.vocab_size,
        is_ragged=False,
    )


def _lowered(
    phase: str, plan: Plan, config: RunConfig, mesh: Mesh, shape: Shape, room: Room
) -> Program:
    model = checked_model(plan, config, phase)
    serve, whole = config.serve, replicated(mesh)
    plain = DecoderForward(model, serve.kv_dtype, rotate_keys=serve.rotate_keys)
    forward = OnMesh(plain, whole)
    state = placed(jax.eval_shape(lambda: empty_state(forward, room)), plan, mesh)
    params = params_of(plan, config, mesh, model)
    programs = Programs(forward, params, state, room)
    like = programs.like(shape)
    run = _program(forward, shape, like)

    def step(params: Params, *rest: Any) -> Any:
        return run(model.cast(params, config.train.compute_dtype), *rest)

    words = jax.ShapeDtypeStruct(packed(like).shape, jnp.int32, sharding=whole)
    kept = jax.tree.map(lambda leaf: leaf.sharding, state)
    name = "decode_step" if shape.kind == "decode" else "prefill_step"
    given = (params, state, words)
    out = (kept, whole)
    return lower(name, step, plan, mesh, given, out_shardings=out, donate=(1,))


def _program(forward: Forward, shape: Shape, like: Any) -> Callable[..., Any]:
    if shape.kind == "decode":
        return decode_program(forward, shape.variant, like)
    return step_program(forward, shape.variant, like)
