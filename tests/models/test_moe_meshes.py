"""Experts on a mesh: every device's tokens reach them, and nothing else changes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from moe_layer import Layer, Params, equations_of, layer_of, near, sharder_of

from llmos_jax.ir import ModelSpec
from llmos_jax.kernels.grouped_matmul import grouped_matmul
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.lowering import MeshSharder
from llmos_jax.models import annotated_by, moe
from llmos_jax.models.annotate import along
from llmos_jax.training.router import RouterWeights, router_losses

pytestmark = pytest.mark.slow

B, T = 8, 16

KINDS: dict[str, Any] = {
    "odd": {"experts_per_token": 3, "norm_topk_prob": False},
    "mixtral": {"experts_per_token": 2, "norm_topk_prob": True},
    "qwen3": {"experts_per_token": 4, "norm_topk_prob": True},
}
MESHES: list[tuple[str, dict[str, int]]] = [
    ("odd", {"data": 8}),
    ("odd", {"fsdp": 8}),
    ("odd", {"tensor": 4}),
    ("odd", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("odd", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("odd", {"context": 2, "expert": 4}),
    ("mixtral", {"expert": 2}),
    ("mixtral", {"expert": 4, "tensor": 2}),
    ("mixtral", {"data": 2, "expert": 4}),
    ("mixtral", {"fsdp": 2, "expert": 4}),
    ("mixtral", {"expert": 8}),
    ("qwen3", {"expert": 2, "tensor": 4}),
    ("qwen3", {"expert": 4}),
    ("qwen3", {"data": 2, "fsdp": 2, "expert": 2}),
    ("qwen3", {"expert": 8}),
]


def outcome(
    layer: Layer, params: Params, x: jax.Array, sharder: MeshSharder | None = None
) -> Any:
    """Value, routing and gradients of the layer and of both router losses."""

    def total(params: Params, x: jax.Array) -> tuple[jax.Array, Any]:
        y, routing = layer(params, x)
        one = jax.tree.map(lambda part: part[None], routing)
        extra, _ = router_losses(one, RouterWeights(balance=0.5, z=0.1))
        return jnp.sum(jnp.sin(y)) + extra, (y, routing)

    def traced(params: Params, x: jax.Array) -> Any:
        # A function of its own: jit would find the trace of another mesh.
        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)

    with annotated_by(sharder) if sharder else contextlib.nullcontext():
        return jax.jit(traced)(params, x)


@pytest.fixture(scope="module")
def given(tiny: ModelSpec) -> Callable[[str], tuple[Layer, Params, jax.Array]]:
    """A layer of a kind, its parameters and tokens."""
    x = jax.random.normal(jax.random.key(1), (B, T, tiny.embed_dim))
    spec = replace(tiny, family="moe", num_experts=8, ffn_dim=32)

    def find(kind: str) -> tuple[Layer, Params, jax.Array]:
        params, layer = layer_of(replace(spec, **KINDS[kind]))
        return layer, params, x

    return functools.cache(find)


@pytest.fixture(scope="module")
def whole(given: Any) -> Callable[[str], Any]:
    """What one device makes of a kind."""
    return functools.cache(lambda kind: outcome(*given(kind)))


@pytest.mark.parametrize(("kind", "sizes"), MESHES, ids=str)
def test_a_mesh_changes_nothing(
    kind: str, sizes: dict[str, int], given: Any, whole: Callable[[str], Any]
) -> None:
    found = outcome(*given(kind), sharder_of(sizes))
    jax.tree.map(near, found, whole(kind))


@pytest.mark.parametrize(
    "favoured",
    [[5], [2, 3], [0, 1, 2, 3, 4, 5]],
    ids=["all want one expert", "one device gets all", "one device gets nothing"],
)
def test_the_worst_routing_loses_nothing_on_a_mesh(
    favoured: list[int], given: Any
) -> None:
    layer, params, x = given("mixtral")
    x, router = jnp.abs(x), params["router"].at[:, jnp.array(favoured)].add(0.2)
    found = outcome(layer, {**params, "router": router}, x, sharder_of({"expert": 4}))
    wanted = outcome(layer, {**params, "router": router}, x)
    load_E = np.asarray(found[0][1][1].load_E)
    assert load_E[favoured].sum() == pytest.approx(min(len(favoured), 2) / 2)
    jax.tree.map(near, found, wanted)


@jax.custom_vjp
def careless(x_mK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The worst that `grouped_matmul` may be: rows past the groups are multiplied by
    the last matrix, belong to its gradient, and come out as NaN."""
    rest = x_mK.shape[0] - jnp.sum(sizes_E)
    y_mN = grouped_matmul(x_mK, w_EKN, sizes_E.at[-1].add(rest))
    is_row_m1 = jnp.arange(x_mK.shape[0])[:, None] < jnp.sum(sizes_E)
    return jnp.where(is_row_m1, y_mN, jnp.nan)


def careless_forward(*given: jax.Array) -> Any:
    return careless(*given), given


def careless_backward(given: Any, dy_mN: jax.Array) -> Any:
    x_mK, w_EKN, sizes_E = given
    rest = x_mK.shape[0] - jnp.sum(sizes_E)
    whole_E = sizes_E.at[-1].add(rest)
    _, backward = jax.vjp(lambda w: grouped_matmul(x_mK, w, whole_E), w_EKN)
    dx_mK = careless(dy_mN, w_EKN.swapaxes(1, 2), sizes_E)
    return dx_mK, backward(dy_mN)[0], None


careless.defvjp(careless_forward, careless_backward)
megablox = functools.partial(grouped_matmul, implementation="megablox")


@pytest.mark.parametrize("kernel", [careless, megablox], ids=["careless", "megablox"])
def test_rows_that_did_not_arrive_reach_nothing(
    kernel: Any,
    given: Any,
    whole: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The TPU's kernel leaves what it finds in them; interpreted, that is NaN."""
    x_mK, w_EKN = jnp.ones((128, 8)), jnp.ones((1, 8, 8))
    assert np.isnan(kernel(x_mK, w_EKN, jnp.array([100], jnp.int32))[100:]).all()
    monkeypatch.setattr(moe, "grouped_matmul", kernel)
    found = outcome(*given("mixtral"), sharder_of({"expert": 4}))
    jax.tree.map(near, found, whole("mixtral"))


def test_experts_work_inside_a_stage(given: Any) -> None:
    """Two stages, each of which is four devices and has its own tokens."""
    layer, params, x = given("mixtral")
    sharder = sharder_of({"stage": 2, "fsdp": 2, "expert": 2})
    x_2BTD = jnp.stack([x, -x])

    def one(params: Params, x_1BTD: jax.Array) -> jax.Array:
        return layer(params, x_1BTD[0])[0][None]

    def piped(params: Params, x_2BTD: jax.Array) -> jax.Array:
        split = (PartitionSpec(), PartitionSpec("stage"))
        return along(
            ("stage",), one, params, x_2BTD, in_split=split, out_split=split[1]
        )

    def plain(params: Params, x_2BTD: jax.Array) -> jax.Array:
        return jnp.stack([layer(params, x)[0] for x in x_2BTD])

    def gradient(function: Callable[..., jax.Array]) -> Any:
        def total(params: Params, x_2BTD: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(function(params, x_2BTD)))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(params, x_2BTD)

    with annotated_by(sharder):
        found = gradient(piped)
    jax.tree.map(near, found, gradient(plain))


def test_rows_travel_and_weights_stay(given: Any) -> None:
    """On a TPU: three exchanges forward (rows, their weights, and back), as many
    backward; along `expert` nothing is gathered but numbers of rows."""
    layer, params, x = given("mixtral")
    sizes = {"fsdp": 2, "expert": 4}
    with lowered_for(Target("tpu", 8)), annotated_by(sharder_of(sizes)):
        jaxpr = jax.make_jaxpr(
            jax.grad(lambda *given: jnp.sum(jnp.sin(layer(*given)[0])), argnums=(0, 1))
        )(params, x)
    equations = list(equations_of(jaxpr.jaxpr))
    exchanges = [eqn for eqn in equations if eqn.primitive.name == "ragged_all_to_all"]
    assert len(exchanges) == 6
    assert all(eqn.params["axis_name"] == ("expert",) for eqn in exchanges)
    gathered = {
        eqn.invars[0].aval.shape: eqn.params["axis_name"]
        for eqn in equations
        if eqn.primitive.name == "all_gather"
    }
    D, F = params["gate"].shape[1:]
    weights = {(2, D // 2, F): ("fsdp",), (2, F, D // 2): ("fsdp",)}
    assert gathered == {(8,): ("expert",), **weights}
