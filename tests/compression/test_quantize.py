"""A model in few bits: its table, its size, how near it is."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from llmos_jax import models
from llmos_jax.compression import How, num_bytes, quantize
from llmos_jax.errors import ConfigError
from llmos_jax.ir import Quantization

KINDS = {
    "int8": Quantization(),
    "int8 tokens": Quantization(activations="int8"),
    "int8 groups": Quantization(group=16),
    "int4": Quantization(weights="int4", group=16),
    "float8": Quantization(weights="float8"),
    "table stays": Quantization(embedding="none"),
}
FAR = {"int4": 0.35, "float8": 0.1}
"""Of the norm of logits: how far random weights may be off, by their kind. Steps of an
eighth of the largest weight, and of a sixteenth of each; else of a 127th."""


@pytest.fixture(scope="module")
def source(tiny):
    skeleton = models.skeleton(tiny)
    return skeleton, skeleton.init(jax.random.key(0))


@pytest.fixture(scope="module")
def batches(tiny):
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 32), 0, tiny.vocab_size)
    return [{"inputs": np.asarray(tokens_BT), "weights": np.ones((2, 32))}]


WAYS = [*((name, "nearest") for name in KINDS), ("int8", "gptq"), ("int4", "gptq")]


@pytest.mark.parametrize(("name", "method"), WAYS)
def test_a_quantized_model_has_its_tables_rows_and_its_sources_answers(
    name, method, source, batches
):
    how = How(quantization=KINDS[name], method=method)
    made = quantize(*source, how, batches)
    table = {row.path: (row.shape, row.dtype) for row in made.skeleton.table.rows}
    assert {p: (x.shape, str(x.dtype)) for p, x in made.params.items()} == table
    tokens_BT = batches[0]["inputs"]
    logits = source[0].bind(source[1])(tokens_BT)
    few = made.skeleton.bind(made.params)(tokens_BT)
    off = np.linalg.norm(few - logits) / np.linalg.norm(logits)
    assert 0 < off < FAR.get(name, 0.03)


def test_matrices_shrink_to_a_quarter_and_an_eighth(source):
    before = num_bytes(source[1])
    for name, share in (("int8", 1 / 4), ("int4", 1 / 8)):
        after = num_bytes(quantize(*source, How(quantization=KINDS[name])).params)
        assert after["layers"] < 1.3 * share * before["layers"]
        assert after["embed"] < 1.1 * before["embed"] / 4


def test_errors_are_told_of_every_matrix_and_layer(source, batches, tiny):
    plain = quantize(*source, How(quantization=KINDS["int4"]))
    better = quantize(*source, How(quantization=KINDS["int4"], method="gptq"), batches)
    assert {len(of) for of in plain.errors.values()} == {tiny.num_layers}
    assert "layers.attention.o" in plain.errors and len(plain.errors) == 7
    assert plain.calibration_tokens == 0 and better.calibration_tokens == 64
    for path, errors in better.errors.items():
        assert max(errors) < min(plain.errors[path])


def test_an_untied_head_has_a_scale_for_each_token(tiny, key):
    spec = replace(tiny, tied_embeddings=False)
    skeleton = models.skeleton(spec)
    made = quantize(skeleton, skeleton.init(key), How(quantization=Quantization()))
    assert made.params["head.kernel.scale"].shape == (spec.vocab_size,)
    assert made.params["embed.table.scale"].shape == (spec.vocab_size,)


def test_a_quantized_model_is_not_quantized_again(source):
    made = quantize(*source, How(quantization=KINDS["int8"]))
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(made.skeleton, made.params, How(quantization=KINDS["int4"]))
