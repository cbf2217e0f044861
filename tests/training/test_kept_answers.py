"""Kept answers: found by the tokens, whole or not at all, of one teacher."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import small
from processes import copy_until

from llmos_jax import driver
from llmos_jax.errors import ConfigError, DataError
from llmos_jax.training import Answers, Asked, WithAnswers, collect
from llmos_jax.training.answers import keys_of

ASKED = Asked(
    teacher="a",
    fingerprint="f",
    tokenizer="t",
    top_k=3,
    vocab_size=100,
    dtype="float32",
)
T = 4


class Rows:
    """Batches of two rows, the same four rows in other orders."""

    ORDER = (0, 1, 2, 3, 3, 1, 0, 2)

    def __init__(self):
        self.step = 0

    def __iter__(self):
        return self

    def __next__(self):
        first = 2 * self.step % len(self.ORDER)
        self.step += 1
        rows = [self.ORDER[first], self.ORDER[first + 1]]
        inputs = np.array([[10 * row + i for i in range(T)] for row in rows], np.int32)
        return {"inputs": inputs, "targets": inputs + 1}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


class Teacher:
    """Says of every token what can be told from it; counts rows."""

    def __init__(self, breaks_after=99):
        self.rows, self.breaks_after = 0, breaks_after

    def __call__(self, batch):
        if self.rows >= self.breaks_after:
            raise KeyboardInterrupt
        self.rows += len(batch["inputs"])
        inputs = batch["inputs"][..., None]
        return {
            "teacher_ids": inputs + np.arange(3),
            "teacher_log_p": -inputs - np.array([0.0, 1.0, 2.0]),
            "teacher_rest": np.repeat(-inputs / 2.0, 2, axis=-1),
        }


def ask_all(folder, teacher, said=None):
    answers = Answers(folder, ASKED, (said if said is not None else []).append)
    count = collect(
        answers,
        Rows(),
        batches=6,
        rows=2,
        ask=lambda: teacher,
        on_progress=lambda done, total: None,
    )
    return answers, count


def test_every_row_is_asked_once_and_found_in_any_order(tmp_path):
    teacher = Teacher()
    answers, count = ask_all(tmp_path, teacher)
    assert (count, teacher.rows, len(answers)) == (4, 4, 4)
    for batch, _ in zip(WithAnswers(Rows(), answers), range(6)):
        said = Teacher()(batch)
        for name, x in said.items():
            np.testing.assert_allclose(batch[name], x, rtol=1e-3)
        assert batch["teacher_ids"].dtype == np.int32


def test_a_killed_pass_goes_on_and_a_second_one_asks_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ask_all(tmp_path, Teacher(breaks_after=2))
    second = Teacher()
    assert ask_all(tmp_path, second)[1] == second.rows == 2
    never = Teacher(breaks_after=0)
    assert ask_all(tmp_path, never)[1] == 0


def test_a_damaged_file_is_set_aside_and_asked_again(tmp_path):
    ask_all(tmp_path, Teacher())
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    said, teacher = [], Teacher()
    answers, _ = ask_all(tmp_path, teacher, said)
    assert len(answers) == 4 and teacher.rows == 2
    assert "damaged" in said[0] and victim.with_suffix(".damaged").exists()


def test_documents_of_a_row_count():
    row = {"inputs": np.zeros((1, T), np.int32)}
    one = keys_of(row | {"segments": np.zeros((1, T), np.int32)})
    two = keys_of(row | {"segments": np.array([[0, 0, 1, 1]], np.int32)})
    assert len({*keys_of(row), *one, *two}) == 3


@pytest.mark.parametrize(
    "change", [{"fingerprint": "g"}, {"top_k": 4}, {"tokenizer": "u"}]
)
def test_another_teachers_answers_are_refused(tmp_path, change):
    Answers(tmp_path, ASKED, print)
    with pytest.raises(DataError, match=f"{next(iter(change))} .* and not"):
        Answers(tmp_path, dataclasses.replace(ASKED, **change), print)
    Answers(tmp_path, dataclasses.replace(ASKED, teacher="moved"), print)


def taught(folder, model, text, teacher, **more):
    return small.overrides(
        folder,
        model,
        text,
        distill__teacher=teacher,
        distill__temperature=2.0,
        distill__final_weight=0.2,
        train__steps=8,
        checkpoint__every=4,
        run__seed=5,
        **more,
    )


@pytest.mark.parametrize("top_k", [None, 16])
def test_a_run_with_a_teacher_goes_on_bit_for_bit(
    top_k, tmp_path, small_model, text_file, small_run
):
    more = {} if top_k is None else {"distill__top_k": top_k}
    asked = (small_model, text_file, small_run)
    straight, again = tmp_path / "straight", tmp_path / "again"
    small.train(taught(straight, *asked, **more))
    copy_until(straight, again, 4)
    if top_k is not None:
        assert len(list((again / "teacher").glob("*.safetensors"))) == 8
    report = small.train(taught(again, *asked, **more))
    assert (report["resumed_from"], report["steps"]) == (4, 8)
    assert small.differing(small.arrays(again), small.arrays(straight)) == []
    lines = (straight / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert small.losses(again) == [row["loss"] for row in rows]
    for row in rows:
        weight = row["kd_weight"]
        parts = weight * row["kd_loss"] + (1 - weight) * row["ce_loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert rows[-1]["kd_weight"] == pytest.approx(0.2)


MISTAKES = {
    "no weights": ({"distill.teacher": "llama3_8b"}, "has no weights"),
    "no place": ({"distill.teacher": "/nowhere"}, "has no weights"),
    "cold": ({"distill.temperature": 0}, "more than 0"),
    "too much": ({"distill.weight": 1.5}, "0 to 1"),
    "too late": ({"distill.final_weight": -0.1}, "0 to 1"),
    "nothing kept": ({"distill.top_k": 0}, "at least 1"),
    "more than all": ({"distill.top_k": 513}, "has 512 tokens"),
    "a cache of nothing": ({"distill.cache": "x"}, "set distill.top_k"),
    "alone": (
        {"sync.strategy": "local", "plan.mesh.data": 8},
        "no teacher among them",
    ),
    "a pipeline": ({"plan.mesh.stage": 2}, "plan.mesh.stage=1"),
}


@pytest.mark.parametrize(("keys", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence(
    keys, told, tmp_path, small_model, text_file, small_run
):
    texts = taught(tmp_path / "run", small_model, text_file, small_run)
    texts += [f"{key}={value}" for key, value in keys.items()]
    with pytest.raises(ConfigError, match=told):
        driver.train(small.config_of(texts))


def test_another_vocabulary_is_refused_with_the_number_of_tokens(
    tmp_path, small_model, text_file, small_run
):
    asked = small.overrides(
        tmp_path / "run",
        small_model,
        text_file,
        distill__teacher=small_run,
        data__tokenizer="train",
    )
    with pytest.raises(ConfigError, match=r"\d+ tokens differ.*data\.tokenizer="):
        driver.train(small.config_of(asked))
