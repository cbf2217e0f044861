"""A classifier's step and scores: by hand, on meshes, resumed, stopped early."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import driver, models
from llmos_jax.checkpoint import find_checkpoint
from llmos_jax.config import load_config, load_model
from llmos_jax.errors import ConfigError, DataError
from llmos_jax.ir import Classes, Way
from llmos_jax.training.classify import (
    ClassLesson,
    Judged,
    class_step,
    total_class_score,
)
from llmos_jax.training.optimizer import make_optimizer
from llmos_jax.training.step import init_state

WORDS = {"red": "apple brick rose", "blue": "sky sea whale", "green": "leaf pea frog"}


def rows(seed, count):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        label = list(WORDS)[generator.integers(3)]
        words = generator.choice(WORDS[label].split(), generator.integers(1, 9))
        filler = generator.choice("the a of and is".split(), generator.integers(1, 20))
        both = [*words, *filler]
        generator.shuffle(both)
        yield label, " ".join(both)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    for name, seed, count in (("train", 0, 300), ("dev", 1, 60), ("test", 2, 60)):
        lines = [f"{label} {text}" for label, text in rows(seed, count)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    for name in ("lstm_classifier", "transformer_classifier"):
        (folder / f"{name}.toml").write_text(
            f'name = "{name}"\nfamily = "{name}"\nnum_layers = 1\nembed_dim = 32\n'
            "ffn_dim = 32\nvocab_size = 320\nmax_seq_len = 64\nnum_heads = 4\n"
            "num_kv_heads = 4\nhead_dim = 8\n"
        )
    return folder


def config_for(files, folder, *more, model="lstm_classifier"):
    given = [
        f"model={files}/{model}.toml",
        f"run.dir={folder}",
        f'data.train=["{files}/train.txt"]',
        f'data.validation=["{files}/dev.txt"]',
        f'data.test=["{files}/test.txt"]',
        "batch.seq_len=32",
        "batch.global=16",
        "train.steps=60",
        "train.learning_rate=1e-2",
        "train.warmup_steps=5",
        "train.compute_dtype=float32",
        "classify.dropout=0.1",
        "checkpoint.every=20",
    ]
    return load_config(None, [*given, *more]).config


@pytest.mark.parametrize("model", ["lstm_classifier", "transformer_classifier"])
def test_a_classifier_learns_and_says_so(files, tmp_path, model):
    report = driver.train(config_for(files, tmp_path / "run", model=model))
    assert report["test_accuracy"] > 0.95
    assert report["test_macro_f1"] > 0.95
    assert report["labels"] == ["blue", "green", "red"]
    assert sum(one["texts"] for one in report["classes"]["test"]) == 60
    page = (tmp_path / "run/report.html").read_text()
    assert "onfusion" in page and "green" in page
    again = driver.evaluate(str(tmp_path / "run"), [])
    assert again["accuracy"] == report["test_accuracy"]


def test_predictions_are_one_line_a_text_labels_or_not(files, tmp_path):
    driver.train(config_for(files, tmp_path / "run"))
    plain = tmp_path / "plain.jsonl"
    texts = ["the sky and the sea", "", "frog frog frog"]
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "said.jsonl"
    report = driver.evaluate(
        str(tmp_path / "run"), [f'data.test=["{plain}"]'], predict=str(out)
    )
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["text"] for one in said] == texts
    assert said[0]["predicted"] == "blue" and said[2]["predicted"] == "green"
    assert sum(said[0]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert report["texts"] == 3 and "accuracy" not in report
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    for verb, given in (
        (driver.export, [other]),
        (driver.convert, [other]),
        (driver.compress, [[f"compress.out={other}"]]),
    ):
        with pytest.raises(ConfigError, match="is a classifier"):
            verb(run, *given)


def test_a_killed_run_ends_as_if_nothing_had_been(files, tmp_path):
    driver.train(config_for(files, tmp_path / "whole"))
    driver.train(config_for(files, tmp_path / "cut", "train.max_minutes=0.0001"))
    cut = find_checkpoint(str(tmp_path / "cut"))
    assert 0 < cut.step < 60
    driver.train(config_for(files, tmp_path / "cut"))
    ends = [arrays_of(tmp_path / name) for name in ("whole", "cut")]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def arrays_of(run):
    from llmos_jax.checkpoint import open_checkpoint

    opened = open_checkpoint(str(run))
    assert opened.step == 60
    return {path: np.asarray(x) for path, x in opened.params().items()}


MESHES = (["data=8"], ["fsdp=4", "data=2"], ["tensor=4", "fsdp=2"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lstm_classifier", "transformer_classifier"])
def test_meshes_agree(files, tmp_path, model):
    short = ("train.steps=4", "classify.dropout=0.0", "classify.word_dropout=0.0")
    losses = []
    for number, mesh in enumerate(MESHES):
        pins = [f"plan.mesh.{one}" for one in mesh]
        run = tmp_path / str(number)
        driver.train(config_for(files, run, *short, *pins, model=model))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=2e-4)


def test_patience_stops_and_keeps_the_best(files, tmp_path):
    more = ("train.steps=400", "train.patience=2", "train.eval_every=10")
    saves = ("checkpoint.every=10", "checkpoint.best=val_error", "checkpoint.keep=1")
    config = config_for(files, tmp_path / "run", *more, *saves)
    report = driver.train(config)
    assert report["stopped_by"] == "settled" and report["steps"] < 400
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    known = [(row["val_error"], row["step"]) for row in rows if "val_error" in row]
    best = min(known)[1]
    assert report["checkpoint"].endswith(f"/{best}")
    assert find_checkpoint(str(tmp_path / "run")).step == best
    assert report["val_accuracy"] == pytest.approx(1 - min(known)[0])
    assert driver.train(config) == report  # it is finished


def test_patience_without_evaluations_is_refused(files, tmp_path):
    config = config_for(files, tmp_path / "run", "train.patience=2")
    with pytest.raises(ConfigError, match="train.eval_every"):
        driver.train(config)


def test_what_begins_with_a_classifier_draws_a_head_for_other_classes(files, tmp_path):
    driver.train(config_for(files, tmp_path / "first", "train.steps=20"))
    other = tmp_path / "other.txt"
    lines = (files / "train.txt").read_text().splitlines()
    merged = [line.replace("red ", "warm ", 1) for line in lines]
    other.write_text("\n".join(merged) + "\n")
    sides = [f'data.train=["{other}"]', "data.validation=[]", "data.test=[]"]
    labels = 'classify.labels=["blue", "green", "warm"]'
    config = config_for(files, tmp_path / "next", *sides, labels, "train.steps=1")
    config = replace(config, model=str(tmp_path / "first"))
    report = driver.train(config)
    assert report["labels"] == ["blue", "green", "warm"]


def test_labels_that_training_lacks_are_named(files, tmp_path):
    strange = tmp_path / "test.txt"
    strange.write_text("pink a flamingo\nblue the sea\n")
    config = config_for(files, tmp_path / "run", f'data.test=["{strange}"]')
    with pytest.raises(DataError, match="pink"):
        driver.train(config)


def test_a_language_model_does_not_predict_classes(files, tmp_path):
    config = config_for(files, tmp_path / "run", "data.format=text")
    with pytest.raises(ConfigError, match="is a classifier"):
        driver.train(config)


def spec():
    classes = Classes(labels=("a", "b", "c"))
    return replace(
        load_model("lstm_classifier"),
        embed_dim=16,
        ffn_dim=16,
        vocab_size=64,
        classes=classes,
    )


def test_loss_is_weighed_by_class_and_smoothed_by_hand():
    skeleton = models.skeleton(spec())
    train = load_config(None, ["model=lstm_classifier", "train.learning_rate=1e-6"])
    optimizer = make_optimizer(train.config.train, skeleton.table)
    state = init_state(skeleton, optimizer, 0)
    lesson = ClassLesson(
        dropout=0.0,
        word_dropout=0.0,
        label_smoothing=0.1,
        class_weights=(0.5, 1.0, 3.0),
        seed=0,
    )
    batch = {
        "inputs": jnp.asarray(
            np.random.default_rng(0).integers(0, 64, (4, 8)), jnp.int32
        ),
        "lengths": jnp.asarray([[8], [3], [5], [1]], jnp.int32),
        "labels": jnp.asarray([[0], [2], [1], [0]], jnp.int32),
        "weights": jnp.asarray([[1.0], [1.0], [1.0], [0.0]], jnp.float32),
    }
    step = class_step(
        *(skeleton, optimizer), compute_dtype="float32", way=Way(), lesson=lesson
    )
    _, metrics = jax.jit(step)(state, batch)
    model = skeleton.bind(state.params)
    logits = np.asarray(
        model.class_logits(batch["inputs"], batch["lengths"][:, 0]), "float64"
    )
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    weights, total = (0.5, 3.0, 1.0), 0.0
    for row, (label, weight) in enumerate(zip((0, 2, 1), weights)):
        target = np.full(3, 0.1 / 3)
        target[label] += 0.9
        total -= weight * float(target @ log_p[row])
    assert float(metrics["loss"]) == pytest.approx(total / sum(weights), rel=1e-5)
    right = np.mean(np.argmax(logits[:3], axis=1) == np.array([0, 2, 1]))
    assert float(metrics["accuracy"]) == pytest.approx(right, abs=1e-6)


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 500).astype("int32")
    logits = generator.normal(size=(500, 5)) + 2 * np.eye(5)[labels]
    log_probs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype("f4")
    index = np.arange(500)
    parts = [
        Judged(index=index[at], log_probs=log_probs[at], labels=labels[at])
        for at in np.array_split(index, 7)
    ]
    score = total_class_score(iter(parts))
    guesses = np.argmax(log_probs, axis=1)
    assert score.accuracy == pytest.approx(metrics.accuracy_score(labels, guesses))
    macro_f1 = metrics.f1_score(labels, guesses, average="macro")
    assert score.macro_f1 == pytest.approx(macro_f1)
    chosen = log_probs[index, labels].astype("f8")
    assert score.loss == pytest.approx(-chosen.mean())
    assert math.isclose(score.counts.sum(), 500)
