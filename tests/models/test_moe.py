"""Mixture of experts on one device: exact, nothing dropped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moe_layer import Params, equations_of, layer_of, near

from llmos_jax.config import load_model
from llmos_jax.ir import ModelSpec, Way
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.models import empty_cache, param_table, skeleton
from llmos_jax.models.moe import Routing, choose
from llmos_jax.training import mean_loss, train_step
from llmos_jax.training.router import ROUTER_METRICS, RouterWeights, router_losses
from llmos_jax.training.step import TrainState

B, T = 8, 16


@pytest.fixture(scope="module")
def spec(tiny: ModelSpec) -> ModelSpec:
    """`tiny` with eight experts, three of which each token takes."""
    return replace(tiny, family="moe", num_experts=8, experts_per_token=3, ffn_dim=32)


def numpy_layer(spec: ModelSpec, params: Params, x: np.ndarray) -> np.ndarray:
    """Float64, one token and one expert at a time."""
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:2]):
        logits = x[at] @ w["router"]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        chosen = np.argsort(-p, kind="stable")[: spec.experts_per_token]
        share = p[chosen].sum() if spec.norm_topk_prob else 1.0
        for e in chosen:
            gate = x[at] @ w["gate"][e]
            h = gate / (1 + np.exp(-gate)) * (x[at] @ w["up"][e])
            out[at] += p[e] / share * (h @ w["down"][e])
    return out


def ragged_products(jaxpr: Any) -> int:
    """How often a jaxpr multiplies by group, wherever."""
    names = [eqn.primitive.name for eqn in equations_of(jaxpr)]
    return names.count("ragged_dot_general")


def largest(jaxpr: Any) -> int:
    """Elements of the largest array that a jaxpr makes, kernels' insides aside."""
    return max(
        getattr(made.aval, "size", 0)
        for eqn in equations_of(jaxpr, skip="pallas_call")
        for made in eqn.outvars
    )


# --- sizes ---


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    # Mistral's paper (arXiv 2401.04088) says 47 B and 13 B, Qwen's (arXiv 2505.09388)
    # 30.5 B and 3.3 B.
    [("mixtral_8x7b", 46.70, 12.88), ("qwen3_30b_a3b", 30.53, 3.34)],
)
def test_parameter_counts_are_the_published_ones(
    name: str, billions: float, active: float
) -> None:
    table = param_table(load_model(name))
    assert table.num_params == load_model(name).num_params
    assert table.num_params / 1e9 == pytest.approx(billions, abs=0.01)
    assert table.active_params / 1e9 == pytest.approx(active, abs=0.01)


# --- one layer ---


@pytest.mark.parametrize("renormalised", [True, False])
def test_a_layer_is_a_loop_over_tokens_and_experts(
    spec: ModelSpec, renormalised: bool, key: jax.Array
) -> None:
    spec = replace(spec, norm_topk_prob=renormalised)
    params, layer = layer_of(spec)
    x = jax.random.normal(key, (2, T, spec.embed_dim))
    y, _ = jax.jit(layer)(params, x)
    near(y, numpy_layer(spec, params, np.asarray(x, np.float64)))


def test_no_assignment_is_dropped_when_all_tokens_want_the_same_experts(
    spec: ModelSpec, key: jax.Array
) -> None:
    params, layer = layer_of(spec)
    x = jnp.abs(jax.random.normal(key, (2, T, spec.embed_dim)))
    params["router"] = params["router"].at[:, jnp.array([1, 4, 6])].add(1.0)
    y, routing = jax.jit(layer)(params, x)
    # Logits of 50 differ from float64's by 4e-6, and so do probabilities.
    near(y, numpy_layer(spec, params, np.asarray(x, np.float64)), 1e-4)
    third = 1 / 3
    near(routing.load_E, [0, third, 0, 0, third, 0, third, 0])


def test_renormalised_weights_are_the_softmax_of_the_chosen_logits(
    key: jax.Array,
) -> None:
    """As Mixtral's paper has it (arXiv 2401.04088, section 2.1)."""
    logits_nE = 3 * jax.random.normal(key, (32, 8))
    weight_nk, expert_nk = choose(logits_nE, 2, renormalised=True)
    top_nk, wanted_nk = jax.lax.top_k(logits_nE, 2)
    assert np.array_equal(expert_nk, wanted_nk)
    near(weight_nk, jax.nn.softmax(top_nk, axis=-1))
    whole_nk, _ = choose(logits_nE, 2, renormalised=False)
    near(whole_nk, jnp.take_along_axis(jax.nn.softmax(logits_nE), wanted_nk, axis=1))


def test_routing_is_in_float32_whatever_the_compute_dtype(
    spec: ModelSpec, key: jax.Array
) -> None:
    """In bfloat16 the logits would be 0.4% off."""
    params, layer = layer_of(spec)
    params = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    x = jax.random.normal(key, (2, T, spec.embed_dim), jnp.bfloat16)
    y, routing = jax.jit(layer)(params, x)
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"], np.float64)
    sums = np.exp(logits).sum(axis=-1, keepdims=True)
    near(routing.square, np.mean(np.log(sums) ** 2), 1e-6)
    near(routing.probability_E, np.mean(np.exp(logits) / sums, axis=(0, 1)), 1e-6)
    assert {leaf.dtype.name for leaf in routing} == {"float32"}
    assert y.dtype == jnp.bfloat16


def test_gradients_are_those_of_a_dense_sum_over_all_experts(
    spec: ModelSpec, key: jax.Array
) -> None:
    params, layer = layer_of(spec)
    x = jax.random.normal(key, (2, T, spec.embed_dim))

    def dense(params: Params, x: jax.Array) -> jax.Array:
        p = jax.nn.softmax(x @ params["router"])
        floor = jnp.sort(p, axis=-1)[:, :, -spec.experts_per_token, None]
        p = jnp.where(p >= floor, p, 0.0)
        p = p / jnp.sum(p, axis=-1, keepdims=True)
        gate = jnp.einsum("BTD,EDF->BTEF", x, params["gate"])
        up = jnp.einsum("BTD,EDF->BTEF", x, params["up"])
        return jnp.einsum(
            "BTEF,EFD,BTE->BTD", jax.nn.silu(gate) * up, params["down"], p
        )

    def gradient(function: Callable[..., jax.Array]) -> Any:
        def total(params: Params, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(function(params, x)))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(params, x)

    found, wanted = gradient(lambda *given: layer(*given)[0]), gradient(dense)
    jax.tree.map(near, found, wanted)


def test_no_array_on_a_tpu_holds_every_expert_for_every_token(
    spec: ModelSpec, key: jax.Array
) -> None:
    """Neither [tokens, E, F] nor [E, rows, D]: rows k-fold, or the weights."""
    spec = replace(spec, embed_dim=128, ffn_dim=128)
    params, layer = layer_of(spec)
    x = jnp.zeros((B, 512, spec.embed_dim))
    with lowered_for(Target("tpu", 1)):
        jaxpr = jax.make_jaxpr(jax.grad(lambda *given: jnp.sum(layer(*given)[0])))(
            params, x
        )
    assert "pallas_call" in str(jaxpr) and ragged_products(jaxpr.jaxpr) == 0
    rows = B * 512 * spec.experts_per_token
    assert largest(jaxpr.jaxpr) <= max(rows * 128, params["gate"].size)


# --- the model ---


@pytest.fixture(scope="module")
def model(spec: ModelSpec) -> tuple[Any, Params, dict[str, jax.Array]]:
    found = skeleton(spec)
    tokens = jax.random.randint(jax.random.key(2), (2, T + 1), 0, spec.vocab_size)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    return found, jax.jit(found.init)(jax.random.key(0)), batch


def test_cached_decoding_gives_the_logits_of_the_whole_sequence(
    spec: ModelSpec, model: Any
) -> None:
    found, params, batch = model
    tokens_BT = batch["inputs"]

    @jax.jit
    def run(tokens_BT: jax.Array, position_BT: jax.Array, cache: Any) -> Any:
        bound = found.bind(params)
        x_BTD, cache = bound.features(tokens_BT, position_BT, cache)
        return bound.logits(x_BTD), cache

    prefix_BT = jnp.broadcast_to(jnp.arange(T - 3)[None, :], (2, T - 3))
    cache = empty_cache(spec, 2, T, jnp.float32)
    piece_BTV, cache = run(tokens_BT[:, :-3], prefix_BT, cache)
    pieces = [piece_BTV]
    for position in range(T - 3, T):
        token_B1, at_B1 = tokens_BT[:, position, None], jnp.full((2, 1), position)
        piece_BTV, cache = run(token_B1, at_B1, cache)
        pieces.append(piece_BTV)
    wanted_BTV = jax.jit(lambda tokens: found.bind(params)(tokens))(tokens_BT)
    near(jnp.concatenate(pieces, axis=1), wanted_BTV, 1e-4)


def _gradient(model: Any, remat: str) -> Callable[[Params], Params]:
    found, _, batch = model

    def loss(params: Params) -> jax.Array:
        way = Way(remat=remat)
        return mean_loss(found, params, batch, compute_dtype="float32", way=way)

    return jax.grad(loss)


@pytest.fixture(scope="module")
def plain(model: Any) -> Params:
    return jax.jit(_gradient(model, "none"))(model[1])


def test_remat_changes_no_gradient(model: Any, plain: Params) -> None:
    found = jax.jit(_gradient(model, "full"))(model[1])
    jax.tree.map(lambda a, b: near(a, b, 1e-4), found, plain)


@pytest.mark.parametrize(
    ("remat", "products"),
    [("none", 9), ("full", 11), ("ffn_gate", 10), ("ffn_gate,ffn_up", 9), ("dots", 9)],
)
def test_a_backward_pass_never_multiplies_by_down_again(
    model: Any, remat: str, products: int
) -> None:
    """Three products forward and six backward; gate and up again unless saved."""
    assert _live_products(_gradient(model, remat), model[1]) == products


def _live_products(function: Callable[..., Any], params: Params) -> int:
    from jax.interpreters import partial_eval as pe

    jaxpr = jax.make_jaxpr(function)(params).jaxpr
    live, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return ragged_products(live)


# --- what keeps routers in order ---


def test_balance_loss_is_one_for_equal_loads_and_hugging_faces_over_k(
    key: jax.Array,
) -> None:
    E, k = 8, 2
    equal = Routing(jnp.full((1, E), 1 / E), jnp.full((1, E), 1 / E), jnp.zeros((1,)))
    added, figures = router_losses(equal, RouterWeights(balance=1.0, z=0.0))
    assert float(added) == pytest.approx(1.0) == float(figures["router_balance"])
    logits_nE = jax.random.normal(key, (64, E))
    p_nE = jax.nn.softmax(logits_nE)
    _, expert_nk = jax.lax.top_k(p_nE, k)
    mask_nkE = jax.nn.one_hot(expert_nk, E)
    # transformers, modeling_mixtral.py, load_balancing_loss_func
    theirs = jnp.sum(jnp.mean(mask_nkE, axis=0) * jnp.mean(p_nE, axis=0)[None, :]) * E
    load_E = jnp.mean(mask_nkE, axis=(0, 1))
    ours = Routing(load_E[None], jnp.mean(p_nE, axis=0)[None], jnp.zeros((1,)))
    added, figures = router_losses(ours, RouterWeights(balance=1.0, z=0.0))
    assert float(added) * k == pytest.approx(float(theirs), rel=1e-5)
    assert float(figures["expert_load"]) == pytest.approx(float(load_E.max()) * E)


def test_router_losses_are_summed_over_layers_and_weighed() -> None:
    load_LE = jnp.array([[0.5, 0.5], [1.0, 0.0]])
    routing = Routing(load_LE, jnp.array([[0.5, 0.5], [0.75, 0.25]]), jnp.arange(2.0))
    added, figures = router_losses(routing, RouterWeights(balance=0.01, z=0.1))
    assert float(added) == pytest.approx(0.01 * (1.0 + 1.5) + 0.1 * 1.0)
    assert float(figures["router_balance"]) == pytest.approx(1.25)
    assert float(figures["router_z"]) == pytest.approx(0.5)
    assert float(figures["expert_load"]) == pytest.approx(2.0)


@pytest.fixture(scope="module")
def stepped(model: Any) -> Callable[[RouterWeights, int], tuple[Params, Any]]:
    """One step of plain descent: gradients (as differences) and metrics."""
    found, params, batch = model

    @functools.cache
    def run(weights: RouterWeights, microbatches: int) -> tuple[Params, Any]:
        optimizer = optax.sgd(1.0)
        step = train_step(
            *(found, optimizer),
            compute_dtype="float32",
            way=Way(microbatches=microbatches),
            router_weights=weights,
        )
        state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
        after, metrics = jax.jit(step)(state, batch)
        return jax.tree.map(jnp.subtract, params, after.params), metrics

    return run


Z_ALONE = RouterWeights(balance=0.0, z=0.1)


@pytest.mark.slow
def test_router_losses_move_the_router_and_not_the_reported_loss(stepped: Any) -> None:
    plain, before = stepped(Z_ALONE, 1)
    pushed, after = stepped(RouterWeights(balance=0.5, z=0.1), 1)
    assert before.keys() == {"loss", "grad_norm", *ROUTER_METRICS}
    assert float(before["loss"]) == pytest.approx(float(after["loss"]), rel=1e-6)
    path = "layers.ffn.router"
    assert float(jnp.abs(pushed[path] - plain[path]).max()) > 1e-4
    assert float(before["expert_load"]) >= 1.0


def test_microbatches_average_gradients_and_metrics(stepped: Any) -> None:
    (whole, one), (parts, two) = stepped(Z_ALONE, 1), stepped(Z_ALONE, 2)
    jax.tree.map(lambda a, b: near(a, b, 1e-3), parts, whole)
    for name in ("loss", "router_z"):
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-5)


def test_a_dense_model_reports_what_it_always_has(tiny: ModelSpec) -> None:
    found, optimizer = skeleton(tiny), optax.sgd(1.0)
    step = train_step(found, optimizer, compute_dtype="float32", way=Way())
    params = jax.eval_shape(found.init, jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    _, metrics = jax.eval_shape(step, state, {"inputs": tokens, "targets": tokens})
    assert metrics.keys() == {"loss", "grad_norm"}
