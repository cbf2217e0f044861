"""Scores and distances by their definitions, whole and in pieces, on a mesh too."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT32_RELATIVE

from llmos_jax import models, training
from llmos_jax.data import TokenFile
from llmos_jax.ir import Pins, Workload
from llmos_jax.lowering import device_mesh, param_shardings
from llmos_jax.planner import plan
from llmos_jax.training import evaluate
from llmos_jax.training.evaluate import compare_step, score_step

B, T = 8, 16


@pytest.fixture(scope="module")
def skeleton(tiny):
    return models.skeleton(tiny)


@pytest.fixture(scope="module")
def params(skeleton):
    return skeleton.init(jax.random.key(0))


@pytest.fixture(scope="module")
def others(skeleton, params):
    """Near enough that the same token is often the likeliest."""
    noise = skeleton.init(jax.random.key(1))
    return {path: x + 0.3 * noise[path] for path, x in params.items()}


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 256, (B, T + 1)).astype("int32")
    weights = (generator.random((B, T)) < 0.7).astype("float32")
    return {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.asarray(weights),
    }


def log_p(skeleton, params, batch):
    logits = np.asarray(skeleton.bind(params)(batch["inputs"]), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_definition(skeleton, params, others, batch):
    ours, theirs = (log_p(skeleton, one, batch) for one in (params, others))
    weights = np.asarray(batch["weights"], np.float64)
    targets = np.asarray(batch["targets"])[..., None]

    def counted(log_p):
        nats = -np.take_along_axis(log_p, targets, -1)[..., 0]
        right = log_p.argmax(-1) == targets[..., 0]
        return [(nats * weights).sum(), (right * weights).sum()]

    kld = (np.exp(theirs) * (theirs - ours)).sum(-1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    return [
        (kld * weights).sum(),
        weights.sum(),
        (same * weights).sum(),
        *counted(ours),
        *counted(theirs),
    ]


@pytest.mark.parametrize("at_once", [1 << 28, B * 256 * 5], ids=["whole", "pieces"])
def test_distances_are_what_their_definitions_say(
    skeleton, params, others, batch, monkeypatch, at_once
):
    """Room for 5 tokens of each sequence makes pieces of 4."""
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", at_once)
    step = compare_step(skeleton, skeleton, compute_dtype="float32")
    found = jax.jit(step)(params, others, batch)
    wanted = by_definition(skeleton, params, others, batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert wanted[0] > 0.1 and 0 < wanted[2] < wanted[1]


def test_a_model_is_no_distance_from_itself(skeleton, params, batch):
    step = compare_step(skeleton, skeleton, compute_dtype="float32")
    found = training.distance(iter([np.asarray(step(params, params, batch))]))
    assert (found.kld, found.same_top1) == (0.0, 1.0)
    assert found.score == found.reference


def test_rows_that_pad_a_vocabulary_are_left_out(tiny, skeleton, params, batch):
    """The same model with 32 tokens more, of which nobody knows anything."""
    wide = dataclasses.replace(tiny, vocab_size=tiny.vocab_size + 32)
    padded = {
        path: jnp.pad(x, ((0, 32), (0, 0))) if path == "embed.table" else x
        for path, x in params.items()
    }
    step = compare_step(models.skeleton(wide), skeleton, compute_dtype="float32")
    found = training.distance(iter([np.asarray(step(padded, params, batch))]))
    assert found.kld == pytest.approx(0.0, abs=1e-6)
    assert found.same_top1 == 1.0


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_a_mesh_compares_as_one_device_does(
    skeleton, params, others, batch, monkeypatch, mesh
):
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", B * 256 * 8)
    chosen = plan(
        skeleton.table,
        "cpu:8",
        Workload(phase="prefill", global_batch=B, seq_len=T, compute_dtype="float32"),
        "llama",
        Pins(mesh=mesh),
    )
    scorer = training.open_comparison(
        skeleton, skeleton, chosen, "float32", training.Windows()
    )
    shardings = param_shardings(chosen, device_mesh(chosen))
    both = (jax.device_put(one, shardings) for one in (params, others))
    local = {name: np.asarray(x) for name, x in batch.items()}
    placed = scorer.places.on_mesh(local, scorer.places.rows)
    found = np.asarray(scorer.program(*both, placed))
    wanted = by_definition(skeleton, params, others, batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_text_is_scored_once_whatever_the_stride(skeleton, params, tmp_path):
    """Windows end to end are those of a stride as long as they are; a shorter stride
    counts the same tokens, with more before them."""
    ids = np.random.default_rng(2).integers(0, 256, 300).astype("uint16")
    ids.tofile(tmp_path / "text.bin")
    tokens = TokenFile(
        path=tmp_path / "text.bin",
        dtype="uint16",
        num_tokens=ids.size,
        num_bytes=ids.size,
        num_documents=1,
        fingerprint="random",
    )
    work = Workload(phase="prefill", global_batch=B, seq_len=T, compute_dtype="float32")
    chosen = plan(skeleton.table, "cpu:8", work, "llama", Pins(mesh={"fsdp": 8}))
    scores = {
        stride: training.open_scorer(
            skeleton, chosen, "float32", training.Windows(stride=stride)
        ).score(params, tokens)
        for stride in (None, 16, 4)
    }
    assert {score.tokens for score in scores.values()} == {ids.size - 1}
    assert scores[16].nats == pytest.approx(scores[None].nats, rel=FLOAT32_RELATIVE)
    assert scores[4].nats != scores[None].nats
    plain = jax.jit(score_step(skeleton, compute_dtype="float32"))
    window = {
        "inputs": jnp.asarray(ids[None, :T].astype("int32")),
        "targets": jnp.asarray(ids[None, 1 : T + 1].astype("int32")),
        "weights": jnp.ones((1, T)),
    }
    first = float(plain(params, window)[0])
    assert 0 < first < scores[None].nats
