"""The decoder: shapes, causality, remat, cache, and an independent oracle."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.config import load_model
from llmos_jax.ir import REMATS, ModelSpec, RopeScaling, Way
from llmos_jax.models import empty_cache, param_table, skeleton
from llmos_jax.training import mean_loss


@pytest.mark.parametrize(
    ("name", "billions"),
    # Meta's and Hugging Face's model cards give these counts.
    [("smollm2_135m", 0.1345), ("llama3_8b", 8.03), ("llama3_70b", 70.55)],
)
def test_parameter_count_is_the_published_one(name: str, billions: float) -> None:
    table = param_table(load_model(name))
    assert table.num_params == load_model(name).num_params
    assert table.num_params / 1e9 == pytest.approx(billions, rel=1e-3)


def test_llama3_405b_has_405_billion_parameters() -> None:
    assert load_model("llama3_405b").num_params / 1e9 == pytest.approx(405.85, rel=1e-3)


def test_every_parameter_has_one_logical_axis_per_dimension(tiny: ModelSpec) -> None:
    for row in param_table(tiny).rows:
        assert len(row.axes) == len(row.shape), row
        assert None not in row.axes, row


def test_logits_depend_on_no_later_token(tiny: ModelSpec, key: jax.Array) -> None:
    found = skeleton(tiny)
    params = found.init(key)
    tokens_BT = jax.random.randint(key, (1, 12), 0, tiny.vocab_size)

    def features_T(embedded_TD: jax.Array, at: int) -> jax.Array:
        table = params["embed.table"].at[tokens_BT[0]].set(embedded_TD)
        model = found.bind({**params, "embed.table": table})
        return model.features(tokens_BT)[0][0, at].sum()

    embedded_TD = params["embed.table"][tokens_BT[0]]
    gradient_TD = jax.grad(features_T)(embedded_TD, 5)
    reach_T = jnp.abs(gradient_TD).sum(axis=1)
    # Tokens that occur twice share a row; judge only positions of fresh tokens.
    tokens = np.asarray(tokens_BT[0])
    later = [t for t in range(6, 12) if tokens[t] not in tokens[:6]]
    assert later
    assert all(reach_T[t] == 0 for t in later)
    assert reach_T[5] > 0 and reach_T[0] > 0


@pytest.mark.parametrize("remat", [name for name in REMATS if name != "none"])
def test_remat_changes_no_gradient(tiny: ModelSpec, key: jax.Array, remat: str) -> None:
    found = skeleton(tiny)
    params = found.init(key)
    tokens = jax.random.randint(key, (2, 17), 0, tiny.vocab_size)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    def gradient(policy: str) -> dict[str, jax.Array]:
        def loss(params: dict[str, jax.Array]) -> jax.Array:
            return mean_loss(
                found, params, batch, compute_dtype="float32", way=Way(remat=policy)
            )

        return jax.jit(jax.grad(loss))(params)

    plain, remade = gradient("none"), gradient(remat)
    for path in plain:
        np.testing.assert_allclose(remade[path], plain[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_cached_decoding_gives_the_logits_of_the_whole_sequence(
    tiny: ModelSpec, key: jax.Array, tied: bool
) -> None:
    found = skeleton(replace(tiny, tied_embeddings=tied))
    params = found.init(key)
    tokens_BT = jax.random.randint(key, (2, 20), 0, tiny.vocab_size)
    model = found.bind(params)
    expected_BTV = model(tokens_BT)
    cache = empty_cache(tiny, 2, 32, jnp.float32)
    prefix_BT = jnp.broadcast_to(jnp.arange(13)[None, :], (2, 13))
    x_BTD, cache = model.features(tokens_BT[:, :13], prefix_BT, cache)
    pieces = [model.logits(x_BTD)]
    for position in range(13, 20):
        x_BTD, cache = model.features(
            tokens_BT[:, position : position + 1], jnp.full((2, 1), position), cache
        )
        pieces.append(model.logits(x_BTD))
    np.testing.assert_allclose(
        jnp.concatenate(pieces, axis=1), expected_BTV, rtol=1e-4, atol=1e-5
    )


def test_decoder_equals_a_loop_written_from_the_paper(
    tiny: ModelSpec, key: jax.Array
) -> None:
    """Numpy, float64, one token and one head at a time: nothing in common but sizes."""
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32
    )
    spec = replace(tiny, rope_scaling=scaling)
    found = skeleton(spec)
    params = found.init(key)
    tokens_BT = jax.random.randint(key, (1, 10), 0, spec.vocab_size)
    got = found.bind(params)(tokens_BT)[0]
    weights = {path: np.asarray(value, np.float64) for path, value in params.items()}
    expected = _numpy_decoder(spec, weights, np.asarray(tokens_BT[0]))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def _numpy_decoder(
    spec: ModelSpec, weights: dict[str, np.ndarray], tokens: np.ndarray
) -> np.ndarray:
    x = weights["embed.table"][tokens]
    for layer in range(spec.num_layers):
        w = {
            path.removeprefix("layers."): value[layer]
            for path, value in weights.items()
            if path.startswith("layers.")
        }
        x = x + _numpy_attention(spec, w, _rms(x, w["attention_norm.scale"], spec))
        h = _rms(x, w["ffn_norm.scale"], spec)
        gate = h @ w["ffn.gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn.up"])) @ w["ffn.down"]
    x = _rms(x, weights["final_norm.scale"], spec)
    head = weights["embed.table"].T if spec.tied_embeddings else weights["head.kernel"]
    return x @ head


def _rms(x: np.ndarray, scale: np.ndarray, spec: ModelSpec) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * scale


def _numpy_attention(
    spec: ModelSpec, w: dict[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    group = spec.num_heads // spec.num_kv_heads
    out = np.zeros_like(x)
    for head in range(spec.num_heads):
        shared = head // group
        q = _rope(spec, x @ w["attention.q"][:, head])
        k = _rope(spec, x @ w["attention.k"][:, shared])
        v = x @ w["attention.v"][:, shared]
        for t in range(len(x)):
            scores = k[: t + 1] @ q[t] / np.sqrt(spec.head_dim)
            weights = np.exp(scores - scores.max())
            out[t] += (weights / weights.sum()) @ v[: t + 1] @ w["attention.o"][head]
    return out


def _rope(spec: ModelSpec, x: np.ndarray) -> np.ndarray:
    half = spec.head_dim // 2
    rotated = np.empty_like(x)
    for t in range(len(x)):
        for pair in range(half):
            angle = t * _frequency(spec, pair)
            a, b = x[t, pair], x[t, pair + half]
            rotated[t, pair] = a * np.cos(angle) - b * np.sin(angle)
            rotated[t, pair + half] = a * np.sin(angle) + b * np.cos(angle)
    return rotated


def _frequency(spec: ModelSpec, pair: int) -> float:
    frequency = spec.rope_theta ** (-2 * pair / spec.head_dim)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_seq_len * frequency / (2 * np.pi)
    if turns > scaling.high_freq_factor:
        return frequency
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return float((1 - smooth) * frequency / scaling.factor + smooth * frequency)
