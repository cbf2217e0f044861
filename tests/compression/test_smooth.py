"""SmoothQuant's fold changes what lies in which weight, and nothing that comes out."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import models
from llmos_jax.compression import Walk, smoothed
from llmos_jax.compression.matrices import layer, stacked

GEMMA = {
    "norm_offset": True,
    "post_norms": True,
    "qk_norm": True,
    "activation": "gelu_tanh",
    "scaled_embeddings": True,
}
MODELS = {"llama": {}, "biases": {"qkv_bias": True, "out_bias": True}, "gemma": GEMMA}
FLOAT32 = 1e-4
"""Of the largest logit. The same products in another scale differ by about 1e-6 each;
a block has a dozen, and softmax and norms spread them."""


def drawn(spec, key):
    """Parameters of which none is as it begins: norms and biases too."""
    skeleton = models.skeleton(spec)
    params = skeleton.init(key)
    made = {}
    for index, (path, x) in enumerate(sorted(params.items())):
        noise = jax.random.normal(jax.random.fold_in(key, index), x.shape)
        made[path] = x + 0.3 * noise if x.ndim < 3 and "table" not in path else x
    return skeleton, made


def texts(spec, key, rows=2, T=16):
    tokens_BT = jax.random.randint(key, (rows, T), 0, spec.vocab_size)
    return [{"inputs": np.asarray(tokens_BT), "weights": np.ones((rows, T))}]


@pytest.mark.parametrize("which", MODELS)
def test_logits_stay_and_ranges_shrink(which, tiny, key):
    spec = replace(tiny, **MODELS[which])
    skeleton, params = drawn(spec, key)
    batches = texts(spec, key)
    walk = Walk(skeleton, params, batches)
    layers, spreads = [], []
    for index in range(spec.num_layers):
        one = layer(params, index)
        seen = walk.measure(one, index)
        made, after = smoothed(one, seen, spec, 0.5)
        again = walk.measure(made, index)
        for takes in seen:
            largest_K = again[takes].largest_K
            np.testing.assert_allclose(after[takes].largest_K, largest_K, rtol=1e-3)
            np.testing.assert_allclose(
                after[takes].products_KK, again[takes].products_KK, rtol=1, atol=1e-2
            )
        before_D, after_D = (s["query"].largest_K for s in (seen, again))
        spreads.append(float(jnp.std(jnp.log(after_D)) / jnp.std(jnp.log(before_D))))
        walk.go_on(made, index)
        layers.append(made)
    assert max(spreads) < 0.75
    tokens_BT = batches[0]["inputs"]
    before, after = (
        np.asarray(skeleton.bind(each)(tokens_BT))
        for each in (params, params | stacked(layers))
    )
    np.testing.assert_allclose(after, before, atol=FLOAT32 * np.abs(before).max())


def test_a_walk_sees_what_the_model_makes(tiny, key):
    """Layer by layer a text arrives where the whole model takes it."""
    skeleton, params = drawn(tiny, key)
    batches = texts(tiny, key)
    walk = Walk(skeleton, params, batches)
    for index in range(tiny.num_layers):
        walk.go_on(layer(params, index), index)
    model = skeleton.bind(params)
    features_BTD, _ = model.features(batches[0]["inputs"])
    arrived_BTD = model.final_norm(walk.rows[0].x_BTD)
    np.testing.assert_allclose(arrived_BTD, features_BTD, atol=1e-4)


def test_padding_is_not_measured(tiny, key):
    skeleton, params = drawn(tiny, key)
    (batch,) = texts(tiny, key)
    half = {"inputs": batch["inputs"][:, :8], "weights": np.ones((2, 8))}
    padded = batch | {
        "weights": np.where(np.arange(16) < 8, 1.0, 0.0) * np.ones((2, 1))
    }
    one = layer(params, 0)
    found, expected = (
        Walk(skeleton, params, [each]).measure(one, 0) for each in (padded, half)
    )
    for takes in found:
        for mine, theirs in zip(found[takes], expected[takes], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
