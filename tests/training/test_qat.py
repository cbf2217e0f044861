"""What is trained for few bits is what `compress` stores, bit for bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax import driver, models, training
from llmos_jax.compression import How, quantize
from llmos_jax.config.schema import TrainSection
from llmos_jax.errors import ConfigError
from llmos_jax.ir import Quantization, Way
from llmos_jax.models.matrices import MATRIX_PATHS, as_stored
from llmos_jax.resolve import open_model

KINDS = {
    "int8": Quantization(weights="int8"),
    "int8 by 32": Quantization(weights="int8", group=32),
    "int4 by 16": Quantization(weights="int4", group=16),
    "layers alone": Quantization(
        weights="int4", group=32, embedding="none", head="none"
    ),
}


def drawn(tiny, **changes):
    """A model with weights of which some are 0 and some are equally large."""
    skeleton = models.skeleton(dataclasses.replace(tiny, **changes))
    params = skeleton.init(jax.random.key(7))
    # Few mantissa bits: many ties among the largest of a group.
    few = {
        path: x.astype(jnp.bfloat16).astype(jnp.float32) for path, x in params.items()
    }
    keys = dict(zip(sorted(MATRIX_PATHS), jax.random.split(jax.random.key(8), 7)))
    lost = {
        path: jnp.where(jax.random.bernoulli(key, 0.3, few[path].shape), 0.0, few[path])
        for path, key in keys.items()
    }
    whole = "layers.attention.v"  # outputs that are nothing but 0
    lost[whole] = lost[whole].at[..., :2].set(0)
    return skeleton, few | lost


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_trained_numbers_are_the_stored_ones(tiny, kind, tied):
    skeleton, params = drawn(tiny, tied_embeddings=tied)
    stored = quantize(skeleton, params, How(quantization=kind, clip=False))
    wanted = models.floats(stored.skeleton.table, stored.params)
    found = jax.jit(lambda params: as_stored(params, kind))(params)
    assert found.keys() == wanted.keys()
    for path, x in wanted.items():
        assert found[path].shape == params[path].shape
        np.testing.assert_array_equal(found[path], x.reshape(found[path].shape), path)
    changed = [path for path in MATRIX_PATHS if np.any(found[path] != params[path])]
    assert sorted(changed) == sorted(MATRIX_PATHS)


def test_split_weights_round_as_whole_ones(tiny):
    """Groups of 16 inputs that lie on several devices."""
    skeleton, params = drawn(tiny)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))

    def spread(x):
        split = ["fsdp" if x.ndim > 1 and x.shape[1] % 4 == 0 else None,
                 "tensor" if x.ndim > 2 and x.shape[2] % 2 == 0 else None]  # fmt: skip
        spec = PartitionSpec(None, *split) if x.ndim > 2 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    kind = KINDS["int4 by 16"]
    rounded = jax.jit(lambda params: as_stored(params, kind))
    whole, split = rounded(params), rounded(jax.tree.map(spread, params))
    for path, x in whole.items():
        np.testing.assert_array_equal(split[path], x, path)


def batch_of(vocab):
    tokens = np.random.default_rng(1).integers(0, vocab, (4, 17)).astype("int32")
    return {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
    }


def stepped(skeleton, params, **how):
    section = TrainSection(steps=9, warmup_steps=0, learning_rate=1e-2)
    optimizer = training.make_optimizer(section, skeleton.table)
    step = jax.jit(
        training.train_step(
            skeleton, optimizer, compute_dtype="float32", way=Way(), **how
        )
    )
    state = training.TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params)
    )
    for _ in range(3):
        state, metrics = step(state, batch_of(skeleton.spec.vocab_size))
    return state.params, metrics


def test_gradients_are_the_rounded_models_for_the_weights_it_is_rounded_from(tiny):
    skeleton, params = drawn(tiny)
    kind, batch = KINDS["int4 by 16"], batch_of(tiny.vocab_size)

    def loss(params):
        return training.mean_loss(
            skeleton, params, batch, compute_dtype="float32", way=Way()
        )

    wanted = jax.grad(loss)(as_stored(params, kind))
    optimizer = optax.sgd(1.0)
    step = training.train_step(
        skeleton, optimizer, compute_dtype="float32", way=Way(), stored_as=kind
    )
    state = training.TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params)
    )
    after, _ = jax.jit(step)(state, batch)
    for path, gradient in wanted.items():
        scale = float(jnp.max(jnp.abs(gradient))) + 1e-9
        np.testing.assert_allclose(
            params[path] - after.params[path], gradient, atol=1e-4 * scale
        )


def test_zeros_stay_and_others_learn(tiny):
    skeleton, params = drawn(tiny)
    kept, _ = stepped(skeleton, params, keep_zeros=True)
    free, _ = stepped(skeleton, params)
    for path in MATRIX_PATHS:
        lost = np.asarray(params[path]) == 0
        assert lost.any() and np.all(np.asarray(kept[path])[lost] == 0), path
        assert np.any(np.asarray(free[path])[lost] != 0), path
        assert np.mean(np.asarray(kept[path])[~lost] == 0) < 1e-3, path


def test_a_run_is_stored_as_it_was_trained(tmp_path, small_model, text_file):
    """`compress` takes its rounding, the stored numbers are those of the last step, and
    the run's loss is of them."""
    folder, out = tmp_path / "run", tmp_path / "few"
    asked = {"train__steps": 4, "qat__weights": "int4", "qat__group": 16}
    asked |= {"data__validation_share": 0.03}
    report = small.train(small.overrides(folder, small_model, text_file, **asked))
    made = driver.compress(
        str(folder),
        [f"compress.out={out}", "batch.seq_len=32", "compress.evaluate_batches=2"],
    )
    section = made["config"]["compress"]
    assert (section["weights"], section["group"]) == ("int4", 16)
    assert section["clip"] is False and section["method"] == "nearest"
    kind = Quantization(weights="int4", group=16)
    trained = as_stored(open_model(str(folder)).params(), kind)
    stored = open_model(str(out))
    found = models.floats(stored.skeleton.table, stored.params())
    for path, x in trained.items():
        np.testing.assert_array_equal(found[path].reshape(x.shape), x, path)
    same_text = [
        f"data.train={text_file}", "train.compute_dtype=float32",
        "data.validation_share=0.03", "batch.seq_len=32",
    ]  # fmt: skip
    scored = driver.evaluate(str(out), same_text)
    assert scored["loss"] == pytest.approx(report["val_loss"], rel=1e-4)


MISTAKES = {
    "a group that does not divide": (["qat.weights=int4", "qat.group=48"], "divide"),
    "no group": (["qat.weights=int4"], "needs group"),
    "lora": (["qat.weights=int8", "lora.rank=4"], r"\[lora\]"),
}


@pytest.mark.parametrize(("texts", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_before_anything_is_made(
    texts, told, tmp_path, small_model, small_run, text_file
):
    model = small_run if "lora.rank=4" in texts else small_model
    asked = small.overrides(tmp_path / "run", model, text_file) + texts
    with pytest.raises(ConfigError, match=told):
        driver.train(small.config_of(asked))
    assert not (tmp_path / "run").exists()
