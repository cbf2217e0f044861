"""FLOPs and bytes read off the jaxpr: against hand, XLA, and the planner."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType

from llmos_jax import models
from llmos_jax.errors import LowerError
from llmos_jax.ir import Workload
from llmos_jax.lowering.count import Count, count
from llmos_jax.planner.sizes import attention_flops, model_flops, sizes_of


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def layers(x, ws, body=None):
    body = body or (lambda x, w: (jnp.tanh(x @ w), None))
    return jax.lax.scan(body, x, ws)[0].sum()


def counted_loop(step):
    def body(state):
        return state[0] + step, state[1] @ state[1]

    return lambda x: jax.lax.while_loop(lambda state: state[0] < 7, body, (0, x))


def kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] @ x_ref[...]


def tiled(x, cost=None):
    spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(6,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=f32(48, 8),
        cost_estimate=cost,
    )(x)


def convolved(x, k):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=numbers)


SQUARE = 2 * 4 * 4 * 4
GROUPS = jax.ShapeDtypeStruct((4,), jnp.int32)
CASES = {
    "matmul": (lambda a, b: a @ b, [f32(8, 16), f32(16, 32)], 2 * 8 * 16 * 32),
    "batched": (
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
        [f32(3, 8, 16), f32(3, 16, 32)],
        2 * 3 * 8 * 16 * 32,
    ),
    "scan": (layers, [f32(4, 16), f32(5, 16, 16)], 5 * 2 * 4 * 16 * 16),
    "gradient": (
        jax.grad(layers, argnums=(0, 1)),
        [f32(4, 16), f32(5, 16, 16)],
        3 * 5 * 2 * 4 * 16 * 16,
    ),
    "fori_loop": (
        lambda x: jax.lax.fori_loop(0, 7, lambda i, x: x @ x, x),
        [f32(4, 4)],
        7 * SQUARE,
    ),
    "while": (counted_loop(2), [f32(4, 4)], 4 * SQUARE),
    "cond": (
        lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x + 1, x),
        [jax.ShapeDtypeStruct((), jnp.bool_), f32(4, 4)],
        SQUARE,
    ),
    "jit": (jax.jit(lambda x: x @ x), [f32(4, 4)], SQUARE),
    "dead": (lambda x: (x @ x, x @ x + 1)[0], [f32(4, 4)], SQUARE),
    "ragged": (
        jax.lax.ragged_dot,
        [f32(32, 8), f32(4, 8, 16), GROUPS],
        2 * 32 * 8 * 16,
    ),
    "ragged gradient": (
        jax.grad(lambda *xs: jax.lax.ragged_dot(*xs).sum(), argnums=(0, 1)),
        [f32(32, 8), f32(4, 8, 16), GROUPS],
        2 * 2 * 32 * 8 * 16,
    ),
    "convolution": (convolved, [f32(2, 10, 3), f32(5, 3, 7)], 2 * 2 * 10 * 7 * 5 * 3),
    "pallas": (tiled, [f32(48, 8)], 6 * 2 * 8**3),
}


@pytest.mark.parametrize("case", CASES)
def test_matmul_flops_are_those_worked_by_hand(case):
    function, arguments, wanted = CASES[case]
    assert count(function, *arguments).matmul_flops == wanted


def test_rematerialisation_counts_the_forward_pass_again():
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    function = functools.partial(layers, body=body)
    found = count(jax.grad(function, argnums=(0, 1)), f32(4, 16), f32(5, 16, 16))
    assert found.matmul_flops == 4 * 5 * 2 * 4 * 16 * 16


def test_a_custom_gradient_counts_what_it_says():
    @jax.custom_vjp
    def f(x):
        return x @ x

    f.defvjp(lambda x: (f(x), x), lambda x, dy: (dy @ x @ x,))
    found = count(jax.value_and_grad(lambda x: f(x).sum()), f32(4, 4))
    assert found.matmul_flops == 3 * SQUARE


def test_a_shard_map_counts_all_shards():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        lambda x: jax.lax.psum(x @ x.T, "a"),
        mesh=mesh,
        in_specs=jax.P("a", "b"),
        out_specs=jax.P(),
        check_vma=False,
    )
    found = count(mapped, f32(16, 8))
    assert found.matmul_flops == 8 * 2 * 4 * 4 * 4
    assert found.by_primitive["psum"] == 8 * 16


def test_a_kernels_own_estimate_is_believed():
    cost = pl.CostEstimate(flops=11, transcendentals=2, bytes_accessed=33)
    found = count(functools.partial(tiled, cost=cost), f32(48, 8))
    assert (found.flops, found.bytes) == (11, 33)


def test_a_loop_that_depends_on_data_is_refused():
    def f(x):
        return jax.lax.while_loop(lambda x: x.sum() < 7, lambda x: x @ x, x)

    with pytest.raises(LowerError, match="how often"):
        count(f, f32(4, 4))


def test_a_foreign_function_is_named():
    def f(x):
        return jax.pure_callback(lambda x: x, f32(4), x) + 1

    found = count(f, f32(4))
    assert found.opaque == {"pure_callback"} and found.flops == 4


def test_elementwise_work_is_one_flop_and_no_bytes():
    found = count(lambda x: jnp.exp(x) * x + 1, f32(100))
    assert found == Count(flops=300, by_primitive={"exp": 100, "mul": 100, "add": 100})


def test_a_matmul_moves_its_operands_and_result():
    found = count(lambda a, b: jnp.exp(a) @ b, f32(8, 16), f32(16, 32))
    assert found.bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)


def test_a_lookup_moves_the_rows_it_reads():
    ids = jax.ShapeDtypeStruct((3,), jnp.int32)
    found = count(lambda t, i: t.at[i].get(mode="clip"), f32(1000, 16), ids)
    assert 2 * 4 * 3 * 16 <= found.bytes <= 2 * 4 * 3 * 16 + 64


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a @ b,
        lambda a, b: (a * 2 + 1) @ b,
        lambda a, b: jnp.sum((a @ b) * 3),
        jax.grad(lambda a, b: jnp.sum(jnp.square(a @ b)), argnums=(0, 1)),
    ],
    ids=["matmul", "elementwise", "reduced", "gradient"],
)
def test_without_loops_xla_counts_the_same(function):
    arguments = f32(64, 128), f32(128, 32)
    found = count(function, *arguments)
    said = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert found.flops == pytest.approx(said["flops"], rel=0.01)


B, T = 4, 64


def counted(spec, remat):
    """The count of a gradient of the mean loss, in bfloat16: plain attention."""
    skeleton = models.skeleton(spec)

    def loss(params, tokens):
        cast = {path: x.astype(jnp.bfloat16) for path, x in params.items()}
        model = skeleton.bind(cast)
        logits = model.logits(
            model.routed_features(tokens, None, models.Pass(remat=remat))[0]
        )
        picked = jnp.take_along_axis(logits, tokens[:, :, None], axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked[:, :, 0])

    params = {row.path: f32(*row.shape) for row in skeleton.table.rows}
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return count(jax.value_and_grad(loss), params, tokens)


@pytest.fixture(scope="module")
def planned(tiny):
    """The planner's sizes and FLOPs, with whole scores where it counts the half that
    the causal mask leaves."""
    sizes = sizes_of(models.skeleton(tiny).table)
    workload = Workload(phase="train", global_batch=B, seq_len=T)
    half = attention_flops(sizes, workload)
    return sizes, model_flops(sizes, workload) + 3 * half, half


def test_a_train_step_is_six_flops_per_parameter_and_whole_attention(tiny, planned):
    assert counted(tiny, "none").matmul_flops == pytest.approx(planned[1], rel=0.01)


def test_full_rematerialisation_adds_a_forward_pass_of_the_layers(tiny, planned):
    sizes, plain, half = planned
    in_layers = sizes.matmul_params - sizes.vocab * sizes.embed
    again = 2 * in_layers * B * T + 2 * half
    found = counted(tiny, "full").matmul_flops
    last = 2 * B * T * sizes.layers * sizes.ffn * sizes.embed
    assert plain + again - last == pytest.approx(found, rel=0.01)
