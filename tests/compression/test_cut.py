"""A model with parts taken out: exact where they did nothing, mended where not."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import models
from llmos_jax.compression import importance
from llmos_jax.compression.calibrate import Moments
from llmos_jax.compression.cut import cut, kept, mended
from llmos_jax.compression.shapes import Shape

FAMILIES = {
    "tied": {},
    "untied": {"tied_embeddings": False},
    "qwen": {"qkv_bias": True, "out_bias": True, "qk_norm": True},
    "gemma": {
        "activation": "gelu_tanh",
        "norm_offset": True,
        "post_norms": True,
        "qk_norm": True,
        "scaled_embeddings": True,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
        "sliding_window": 8,
        "layer_pattern": ("sliding", "sliding", "full"),
        "local_rope_theta": 100.0,
    },
    "gemma, untied": {"scaled_embeddings": True, "tied_embeddings": False},
}
LOST = {"ffn": [1, 5, 60], "kv_heads": [2], "embed": [0, 7, 8, 33], "layers": [1, 4]}
CASES = [
    *(("tied", [kind]) for kind in LOST),
    *((family, list(LOST)) for family in FAMILIES),
]
EXACT = 2e-5
"""Of the largest logit: float32 sums in another order, through five layers."""


@pytest.fixture
def whole(tiny):
    """Spec fields -> a model whose every parameter is drawn."""

    def make(**fields):
        skeleton = models.skeleton(replace(tiny, num_layers=5, **fields))
        params = skeleton.init(jax.random.key(0))
        for number, path in enumerate(params):
            drawn = jax.random.normal(jax.random.key(number), params[path].shape)
            if path.endswith(("scale", "bias")):
                params[path] += 0.3 * drawn
            elif path == "embed.table":
                params[path] = drawn
        return skeleton, params

    return make


@pytest.fixture(scope="module")
def batches(tiny):
    tokens_BT = jax.random.randint(jax.random.key(9), (2, 32), 0, tiny.vocab_size)
    return [{"inputs": np.asarray(tokens_BT), "weights": np.ones((2, 32))}]


def without(params, kinds):
    """The same, with nothing in what is to go."""
    made = dict(params)

    def clear(path, *where):
        if path in made:
            made[path] = made[path].at[where].set(0)

    every = slice(None)
    if "ffn" in kinds:
        clear("layers.ffn.up", every, every, np.array(LOST["ffn"]))
    if "kv_heads" in kinds:
        clear("layers.attention.v", every, every, np.array(LOST["kv_heads"]))
        clear("layers.attention.v_bias", every, np.array(LOST["kv_heads"]))
    if "embed" in kinds:
        embed = np.array(LOST["embed"])
        clear("embed.table", every, embed)
        clear("layers.attention.o", ..., embed)
        clear("layers.attention.o_bias", every, embed)
        clear("layers.ffn.down", ..., embed)
    if "layers" in kinds:
        for path in ("attention.o", "attention.o_bias", "ffn.down"):
            clear(f"layers.{path}", np.array(LOST["layers"]))
    return made


def shape_without(spec, kinds):
    """Its sizes."""
    sizes = {
        "ffn": spec.ffn_dim,
        "kv_heads": spec.num_kv_heads,
        "embed": spec.embed_dim,
        "layers": spec.num_layers,
    }
    left = {kind: n - len(LOST[kind]) * (kind in kinds) for kind, n in sizes.items()}
    return Shape(
        ffn_dim=left["ffn"],
        num_kv_heads=left["kv_heads"],
        embed_dim=left["embed"],
        num_layers=left["layers"],
    )


@pytest.mark.parametrize(
    ("family", "kinds"), CASES, ids=[f"{family}-{'+'.join(k)}" for family, k in CASES]
)
def test_parts_that_did_nothing_go_without_a_trace(family, kinds, whole, batches):
    skeleton, params = whole(**FAMILIES[family])
    params = without(params, kinds)
    studied = importance.study(skeleton, params, batches)
    shape = shape_without(skeleton.spec, kinds)
    chosen = kept(studied.importance, shape)
    small, few = cut(skeleton, params, studied, shape, chosen)
    table = {row.path: (row.shape, row.dtype) for row in small.table.rows}
    assert {p: (x.shape, str(x.dtype)) for p, x in few.items()} == table
    assert small.spec.num_params == sum(x.size for x in few.values())
    tokens_BT = batches[0]["inputs"]
    before = skeleton.bind(params)(tokens_BT)
    after = small.bind(few)(tokens_BT)
    assert float(jnp.std(before)) > 0.1
    np.testing.assert_allclose(after, before, atol=EXACT * float(jnp.max(abs(before))))


def test_layers_that_stay_see_as_far_as_they_did(whole, batches):
    skeleton, params = whole(**FAMILIES["gemma"])
    studied = importance.study(skeleton, params, batches)
    shape = shape_without(skeleton.spec, ["layers"])
    chosen = replace(kept(studied.importance, shape), layers=np.array([0, 2, 3]))
    small, _ = cut(skeleton, params, studied, shape, chosen)
    assert small.spec.is_sliding == (True, False, True)
    assert small.spec.layer_pattern == ("sliding", "full")


def test_what_stays_adds_what_the_lost_inputs_did():
    x_mK = jax.random.normal(jax.random.key(0), (500, 8))
    x_mK = x_mK.at[:, 3].set(x_mK[:, 0] - 2 * x_mK[:, 1])
    w_KN = jax.random.normal(jax.random.key(1), (8, 5))
    moments = Moments(x_mK.T @ x_mK, jnp.max(jnp.abs(x_mK), axis=0))
    stays = jnp.array([0, 1, 2, 4, 5, 6, 7])
    made_mN = x_mK[:, stays] @ mended(w_KN, moments, stays)
    plain = jnp.linalg.norm(x_mK[:, stays] @ w_KN[stays] - x_mK @ w_KN)
    assert jnp.linalg.norm(made_mN - x_mK @ w_KN) < 0.05 * plain


def test_mending_and_norms_bring_a_cut_model_nearer(whole, batches):
    skeleton, params = whole()
    studied = importance.study(skeleton, params, batches)
    shape = Shape(num_layers=5, embed_dim=48, num_kv_heads=4, ffn_dim=96)
    chosen = kept(studied.importance, shape)
    tokens_BT = batches[0]["inputs"]
    before = skeleton.bind(params)(tokens_BT)

    def off(studied):
        small, few = cut(skeleton, params, studied, shape, chosen)
        return float(jnp.linalg.norm(small.bind(few)(tokens_BT) - before))

    def forgotten(study):
        plain = {
            takes: moments._replace(products_KK=jnp.eye(len(moments.largest_K)))
            for takes, moments in study.seen.items()
        }
        even = {name: jnp.ones_like(x_D) for name, x_D in study.normed.items()}
        return study._replace(seen=plain, normed=even)

    plain = replace(
        studied,
        layers=[forgotten(study) for study in studied.layers],
        final=forgotten(studied.final),
    )
    assert off(studied) < 0.9 * off(plain)


def test_dtypes_stay(whole, batches):
    skeleton, params = whole()
    params = {path: x.astype(jnp.bfloat16) for path, x in params.items()}
    studied = importance.study(skeleton, params, batches)
    shape = shape_without(skeleton.spec, ["ffn", "embed"])
    _, few = cut(skeleton, params, studied, shape, kept(studied.importance, shape))
    assert {x.dtype for x in few.values()} == {jnp.dtype("bfloat16")}
