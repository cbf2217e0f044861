"""The fused decoder of one CPU computes what the decoder does, for every family."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import models
from llmos_jax.ir import ModelSpec, Quantization, RopeScaling
from llmos_jax.kernels.int8_matmul import quantized
from llmos_jax.models import fused
from llmos_jax.models.weight import as_float

RELATIVE = {"int8": 3e-4, "none": 3e-3}
"""Of the largest logit, by what activations are. Whole numbers of 8 bits are the same
on both ways, but a row that lies between two of them may be rounded either way after
sums in another order; with "none" one way has 13 to 15 bits, the other float32."""

BASE = ModelSpec(
    name="fused",
    family="llama",
    num_layers=3,
    embed_dim=64,
    ffn_dim=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=200,
    max_seq_len=128,
    tied_embeddings=True,
)
GEMMA = replace(
    BASE,
    activation="gelu_tanh",
    norm_offset=True,
    post_norms=True,
    scaled_embeddings=True,
    qk_norm=True,
    attention_scale=0.2,
    attention_softcap=30.0,
    logit_softcap=20.0,
    sliding_window=5,
    layer_pattern=("sliding", "full"),
    local_rope_theta=500.0,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
)
SPECS = {
    "llama": BASE,
    "untied": replace(BASE, tied_embeddings=False),
    "biased": replace(BASE, qkv_bias=True, out_bias=True),
    "gemma": GEMMA,
    "odd": replace(BASE, ffn_dim=104, vocab_size=77, num_heads=2, num_kv_heads=1),
}
WAYS = {
    "int8": Quantization(),
    "W8A8": Quantization(activations="int8"),
    "int8 in groups": Quantization(group=8),
    "int4": Quantization(weights="int4", group=8),
    "float table": Quantization(embedding="none", head="none"),
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def quantized_params(spec: ModelSpec, key: jax.Array) -> models.Params:
    """Random parameters of a quantized spec: norms and biases, too, are not trivial."""
    plain = models.skeleton(replace(spec, quantization=None)).init(key)
    made = {}
    rows = {row.path: row for row in models.skeleton(spec).table.rows}
    for index, (path, x) in enumerate(sorted(plain.items())):
        if path in rows:
            noise = jax.random.normal(jax.random.fold_in(key, index), x.shape)
            made[path] = x + 0.1 * noise
            continue
        made |= _quantized(path, x, rows[f"{path}.values"], rows[f"{path}.scale"], spec)
    return made


def _quantized(path, x, values, scale, spec: ModelSpec) -> models.Params:
    how = spec.quantization
    if values.axes[0] == "vocab":
        w = quantized(x.T)
        return {f"{path}.values": w.values.T, f"{path}.scale": w.scale}
    is_layer = values.axes[0] == "layers"
    is_grouped = is_layer and how.group is not None
    num_outside = len(scale.axes) - is_layer - is_grouped
    N = int(np.prod(x.shape[x.ndim - num_outside :]))
    kind, group = (how.weights, how.group) if is_layer else ("int8", None)
    flat = x.reshape(-1 if is_layer else 1, *x.shape[is_layer:])
    flat = flat.reshape(flat.shape[0], -1, N)
    w = jax.vmap(lambda w: quantized(w, kind, group))(flat)
    return {
        f"{path}.values": w.values.reshape(values.shape),
        f"{path}.scale": w.scale.reshape(scale.shape),
    }


def both(spec: ModelSpec, key: jax.Array, kv_dtype: str = "float32", rotate=False):
    """(the plain decoder's logits, the fused one's) of two sequences."""
    skeleton, params = models.skeleton(spec), quantized_params(spec, key)
    tokens = jax.random.randint(key, (2, 24), 0, spec.vocab_size)
    position = jnp.broadcast_to(jnp.arange(24)[None, :], tokens.shape)
    model = skeleton.bind(params)
    cache = models.empty_cache(spec, 2, 32, kv_dtype, rotate_keys=rotate)
    plain = model.logits(model.features(tokens, position, cache)[0])
    if reason := fused.unsuited(spec):
        pytest.skip(reason)
    way = fused.FusedDecoder(spec, kv_dtype, rotate_keys=rotate)
    packed = way.pack(dict(params))
    x, _ = jax.jit(way.forward)(packed, tokens, position, None, way.empty_cache(2, 32))
    return plain, jax.jit(way.logits)(packed, x)


def assert_near(got: jax.Array, expected: jax.Array, relative: float) -> None:
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * scale)


@pytest.mark.parametrize("name", SPECS)
def test_every_family_gives_the_decoders_logits(name: str, key: jax.Array) -> None:
    spec = replace(SPECS[name], quantization=Quantization()).check()
    plain, got = both(spec, key)
    assert_near(got, plain, RELATIVE["none"])


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_quantize_gives_the_decoders_logits(
    name: str, key: jax.Array
) -> None:
    spec = replace(BASE, quantization=WAYS[name]).check()
    plain, got = both(spec, key)
    assert_near(got, plain, RELATIVE[WAYS[name].activations])


@pytest.mark.parametrize("rotate", [False, True])
def test_an_int8_cache_gives_the_decoders_logits(rotate: bool, key: jax.Array) -> None:
    spec = replace(BASE, quantization=Quantization()).check()
    plain, got = both(spec, key, "int8", rotate)
    assert_near(got, plain, 2e-2)  # a number of the cache may fall the other way


def test_a_sequence_gives_the_same_bits_alone_in_pieces_and_among_others(
    key: jax.Array,
) -> None:
    spec = replace(GEMMA, quantization=Quantization()).check()
    if reason := fused.unsuited(spec):
        pytest.skip(reason)
    way = fused.FusedDecoder(spec, "int8")
    packed = way.pack(quantized_params(spec, key))
    tokens = jax.random.randint(key, (17, 20), 0, spec.vocab_size)
    position = jnp.broadcast_to(jnp.arange(20)[None, :], tokens.shape)
    forward = jax.jit(way.forward)
    together, _ = forward(packed, tokens, position, None, way.empty_cache(17, 32))
    cache, alone = way.empty_cache(3, 32), []
    for start, stop in ((0, 1), (1, 14), (14, 15), (15, 20)):
        piece = slice(start, stop)
        x, cache = forward(
            packed, tokens[4:5, piece], position[4:5, piece], jnp.array([2]), cache
        )
        alone.append(x)
    np.testing.assert_array_equal(jnp.concatenate(alone, axis=1)[0], together[4])


def test_packing_takes_the_parameters_as_it_goes(key: jax.Array) -> None:
    spec = replace(BASE, quantization=Quantization()).check()
    if reason := fused.unsuited(spec):
        pytest.skip(reason)
    params = quantized_params(spec, key)
    fused.FusedDecoder(spec).pack(params)
    assert params == {}


def test_a_matrix_in_few_bits_is_its_numbers_times_its_scales(key: jax.Array) -> None:
    w = jax.random.normal(key, (16, 3, 8))  # inputs 16, outputs 3 x 8
    kept = quantized(w.reshape(16, 24), "int4", 4)
    values, scale = kept.values.reshape(8, 3, 8), kept.scale.reshape(4, 3, 8)
    got = as_float(values, scale, 2)
    step = jnp.abs(jnp.repeat(scale.astype(jnp.float32), 4, axis=0))
    # Half a step, and one where +8 had to become 7.
    assert bool(jnp.all(jnp.abs(got - w) <= 1.01 * step))
    assert got.shape == w.shape


@pytest.mark.slow
def test_floats_of_a_quantized_model_give_its_logits(key: jax.Array) -> None:
    spec = replace(BASE, tied_embeddings=False, quantization=WAYS["int4"]).check()
    skeleton, params = models.skeleton(spec), quantized_params(spec, key)
    plain = models.skeleton(replace(spec, quantization=None))
    as_floats = models.floats(skeleton.table, params)
    assert {p: x.shape for p, x in as_floats.items()} == {
        row.path: row.shape for row in plain.table.rows
    }
    tokens = jax.random.randint(key, (2, 9), 0, spec.vocab_size)
    expected = plain.bind(as_floats)(tokens)
    assert_near(skeleton.bind(params)(tokens), expected, RELATIVE["none"])
