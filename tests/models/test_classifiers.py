"""Classifiers: padding takes part in nothing, both ends are read, noise is fair."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import models
from llmos_jax.config import load_model
from llmos_jax.errors import ConfigError
from llmos_jax.ir import Classes, Lora
from llmos_jax.models.classes import Noise, dropped, pooled, words_dropped
from llmos_jax.models.lstm import _cell, recur

LABELS = ("a", "b", "c")
SMALL = {"embed_dim": 32, "vocab_size": 64, "max_seq_len": 32}
SPECS = {
    "lstm": ("lstm_classifier", {"ffn_dim": 24, "num_layers": 2}),
    "transformer": (
        "transformer_classifier",
        {"ffn_dim": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    ),
    "decoder": ("tiny", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}),
}


def spec_of(name, pooling="mean", **more):
    base, sizes = SPECS[name]
    classes = Classes(labels=LABELS, pooling=pooling)
    made = replace(load_model(base), **SMALL | sizes | more, classes=classes)
    return made.check()


def logits_of(name, tokens, lengths, pooling="mean", noise=None):
    skeleton = models.skeleton(spec_of(name, pooling))
    params = drawn(name)

    @jax.jit
    def logits(params, tokens, lengths):
        return skeleton.bind(params).class_logits(tokens, lengths, noise)

    return logits(params, jnp.asarray(tokens), jnp.asarray(lengths))


@functools.cache
def drawn(name):
    params = jax.jit(models.skeleton(spec_of(name)).init)(jax.random.key(3))
    # Fresh heads and tables are near zero: larger, so that differences show.
    return {path: x * 8 if x.ndim > 1 else x for path, x in params.items()}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(1, 64, (4, 12)).astype("int32")


LENGTHS = np.array([12, 5, 1, 8], "int32")


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
@pytest.mark.parametrize("name", SPECS)
def test_padding_takes_part_in_nothing(name, pooling, tokens):
    found = logits_of(name, tokens, LENGTHS, pooling)
    other = tokens.copy()
    for row, length in enumerate(LENGTHS):
        other[row, length:] = 7
    np.testing.assert_allclose(
        logits_of(name, other, LENGTHS, pooling), found, rtol=1e-5, atol=1e-6
    )
    alone = logits_of(name, tokens[1:2, :5], LENGTHS[1:2], pooling)
    np.testing.assert_allclose(alone, found[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lstm", "transformer"])
@pytest.mark.parametrize("at", [0, 11])
def test_first_and_last_token_both_count_at_the_other_end(name, at, tokens):
    """`last` pooling sees the first token; the first position sees the last, too."""
    other = tokens.copy()
    other[0, at] = (other[0, at] + 1) % 64
    before = logits_of(name, tokens, LENGTHS, "last")[0]
    after = logits_of(name, other, LENGTHS, "last")[0]
    assert float(jnp.abs(after - before).max()) > 1e-5


def test_recurrence_and_its_gradients_are_those_of_cells_one_after_another():
    T, R, B, F = 7, 2, 3, 5
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (T, R, B, 4, F))
    weights = jax.random.normal(keys[1], (R, F, 4, F))
    dstate = jax.random.normal(keys[2], (T, R, B, F))
    is_text = jnp.arange(T)[:, None] < jnp.asarray([7, 3, 1])[None]

    def plain(inputs, weights):
        h = c = jnp.zeros((R, B, F))
        states = []
        for t in range(T):
            gates = inputs[t] + jnp.einsum("RBF,RFGH->RBGH", h, weights)
            fresh_h, fresh_c = _cell(gates, c)
            stays = jnp.broadcast_to(is_text[t][None, :, None], h.shape)
            h, c = jnp.where(stays, fresh_h, h), jnp.where(stays, fresh_c, c)
            states.append(h)
        return jnp.stack(states)

    def total(run):
        return lambda inputs, weights: jnp.sum(run(inputs, weights) * dstate)

    wanted = jax.value_and_grad(total(plain), (0, 1))(inputs, weights)
    found = jax.value_and_grad(total(lambda x, w: recur(x, w, is_text)), (0, 1))(
        inputs, weights
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        wanted,
    )


def test_a_cell_is_that_of_the_books():
    """Against torch's LSTM, whose gates come in the same order."""
    torch = pytest.importorskip("torch")
    T, B, F = 5, 2, 6
    cell = torch.nn.LSTM(F, F, bidirectional=True)
    x = torch.randn(T, B, F)
    with torch.no_grad():
        wanted = cell(x)[0].numpy()
    weights = {name: p.detach().numpy() for name, p in cell.named_parameters()}

    def of(name):
        both = [weights[f"{name}_l0"], weights[f"{name}_l0_reverse"]]
        return np.stack([one.reshape(4, F, *one.shape[1:]) for one in both])

    bias = of("bias_ih") + of("bias_hh")
    gates = np.einsum("TBD,RGFD->TRBGF", x.numpy(), of("weight_ih"))
    gates = gates + bias[None, :, None]
    gates[:, 1] = gates[::-1, 1]
    recurrent = np.transpose(of("weight_hh"), (0, 3, 1, 2))
    found = np.array(
        recur(jnp.asarray(gates), jnp.asarray(recurrent), jnp.ones((T, B), bool))
    )
    found[:, 1] = found[::-1, 1]
    found = np.concatenate([found[:, 0], found[:, 1]], axis=-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "last", "max"])
def test_pooling_by_hand(how):
    x = np.random.default_rng(1).normal(size=(3, 4, 5)).astype("float32")
    lengths = np.array([4, 2, 1])
    by_hand = {
        "mean": lambda rows: rows.mean(axis=0),
        "last": lambda rows: rows[-1],
        "max": lambda rows: rows.max(axis=0),
    }[how]
    wanted = [by_hand(x[b, : lengths[b]]) for b in range(3)]
    found = pooled(jnp.asarray(x), jnp.asarray(lengths, jnp.int32), how)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_noise_keeps_the_mean_and_drops_the_same_features_of_all_tokens():
    noise = Noise(jax.random.key(0), 0.25, 0.5)
    x = jnp.ones((64, 6, 80))
    made = np.asarray(dropped(x, noise))
    assert set(np.unique(made.round(4))) == {0.0, np.float32(1 / 0.75).round(4)}
    assert (made == made[:, :1]).all()
    assert made.mean() == pytest.approx(1, abs=0.03)
    words = np.asarray(words_dropped(x, noise))
    assert (words == words[:, :, :1]).all()
    assert words.mean() == pytest.approx(1, abs=0.15)
    assert dropped(x, None) is x


def test_only_factors_and_head_learn_beside_a_frozen_backbone():
    with_lora = spec_of("decoder", lora=Lora(rank=2, alpha=4.0, targets=("q", "v")))
    paths = models.skeleton(with_lora).table.trained
    assert all("_lora." in path or path.startswith("classifier.") for path in paths)
    assert "classifier.kernel" in paths and any("_lora." in path for path in paths)
    spec = spec_of("decoder")
    assert spec.classes is not None
    frozen = replace(spec, classes=replace(spec.classes, is_frozen=True))
    assert sorted(models.skeleton(frozen).table.trained) == [
        "classifier.kernel",
        "classifier.out_bias",
    ]


@pytest.mark.parametrize("labels", [("one",), ("same", "same"), ()])
def test_fewer_than_two_classes_are_refused(labels):
    with pytest.raises(ConfigError, match="two or more"):
        replace(spec_of("lstm"), classes=Classes(labels=labels)).check()
