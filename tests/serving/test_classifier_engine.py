"""Texts in batches get the classes that they get alone; whatever else goes on."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from classifiers import (
    CONTEXT,
    LABELS,
    classifying,
    logits_of,
    text_of,
    write_classifier,
)
from engines import Answer, asked, request_of

from llmos_jax import driver, resolve, service
from llmos_jax.errors import ConfigError, Overloaded, ServeError, Stopping
from llmos_jax.serving import Engine, Options

FAMILIES = ["lstm_classifier", "transformer_classifier", "llama"]


LENGTHS = (1, CONTEXT, 17, 5)


def ids(index: int) -> np.ndarray:
    """Of 1 to CONTEXT tokens."""
    return (np.arange(LENGTHS[index % 4]) * 7 + index) % 256


def texts(count: int, **rest):
    return [text_of(index, ids(index), **rest) for index in range(count)]


class Gate:
    """Holds an engine at its next batch until it is told to go on."""

    def __init__(self, engine: Engine):
        self.is_open, self.came = threading.Event(), threading.Event()
        self._send = engine._runner.send
        engine._runner.send = self
        self.batches: list[int] = []

    def __call__(self, work):
        self.came.set()
        assert self.is_open.wait(30)
        self.batches.append(len(work.parts))
        return self._send(work)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_in_a_batch_gets_the_logits_that_it_gets_alone(family):
    with classifying(family) as engine:
        assert engine.limits.labels == LABELS
        answers = asked(engine, texts(30))
        state = engine.state()
    for index, answer in enumerate(answers):
        assert answer.last.reason == "stop"
        np.testing.assert_allclose(
            answer.last.class_logits, logits_of(ids(index), family), atol=2e-5
        )
    found = [tuple(answer.last.class_logits.round(3)) for answer in answers]
    assert len(set(found)) == 30, "texts that look alike prove nothing"
    assert state.texts == 30 and state.running == state.waiting == 0
    assert state.prompt_tokens == sum(ids(index).size for index in range(30))
    assert sum(state.batches.values()) == state.steps
    assert state.tokens_per_s >= 0 and state.step_s > 0


def test_who_waits_while_a_batch_runs_goes_out_together():
    with classifying(seats=8, context=16) as engine:
        gate = Gate(engine)
        answers = [Answer() for _ in range(9)]
        for index, answer in enumerate(answers):
            engine.submit(text_of(index, [index + 1] * 5), answer.hear)
            if not index:
                assert gate.came.wait(10)
        gate.is_open.set()
        found = [answer.last.class_logits for answer in answers]
        assert gate.batches == [1, 8]
        assert engine.state().batches == {1: 1, 2: 0, 4: 0, 8: 1}
    for index, logits in enumerate(found):
        np.testing.assert_allclose(logits, logits_of([index + 1] * 5), atol=2e-5)


def test_there_is_a_program_for_every_batch_before_the_doors_open():
    with classifying(seats=3) as engine:
        # Rows of 16, 32 and 40 tokens, by 1, 2 and 3.
        assert engine.state().programs == 9
        for count in (1, 2, 3, 4, 7):
            for size in (1, 16, 17, 32, 33, CONTEXT):
                asked(engine, [text_of(n, [5] * size) for n in range(count)])
        assert engine.state().programs == 9
        assert engine.state().unplanned_compiles == 0


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "empty"),
        ([1] * 17, "17 tokens"),
        ([300], "300 to 300"),
        ([-1], "-1 to -1"),
    ],
)
def test_a_text_that_cannot_be_is_refused_at_once(tokens, said):
    with classifying(seats=1, context=16) as engine:
        with pytest.raises(ConfigError, match=said):
            engine.submit(text_of("a", tokens), Answer().hear)
        with pytest.raises(ConfigError, match="gives classes; tokens were asked"):
            engine.submit(request_of("b", [1]), Answer().hear)


def test_too_many_are_refused_with_a_time_to_come_again():
    with classifying(seats=1, context=16, options=Options(max_queue=3)) as engine:
        gate = Gate(engine)
        answers = [Answer() for _ in range(4)]
        engine.submit(text_of(0, [1]), answers[0].hear)
        assert gate.came.wait(10)
        for index in (1, 2, 3):
            engine.submit(text_of(index, [1]), answers[index].hear)
        with pytest.raises(Overloaded, match="3 requests with 3 tokens") as problem:
            engine.submit(text_of(4, [1]), Answer().hear)
        assert problem.value.retry_after_s >= 1
        gate.is_open.set()
        assert [one.last.reason for one in answers] == ["stop"] * 4


def test_cancelled_and_late_texts_do_not_run():
    with classifying(seats=1, context=16) as engine:
        gate = Gate(engine)
        first, gone, late, last = (Answer() for _ in range(4))
        engine.submit(text_of("first", [1]), first.hear)
        assert gate.came.wait(10)
        engine.submit(text_of("gone", [2]), gone.hear)
        deadline = time.monotonic() + 0.05
        engine.submit(text_of("late", [3], deadline=deadline), late.hear)
        engine.submit(text_of("last", [4]), last.hear)
        engine.cancel("gone")
        engine.cancel("first")  # it runs already: its answer is thrown away
        time.sleep(0.1)
        gate.is_open.set()
        reasons = [one.last.reason for one in (first, gone, late, last)]
        assert reasons == ["cancelled", "cancelled", "deadline", "stop"]
        assert gate.batches == [1, 1]


def test_tenants_take_turns():
    with classifying(seats=1, context=16) as engine:
        gate, order = Gate(engine), []

        def told(name):
            return lambda progress: order.append(name)

        engine.submit(text_of("first", [1]), Answer().hear)
        assert gate.came.wait(10)
        for index in range(4):
            engine.submit(text_of(f"a{index}", [1] * 9, tenant="a"), told("a"))
        end = Answer()
        engine.submit(text_of("b0", [1] * 9, tenant="b"), told("b"))
        engine.submit(text_of("b1", [1] * 9, tenant="b", priority=1), end.hear)
        gate.is_open.set()
        assert end.last.reason == "stop"
        assert order.index("b") <= 1


@pytest.mark.parametrize("overlaps", [True, False])
def test_drain_ends_what_was_accepted_and_takes_no_more(overlaps):
    with classifying(options=Options(overlaps=overlaps)) as engine:
        answers = [Answer() for _ in range(20)]
        for request, answer in zip(texts(20), answers):
            engine.submit(request, answer.hear)
        assert engine.drain(30)
        assert all(one.last.reason == "stop" for one in answers)
        with pytest.raises(Stopping):
            engine.submit(text_of("more", [1]), Answer().hear)


def test_a_device_that_fails_is_told_to_all_and_afterwards():
    with classifying(seats=1, context=16) as engine:
        gate = Gate(engine)
        answers = [Answer() for _ in range(3)]
        engine.submit(text_of(0, [1]), answers[0].hear)
        assert gate.came.wait(10)
        for index in (1, 2):
            engine.submit(text_of(index, [1]), answers[index].hear)
        engine._runner.read = lambda sent: 1 / 0
        gate.is_open.set()
        assert [one.last.reason for one in answers] == ["failed"] * 3
        assert engine.state().stage == "failed"
        assert "ZeroDivisionError" in engine.state().problem
        with pytest.raises(ServeError, match="failed"):
            engine.submit(text_of("more", [1]), Answer().hear)


def test_logits_that_are_no_numbers_fail_their_text_alone():
    with classifying() as engine:
        run = engine._runner.programs.run

        def spoilt(words):
            logits = np.asarray(run(words)).copy()
            logits[words[:, 1] == 7] = np.nan
            return logits

        engine._runner.programs.run = spoilt
        good, bad = asked(engine, [text_of("a", [1, 2]), text_of("b", [7, 2])])
        assert good.last.reason == "stop"
        assert bad.last.reason == "failed" and "not finite" in bad.last.problem


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"context": 65}, "1 to 64"),
        ({"context": 0}, "1 to 64"),
        ({"seats": 0}, "seats"),
    ],
)
def test_sizes_that_cannot_be_are_named(sizes, said):
    with pytest.raises(ConfigError, match=said):
        with classifying(**sizes):
            pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 4}])
def test_eight_devices_say_what_one_says(tmp_path, family, mesh):
    folder = write_classifier(tmp_path / "model", family)
    pins = [f"plan.mesh.{axis}={size}" for axis, size in mesh.items()]
    opened, config = resolve.open_with_config(
        str(folder), ["serve.seats=8", f"serve.context={CONTEXT}", *pins]
    )
    engine = service.open_classifier(opened, config, driver.plan)
    try:
        engine.wait_until_ready()
        assert engine.state().stage == "ready", engine.state().problem
        answers = asked(engine, texts(20))
        leaf = engine._runner.programs._params["embed.table"]
        assert len(leaf.sharding.device_set) == 8
    finally:
        engine.stop()
    for index, answer in enumerate(answers):
        np.testing.assert_allclose(
            answer.last.class_logits, logits_of(ids(index), family), atol=1e-4
        )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("plan.mesh.stage=2", "plan.mesh.stage = 2"),
        ("serve.weight_dtype=int8", "floating point"),
    ],
)
def test_what_has_no_program_is_named(tmp_path, override, said):
    folder = write_classifier(tmp_path / "model")
    opened, config = resolve.open_with_config(str(folder), [override])
    with pytest.raises(ConfigError, match=said):
        service.open_classifier(opened, config, driver.plan)
