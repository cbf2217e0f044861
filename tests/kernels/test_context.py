"""Attention of split sequences: the same numbers as on one device, evenly shared."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from laws import RELATIVE, Attend, results
from laws import assert_near as assert_close

from llmos_jax.ir import EXCHANGES
from llmos_jax.kernels.attention import (
    CONTEXT,
    PLAIN,
    context,
    context_attention,
    device_order,
    reference,
    splash,
)
from llmos_jax.kernels.attention.context import PARTS
from llmos_jax.kernels.target import Target, lowered_for

pytestmark = pytest.mark.slow

BFLOAT16_RELATIVE = 2e-2
"""Of the largest entry: weights, and the output of each visit, have 8 bits."""

SHAPE = (2, 32, 4, 2, 32)
"""B, T, N, K, H."""


def inputs(shape: tuple[int, ...], key: jax.Array) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output."""
    B, T, N, K, H = shape
    q, dout = jax.random.normal(key, (2, B, T, N, H))
    k, v = jax.random.normal(jax.random.fold_in(key, 1), (2, B, T, K, H))
    return q, k, v, dout


def documents(B: int, T: int) -> jax.Array:
    """Documents of 5, 6, ... tokens, others in each sequence: few end with a chunk."""
    ends = np.cumsum(np.arange(5, 5 + T))
    rows = [np.searchsorted(ends, np.arange(b, b + T), side="right") for b in range(B)]
    return jnp.asarray(np.stack(rows), jnp.int32)


def split(
    C: int, exchange: str, implementation: str | None, segment: jax.Array | None
) -> Attend:
    """Attention over C devices, of sequences in `device_order`."""
    mesh = Mesh(np.array(jax.devices()[:C]), ("context",))
    segments = () if segment is None else (segment,)

    def part(q: jax.Array, k: jax.Array, v: jax.Array, *segment: jax.Array):
        return context_attention(
            *(q, k, v, segment[0] if segment else None, ("context",)),
            exchange=exchange,
            implementation=implementation,
        )

    spec = PartitionSpec(None, "context")
    mapped = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(spec,) * (3 + len(segments)),
        out_specs=spec,
        check_vma=False,
    )
    return lambda q, k, v: mapped(q, k, v, *segments)


def assert_split_changes_nothing(
    shape: tuple[int, ...],
    C: int,
    exchange: str,
    implementation: str | None,
    segmented: bool,
    key: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    relative: float = RELATIVE,
) -> None:
    B, T = shape[:2]
    arrays = [x.astype(dtype) for x in inputs(shape, key)]
    segment = documents(B, T) if segmented else None
    order = device_order(T, C)
    there = None if segment is None else segment[:, order]
    got = results(
        split(C, exchange, implementation, there), *(x[:, order] for x in arrays)
    )
    expected = results(
        lambda q, k, v: reference.attention(q, k, v, None, segment),
        *(x.astype(jnp.float32) for x in arrays),
    )
    assert all(x.dtype == dtype for x in got)
    assert_close(got, [x[:, order] for x in expected], relative)


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(
    "C", [4, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 8))]
)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_split_sequences_attend_as_on_one_device(
    exchange: str, C: int, segmented: bool, key: jax.Array
) -> None:
    assert_split_changes_nothing(SHAPE, C, exchange, None, segmented, key)


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("implementation", PARTS)
def test_every_implementation_of_parts_may_be_split(
    implementation: str, segmented: bool, key: jax.Array
) -> None:
    # 150 tokens of a device, 75 of a chunk: no whole block of any implementation.
    shape = (1, 300, 4, 2, 32)
    assert_split_changes_nothing(shape, 2, "ring", implementation, segmented, key)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", PARTS)
def test_bfloat16_is_as_near_as_bfloat16_can_be(
    implementation: str, key: jax.Array
) -> None:
    shape = (1, 256, 4, 2, 64)
    half = (jnp.bfloat16, BFLOAT16_RELATIVE)
    assert_split_changes_nothing(shape, 4, "ring", implementation, False, key, *half)


def test_two_mesh_axes_may_split_a_sequence(key: jax.Array) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("context", "tensor"))
    axes = ("context", "tensor")
    q, k, v, _ = inputs(SHAPE, key)
    order = device_order(SHAPE[1], 4)
    for exchange in EXCHANGES:
        mapped = jax.shard_map(
            lambda q, k, v, exchange=exchange: context_attention(
                q, k, v, None, axes, exchange=exchange
            ),
            mesh=mesh,
            in_specs=PartitionSpec(None, axes),
            out_specs=PartitionSpec(None, axes),
            check_vma=False,
        )
        got = jax.jit(mapped)(q[:, order], k[:, order], v[:, order])
        expected = reference.attention(q, k, v, None)[:, order]
        assert_close([got], [expected])


@pytest.mark.parametrize("C", [1, 2, 3, 8])
def test_every_device_attends_to_as_many_pairs(C: int) -> None:
    T = 48
    order = device_order(T, C)
    assert sorted(order) == list(range(T))
    seen = (order + 1).reshape(C, -1)
    assert len(set(seen.sum(axis=1))) == 1
    assert np.all(np.diff(seen, axis=1) > 0), "positions increase on a device"


def test_a_visit_costs_half_of_all_pairs_whoever_is_visited(key: jax.Array) -> None:
    x = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32)
    jaxpr = jax.make_jaxpr(split(4, "ring", "reference", None))(x, x, x).jaxpr
    branches = [
        branch.jaxpr
        for equation in equations(jaxpr)
        if equation.primitive.name == "cond"
        for branch in equation.params["branches"]
    ]
    assert len(branches) == 4, "two in the loop, two for the last visit"
    costs = [
        sum(
            int(np.prod(e.outvars[0].aval.shape))
            for e in equations(branch)
            if e.primitive.name == "exp" and e.outvars[0].aval.ndim == 5
        )
        for branch in branches
    ]
    T = 64 // 4
    assert set(costs) == {2 * 2 * T * T // 2}, "two heads, weights made twice"


def equations(jaxpr: jax.extend.core.Jaxpr) -> list:
    """All equations, those of loops and branches included."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += equations(inner)
    return found


@pytest.mark.parametrize(
    ("exchange", "travels"),
    [
        ("ring", {"ppermute": 2 * 3 + 2 * 3 + 2 * 4}),
        ("gather", {"all_gather": 2 + 2, "reduce_scatter": 2}),
    ],
)
def test_keys_travel_once_for_each_pass_if_the_context_is_saved(
    exchange: str, travels: dict[str, int], key: jax.Array
) -> None:
    C = 4
    x = jnp.zeros((1, 64, 2, 16))
    save = jax.checkpoint_policies.save_only_these_names(CONTEXT)
    layer = jax.checkpoint(
        lambda x: split(C, exchange, "reference", None)(2 * x, x, x), policy=save
    )
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x)))))(x).jaxpr
    counted = dict.fromkeys(travels, 0)
    for equation, times in repeated(jaxpr, 1):
        if equation.primitive.name in counted:
            counted[equation.primitive.name] += times
    # Keys and values once forward and once back; their gradients go home.
    assert counted == travels


def repeated(jaxpr: jax.extend.core.Jaxpr, times: int) -> list:
    """All equations, each with how often it runs."""
    found = []
    for equation in jaxpr.eqns:
        found.append((equation, times))
        inside = times * equation.params.get("length", 1)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += repeated(inner, inside)
    return found


def test_an_odd_number_of_tokens_is_refused() -> None:
    with pytest.raises(AssertionError, match="12 tokens cannot be cut into 2 x 4"):
        device_order(12, 4)
    x = jax.ShapeDtypeStruct((1, 12, 2, 16), jnp.float32)
    with pytest.raises(AssertionError, match="two chunks, which 3 tokens cannot"):
        jax.eval_shape(split(4, "ring", None, None), x, x, x)


def test_every_planned_exchange_exists() -> None:
    assert set(context._EXCHANGES) == set(EXCHANGES)


@pytest.mark.parametrize(
    ("platform", "T", "expected"),
    [
        ("tpu", 512, "splash"),
        ("tpu", 256, "reference"),
        ("gpu", 2048, "blocked"),
        ("cpu", 1024, "reference"),
    ],
)
def test_the_target_decides_who_attends_to_parts(
    platform: str, T: int, expected: str
) -> None:
    x = jax.ShapeDtypeStruct((1, T, 8, 128), jnp.float32)
    with lowered_for(Target(platform, 8)):
        assert context._fastest(x, x) == expected


@pytest.mark.parametrize(
    ("exchange", "travels"),
    [
        # Keys, values and segments leave, and go on in the loop, in both passes; two
        # gradients go on in the loop, to the last visit and home.
        ("ring", {"collective_permute": 2 * 3 * 2 + 2 * 3}),
        ("gather", {"all_gather": 2 * 3, "reduce_scatter": 2}),
    ],
)
def test_a_tpu_gets_splash_kernels_between_transfers(
    exchange: str, travels: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    # Other processes may be asking the same compiler; no TPU is opened.
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    mesh = Mesh(np.array(found.devices), ("context",))
    spec = PartitionSpec(None, "context")
    mapped = jax.shard_map(
        lambda q, k, v, segment: context_attention(
            q, k, v, segment, ("context",), exchange=exchange
        ),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(mapped(*arrays).astype(jnp.float32))

    def abstract(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    q, k = abstract(1, 4096, 8, 128), abstract(1, 4096, 2, 128)
    with lowered_for(Target("tpu", 4)):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        lowered = gradient.lower(q, k, k, abstract(1, 4096, dtype="int32"))
    text = lowered.as_text()
    visits = {"ring": 1 + 2 + 2, "gather": 1 + 2}[exchange]
    # Forward, dq, and dk with dv.
    assert text.count("@tpu_custom_call(") == 3 * visits
    assert {name: text.count(f"stablehlo.{name}") for name in travels} == travels


# The laws of parts.


@pytest.fixture(params=sorted(PARTS))
def part(request: pytest.FixtureRequest) -> ModuleType:
    return PARTS[request.param]


LENGTHS = [(40, 40, True), (40, 40, False), (40, 150, False), (600, 40, False)]
"""T, S, causal."""


def meeting(B: int, T: int, S: int) -> tuple[jax.Array, jax.Array]:
    """Segments of T queries and of S keys; the last queries have no key."""
    q = jnp.broadcast_to(jnp.arange(T) * 9 // T, (B, T))
    k = jnp.broadcast_to(jnp.arange(S) * 7 // S, (B, S))
    return q.astype(jnp.int32), k.astype(jnp.int32)


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(("T", "S", "causal"), LENGTHS)
def test_parts_equal_their_definition(
    part: ModuleType, T: int, S: int, causal: bool, segmented: bool, key: jax.Array
) -> None:
    B, N, K, H = 2, 4, 2, 16
    segments = meeting(B, T, S) if segmented else None
    q, dout = jax.random.normal(key, (2, B, T, N, H))
    k, v = jax.random.normal(jax.random.fold_in(key, 1), (2, B, S, K, H))
    visible = np.tril(np.ones((T, S), bool)) if causal else np.ones((T, S), bool)
    visible = np.broadcast_to(visible, (B, T, S))
    if segments is not None:
        visible = visible & (segments[0][:, :, None] == segments[1][:, None, :])

    def define(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        keys, values = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, keys) * H**-0.5
        scores = jnp.where(visible[:, None], scores, -jnp.inf)
        seen = np.any(visible, axis=-1)[:, None, :, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, 0), axis=-1)
        weights = jnp.where(seen, weights, 0)
        lse = jax.nn.logsumexp(scores, axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, values), lse

    out, pull, lse = jax.vjp(define, q, k, v, has_aux=True)
    attend = jax.jit(functools.partial(part.forward_part, causal=causal))
    got_out, got_lse = attend(q, k, v, segments)
    seen = np.isfinite(lse)
    assert np.all(seen) != segmented
    np.testing.assert_allclose(got_lse[seen], lse[seen], rtol=0, atol=RELATIVE * 10)
    assert np.all(got_lse[~seen] < reference.UNSEEN) and np.all(np.isfinite(got_lse))
    assert np.all(np.moveaxis(np.asarray(got_out), 2, 1)[~seen] == 0)
    mean = jnp.einsum("BTNH,BTNH->BNT", out, dout)
    back = jax.jit(functools.partial(part.backward_part, causal=causal))
    gradients = back(q, k, v, dout, got_lse, mean, segments)
    assert_close([got_out, *gradients], [out, *pull(dout)])


def test_splash_parts_leave_whole_blocks_unmasked() -> None:
    q = jax.ShapeDtypeStruct((1, 512, 4, 128), jnp.bfloat16)
    block, kernel = splash._part_kernel(q, 512, False, PLAIN)
    assert block == 512
    assert all(x is None for x in kernel.fwd_mask_info)
