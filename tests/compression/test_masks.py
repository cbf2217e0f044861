"""Zeros among a model's weights: how many, where, and which first."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import models
from llmos_jax.compression import check_masks, mask
from llmos_jax.compression.matrices import MATRICES, flat, layer
from llmos_jax.config.schema import PruneSection
from llmos_jax.errors import ConfigError
from llmos_jax.ir import Classes, Lora, Quantization


@pytest.fixture(scope="module")
def source(tiny):
    skeleton = models.skeleton(tiny)
    return skeleton, skeleton.init(jax.random.key(0))


@pytest.fixture(scope="module")
def batches(tiny):
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 32), 0, tiny.vocab_size)
    return [{"inputs": np.asarray(tokens_BT), "weights": np.ones((2, 32))}]


def flats(params, index=0):
    """The seven matrices of a layer, [K, N]."""
    one = layer(params, index)
    return {
        matrix.path: np.asarray(flat(one[matrix.path], matrix)) for matrix in MATRICES
    }


def test_wanda_takes_the_same_share_of_every_output(source, batches):
    asked = PruneSection(method="wanda", sparsity=0.3)
    made = mask(*source, asked, batches)
    for w_KN in flats(made.params, 1).values():
        assert set((w_KN == 0).sum(axis=0)) == {int(0.3 * len(w_KN))}
    assert made.share == pytest.approx(0.3, abs=0.01)
    assert set(made.zeros) == {f"layers.{matrix.path}" for matrix in MATRICES}


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize(("pattern", "several"), [("2:4", 4), ("4:8", 8)])
def test_a_pattern_keeps_half_of_neighbouring_inputs(
    method, pattern, several, source, batches
):
    made = mask(*source, PruneSection(method=method, pattern=pattern), batches)
    for w_KN in flats(made.params).values():
        groups = (w_KN == 0).reshape(-1, several, w_KN.shape[1]).sum(axis=1)
        assert (groups == several // 2).all()
    assert made.share == 0.5


def test_magnitude_has_one_threshold_for_a_matrix(source):
    made = mask(*source, PruneSection(method="magnitude", sparsity=0.4))
    whole = flats(source[1])
    for path, w_KN in flats(made.params).items():
        lost = w_KN == 0
        assert abs(whole[path][lost]).max() <= abs(whole[path][~lost]).min()
        assert lost.mean() == pytest.approx(0.4, abs=1e-3)
    assert made.calibration_tokens == 0


def test_wanda_keeps_small_weights_of_large_inputs(source, batches):
    skeleton, params = source
    scale = params["layers.ffn_norm.scale"]
    loud = params | {"layers.ffn_norm.scale": scale.at[:, :8].set(1000.0)}
    gate_KN = flats(mask(skeleton, loud, PruneSection(method="wanda"), batches).params)
    assert (gate_KN["ffn.gate"][:8] != 0).all()
    quiet = flats(mask(skeleton, params, PruneSection(method="wanda"), batches).params)
    assert (quiet["ffn.gate"][:8] == 0).any()


def test_a_layer_is_measured_behind_layers_that_are_pruned(source, batches):
    skeleton, params = source
    asked = PruneSection(method="wanda", sparsity=0.9)
    made = mask(skeleton, params, asked, batches)
    first = {path: x[:1] for path, x in made.params.items() if "layers." in path}
    mixed = {
        path: jnp.concatenate([first[path], x[1:]]) if path in first else x
        for path, x in params.items()
    }
    again = mask(skeleton, mixed, asked, batches)
    for path, w_KN in flats(made.params, 1).items():
        assert (w_KN == flats(again.params, 1)[path]).all(), path


def test_the_rest_stays_as_it_is(source, batches):
    made = mask(*source, PruneSection(method="wanda"), batches)
    matrices = {f"layers.{matrix.path}" for matrix in MATRICES}
    for path, x in source[1].items():
        same = made.params[path] == x
        assert bool(jnp.all(same | (made.params[path] == 0)))
        assert path in matrices or bool(jnp.all(same))


MISTAKES = {
    "all": (PruneSection(method="wanda", sparsity=1.0), {}, "between 0 and 1"),
    "none": (PruneSection(method="wanda", sparsity=0.0), {}, "between 0 and 1"),
    "pattern and share": (
        PruneSection(method="wanda", sparsity=0.7, pattern="2:4"),
        {},
        "keeps half",
    ),
    "odd width": (
        PruneSection(method="wanda", pattern="4:8"),
        {"ffn_dim": 100},
        "groups of 8",
    ),
    "quantized": (PruneSection(), {"quantization": Quantization()}, "is quantized"),
    "experts": (PruneSection(), {"num_experts": 4, "experts_per_token": 2}, "experts"),
    "factors": (
        PruneSection(),
        {"lora": Lora(rank=2, alpha=4.0, targets=("q",))},
        "merge them",
    ),
    "classes": (PruneSection(), {"classes": Classes(labels=("a", "b"))}, "classifier"),
}


@pytest.mark.parametrize(("asked", "fields", "told"), MISTAKES.values(), ids=MISTAKES)
def test_what_makes_no_sense_is_refused(asked, fields, told, tiny):
    with pytest.raises(ConfigError, match=told):
        check_masks(replace(tiny, **fields), asked)
