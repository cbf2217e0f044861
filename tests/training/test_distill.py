"""Distillation in one step: the loss by its definition, schedules, meshes."""

from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FLOAT32_RELATIVE

from llmos_jax import models, training
from llmos_jax.config import load_config
from llmos_jax.config.schema import DistillSection
from llmos_jax.driver import plan as plan_of
from llmos_jax.errors import TrainingError
from llmos_jax.ir import Way
from llmos_jax.lowering import device_mesh, fetch
from llmos_jax.resolve import spec_of

lesson_module = importlib.import_module("llmos_jax.training.lesson")

B, T, V = 8, 16, 64
GRADIENT_RELATIVE = 2e-4
"""Of the largest entry: float32 sums of 128 tokens and 64 logits in another order."""

STUDENT = """
family = "llama"
num_layers = 2
embed_dim = 32
ffn_dim = 64
num_heads = 8
num_kv_heads = 8
head_dim = 8
vocab_size = 64
max_seq_len = 64
tied_embeddings = true
logit_softcap = 8.0
"""
TEACHER = """
family = "moe"
num_layers = 3
embed_dim = 48
ffn_dim = 32
num_heads = 8
num_kv_heads = 8
head_dim = 8
vocab_size = 64
max_seq_len = 64
tied_embeddings = false
num_experts = 4
experts_per_token = 2
"""
ASKED = DistillSection(teacher="x", temperature=2.0, weight=0.7)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, text in (("student", STUDENT), ("teacher", TEACHER)):
        made[name] = folder / f"{name}.toml"
        made[name].write_text(text)
    return made


@pytest.fixture(scope="module")
def both(files):
    """Skeleton and parameters of student and teacher."""
    made = {}
    for seed, (name, path) in enumerate(files.items()):
        config = load_config(None, [f"model={path}"]).config
        skeleton = models.skeleton(spec_of(config))
        params = skeleton.init(jax.random.key(seed))
        # Drawn heads say nearly the same of every token: make them say something.
        made[name] = (
            skeleton,
            {
                path: x * 3 if path in ("embed.table", "head.kernel") else x
                for path, x in params.items()
            },
        )
    return made


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, V, (B, T + 1)).astype("int32")
    return {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.asarray(generator.integers(0, 2, (B, T)).astype("float32")),
    }


def plain(student, teacher, params, theirs, batch, asked):
    """The loss as it is defined, of all logits at once."""
    ours = student.bind(params)(batch["inputs"])
    features, _ = teacher.bind(theirs).routed_features(batch["inputs"])
    said = teacher.bind(theirs).logits(features)
    ours, said = ours[..., :V], said[..., :V]
    temperature = asked.temperature
    log_q = jax.nn.log_softmax(ours / temperature)
    log_p = jax.nn.log_softmax(said / temperature)
    kl = temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    one_hot = jax.nn.one_hot(batch["targets"], V)
    ce = -jnp.sum(one_hot * jax.nn.log_softmax(ours), -1)
    share = batch["weights"] / batch["weights"].mean()
    return asked.weight * jnp.mean(kl * share) + (1 - asked.weight) * jnp.mean(
        ce * share
    )


def one_step(skeleton, lesson, params, batch, theirs=None, way=None):
    """Metrics and gradients of a step: of SGD with rate 1, what parameters lose."""
    step = training.train_step(
        skeleton,
        optax.sgd(1.0),
        compute_dtype="float32",
        way=way or Way(),
        lesson=lesson,
    )
    state = training.TrainState(
        jnp.zeros((), jnp.int32), params, optax.sgd(1.0).init(params)
    )
    arguments = (state, batch) if theirs is None else (state, batch, theirs)
    after, metrics = jax.jit(step)(*arguments)
    gradients = jax.tree.map(lambda a, b: a - b, params, after.params)
    return {name: float(x) for name, x in metrics.items()}, gradients


def check_near(found, wanted):
    for path, gradient in wanted.items():
        scale = float(jnp.max(jnp.abs(gradient))) + 1e-9
        np.testing.assert_allclose(
            found[path], gradient, rtol=0, atol=GRADIENT_RELATIVE * scale, err_msg=path
        )


def lesson_of(both, asked, steps=1):
    teacher = training.TeacherModel(
        skeleton=both["teacher"][0], compute_dtype="float32"
    )
    return training.Lesson(asked=asked, steps=steps, teacher=teacher)


@pytest.mark.parametrize("at_once", [1 << 25, B * V * 4])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_loss_and_gradient_are_those_of_the_definition(
    both, batch, at_once, microbatches, monkeypatch
):
    """Whole or in four pieces; a mixture of experts teaches a capped dense model."""
    monkeypatch.setattr(lesson_module, "LOGITS_AT_ONCE", at_once)
    (student, params), (teacher, theirs) = both["student"], both["teacher"]
    value, wanted = jax.value_and_grad(
        lambda params: plain(student, teacher, params, theirs, batch, ASKED)
    )(params)
    way = Way(microbatches=microbatches)
    metrics, found = one_step(
        student, lesson_of(both, ASKED), params, batch, theirs, way
    )
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["kd_weight"] == pytest.approx(0.7)
    parts = 0.7 * metrics["kd_loss"] + 0.3 * metrics["ce_loss"]
    assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
    check_near(found, wanted)


def test_weight_0_is_training_without_a_teacher(both, batch):
    student, params = both["student"]
    asked = dataclasses.replace(ASKED, weight=0.0)
    with_one = one_step(student, lesson_of(both, asked), params, batch,
                        both["teacher"][1])  # fmt: skip
    without = one_step(student, None, params, batch)
    assert with_one[0]["loss"] == pytest.approx(without[0]["loss"], rel=1e-6)
    check_near(*(gradients for _, gradients in (with_one, without)))


def test_who_says_the_same_as_the_teacher_has_nothing_to_learn(both, batch):
    student, params = both["student"]
    asked = dataclasses.replace(ASKED, weight=1.0)
    twin = {"teacher": (student, params)}
    metrics, found = one_step(student, lesson_of(twin, asked), params, batch, params)
    assert abs(metrics["kd_loss"]) < 1e-6
    assert all(float(jnp.max(jnp.abs(x))) < 1e-5 for x in found.values())


@pytest.mark.parametrize(
    ("step", "weight", "temperature"), [(0, 0.9, 4.0), (5, 0.5, 2.5), (10, 0.1, 1.0)]
)
def test_schedules_go_straight_to_the_last_step(step, weight, temperature):
    asked = DistillSection(
        weight=0.9, final_weight=0.1, temperature=4.0, final_temperature=1.0
    )
    found = training.Lesson(asked=asked, steps=11).settings(jnp.int32(step))
    np.testing.assert_allclose(found, (weight, temperature), rtol=1e-6)


def kept(both, batch, top_k):
    step = training.answer_step(both["teacher"][0], "float32", False, top_k, V)
    return jax.jit(step)(both["teacher"][1], batch)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_tokens_kept_are_the_teacher_itself(both, batch, temperature):
    student, params = both["student"]
    asked = dataclasses.replace(ASKED, temperature=temperature)
    inside = one_step(student, lesson_of(both, asked), params, batch,
                      both["teacher"][1])  # fmt: skip
    answers = training.Lesson(asked=asked, steps=1, vocab_size=V)
    outside = one_step(student, answers, params, {**batch, **kept(both, batch, V)})
    assert outside[0]["kd_loss"] == pytest.approx(inside[0]["kd_loss"], rel=1e-4)
    check_near(outside[1], inside[1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 2.0, 4.0])
def test_the_mass_beneath_the_kept_tokens_is_near_at_any_temperature(
    both, batch, temperature
):
    k = 8
    whole = kept(both, batch, V)["teacher_log_p"].astype("float32")
    exact = jax.nn.logsumexp(whole[..., k:] / temperature, axis=-1)
    rest = kept(both, batch, k)["teacher_rest"]
    b = jnp.float32(1 / temperature)
    found = lesson_module.rest_mass(rest, V - k, b)
    loose = {0.5: 1.5, 1.0: 1e-3, 2.0: 1e-3}.get(temperature, 0.15)
    np.testing.assert_allclose(found, exact, atol=loose)
    if temperature == 0.5:
        assert np.all(np.asarray(found) <= np.asarray(exact) + 1e-3), "a lower bound"


def test_few_kept_tokens_say_no_more_than_all(both, batch):
    """Merging tokens into one can only lower a divergence (data processing)."""
    student, params = both["student"]
    found = []
    for k in (2, 8, 32, V):
        answers = training.Lesson(
            asked=dataclasses.replace(ASKED, temperature=1.0), steps=1, vocab_size=V
        )
        metrics, _ = one_step(
            student, answers, params, {**batch, **kept(both, batch, k)}
        )
        found.append(metrics["kd_loss"])
    assert found == sorted(found) and 0 < found[0] < found[-1]


MESHES = [
    {"data": 8},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "context": 2},
]
REST = [(MESHES[0], None), (MESHES[2], None), (MESHES[0], 16), (MESHES[1], 16)]


@pytest.mark.parametrize(
    ("mesh", "top_k"),
    [
        (MESHES[1], None),
        (MESHES[2], 16),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in REST),
    ],
    ids=str,
)
def test_a_mesh_computes_what_one_device_computes(
    mesh, top_k, files, both, batch, monkeypatch
):
    monkeypatch.setattr(lesson_module, "LOGITS_AT_ONCE", 256)
    (student, params), (teacher, theirs) = both["student"], both["teacher"]
    texts = [
        f"model={files['student']}",
        f"batch.seq_len={T}",
        f"batch.global={B}",
        "train.compute_dtype=float32",
        "train.optimizer=sgd",
        "train.weight_decay=0",
        "train.warmup_steps=0",
        "distill.teacher=x",
        "distill.weight=0.7",
        "distill.temperature=2",
        "data.packing=best_fit",
        *(f"plan.mesh.{axis}={size}" for axis, size in mesh.items()),
    ]
    if top_k is not None:
        texts.append(f"distill.top_k={top_k}")
    config = load_config(None, texts).config
    chosen = plan_of(config)
    whole = dict(batch) | {"segments": jnp.zeros((B, T), jnp.int32)}
    taught = training.Taught(vocab_size=V)
    if top_k is None:
        like = dataclasses.replace(config, model=str(files["teacher"]))
        like = dataclasses.replace(
            like, plan=dataclasses.replace(like.plan, phase="prefill")
        )
        on_mesh = device_mesh(chosen)
        place = functools.partial(jax.tree.map, jax.device_put, theirs)
        taught = training.Taught(
            vocab_size=V,
            teacher=training.open_teacher(
                teacher, plan_of(like), on_mesh, "float32", place
            ),
        )
    else:
        whole |= kept(both, batch, top_k)
    session = training.open_session(student, chosen, config, taught=taught)
    state = session.fresh()
    state = state._replace(
        params={
            path: jax.device_put(np.array(x), session.param_shardings[path])
            for path, x in params.items()
        }
    )
    places = session.scorer.places
    host = {
        name: np.asarray(x).astype("float16" if name == "teacher_log_p" else x.dtype)
        for name, x in whole.items()
    }
    # The step donates its state; in a step of SGD that is clipped, the gradient's norm
    # and the losses say whether it is right.
    _, metrics = session.step(state, places.on_mesh(host, list(range(B))))
    found = {name: float(fetch(x)) for name, x in metrics.items()}
    if top_k is None:
        wanted, _ = one_step(
            student, lesson_of(both, ASKED), params, dict(whole), theirs
        )
    else:
        answers = training.Lesson(asked=ASKED, steps=1, vocab_size=V)
        wanted, _ = one_step(
            student, answers, params, {k: jnp.asarray(v) for k, v in host.items()}
        )
    for name in ("loss", "ce_loss", "kd_loss"):
        assert found[name] == pytest.approx(wanted[name], rel=10 * FLOAT32_RELATIVE)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def test_two_models_that_do_not_fit_are_refused_with_the_remedy(files):
    texts = [f"model={files['student']}", "topology=v5e:2x4", "batch.seq_len=16",
             "batch.global=8"]  # fmt: skip
    small = plan_of(load_config(None, texts).config)
    large = plan_of(
        load_config(
            None,
            [
                "model=llama3_8b",
                "topology=v5p:2x2x2",
                "batch.global=8",
                "batch.seq_len=16",
                "plan.phase=prefill",
                "plan.mesh.data=8",
                "train.compute_dtype=float32",
            ],  # fmt: skip
        ).config
    )
    training.check_room(small, small, "itself")
    with pytest.raises(TrainingError, match=r"distill\.top_k=64"):
        training.check_room(small, large, "llama3_8b")
