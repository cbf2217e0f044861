"""The engine: everybody is answered as if alone, whatever else goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import Answer, asked, engine_of, request_of

from llmos_jax.errors import ConfigError, LlmosError, Overloaded, ServeError, Stopping
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Skeleton, skeleton
from llmos_jax.scheduling import Request, Sampling
from llmos_jax.serving import Engine, Options

WARM = Sampling(temperature=0.9, top_p=0.9, seed=3)
Model = tuple[Skeleton, dict[str, jax.Array]]


@pytest.fixture(scope="module")
def model(tiny: ModelSpec) -> Model:
    found = skeleton(tiny)
    return found, found.init(jax.random.key(7))


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    """Shared: what it did before must not matter."""
    with engine_of(*model) as made:
        yield made


def prompt_of(index: int) -> np.ndarray:
    """Of 1 to 49 tokens."""
    return (np.arange(16 * (index % 4) + 1) * 7 + index) % 256


def requests(count: int, **rest: object) -> list[Request]:
    """Some greedy, some drawn, of many lengths."""
    return [
        request_of(
            index,
            prompt_of(index),
            5 + 4 * (index % 5),
            sampling=replace(WARM, seed=index) if index % 2 else Sampling(),
            **rest,
        )
        for index in range(count)
    ]


def logits_of(model: Model, tokens: list[int]) -> np.ndarray:
    """After each token, by the whole forward pass."""
    found, params = model
    return np.asarray(found.bind(params)(jnp.array([tokens], jnp.int32))[0])


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[list[int]]:
    """What each of ten requests is answered when nobody else is there."""
    return [asked(engine, [request])[0].tokens for request in requests(10)]


def test_greedy_tokens_are_those_of_the_whole_forward_pass(
    model: Model, engine: Engine
) -> None:
    prompt = prompt_of(3).tolist()
    (got,) = asked(engine, [request_of("a", prompt, 6)])
    logits = logits_of(model, prompt + got.tokens)
    wanted = logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
    assert got.tokens == wanted
    assert got.last.reason == "length"


def test_many_at_once_are_answered_as_alone(
    engine: Engine, alone: list[list[int]]
) -> None:
    together = asked(engine, requests(10))
    assert [one.tokens for one in together] == alone


def test_answers_are_the_same_one_step_at_a_time(
    model: Model, alone: list[list[int]]
) -> None:
    options = Options(overlaps=False, keeps_prefixes=False)
    with engine_of(*model, options=options) as made:
        together = asked(made, requests(10))
    assert [one.tokens for one in together] == alone


@pytest.mark.slow
def test_answers_are_the_same_with_guesses(
    model: Model, alone: list[list[int]]
) -> None:
    with engine_of(*model, options=Options(drafts=1)) as made:
        one_by_one = [asked(made, [request])[0] for request in requests(10)]
        together = asked(made, requests(10))
        state = made.state()
    assert [one.tokens for one in one_by_one] == alone
    assert [one.tokens for one in together] == alone
    assert state.drafted_tokens >= state.accepted_tokens > 0


@pytest.mark.slow
def test_answers_are_the_same_where_pages_run_out(model: Model) -> None:
    asks = [request_of(index, np.arange(40) + index, 60) for index in range(3)]
    with engine_of(*model) as made:
        wanted = [asked(made, [request])[0].tokens for request in asks]
    options = Options(keeps_prefixes=False)
    # Three pages of 64 tokens, and two sequences that come to need two each.
    page_gib = 64 * 2 * 2 * model[0].spec.num_kv_heads * model[0].spec.head_dim * 4
    with engine_of(*model, options=options, cache_gib=3.5 * page_gib / 2**30) as made:
        together = asked(made, asks)
        assert made.limits.pages == 3 and made.state().preemptions > 0
    assert [one.tokens for one in together] == wanted


def test_steps_are_predicted_and_measured(engine: Engine) -> None:
    before = engine.state()
    asked(engine, [request_of("a", prompt_of(2), 9)])
    after = engine.state()
    assert after.steps - before.steps >= 9
    assert after.step_s > before.step_s and after.predicted_s > before.predicted_s
    assert after.bandwidth > 0 and after.planned_bandwidth > 0


def test_a_prompt_that_began_before_is_found(engine: Engine) -> None:
    prompt = np.arange(100) % 251
    first, second = (asked(engine, [request_of(n, prompt)])[0] for n in "ab")
    assert first.tokens == second.tokens
    assert second.last.cached_tokens == 64


def test_a_stop_token_ends_an_answer_and_is_no_part_of_it(
    engine: Engine, alone: list[list[int]]
) -> None:
    stop = alone[4][3]
    request = replace(requests(5)[4], stop_ids=frozenset({stop}))
    (got,) = asked(engine, [request])
    assert got.tokens == alone[4][: alone[4].index(stop)]
    assert got.last.reason == "stop"


def test_the_context_ends_an_answer(engine: Engine) -> None:
    prompt = np.arange(120) % 256
    (got,) = asked(engine, [request_of("a", prompt, 100)])
    assert (len(got.tokens), got.last.reason) == (8, "length")


def test_likelihoods_are_those_of_the_logits(model: Model, engine: Engine) -> None:
    prompt = prompt_of(2).tolist()
    (got,) = asked(engine, [request_of("a", prompt, 5, alternatives=3)])
    logits = logits_of(model, prompt + got.tokens)[len(prompt) - 1 : -1]
    wanted = np.asarray(jax.nn.log_softmax(logits))
    for row, token, told in zip(wanted, got.tokens, got.likelihoods, strict=True):
        assert told.logprob == pytest.approx(row[token], abs=1e-4)
        assert [name for name, _ in told.top] == np.argsort(-row)[:3].tolist()
        assert told.top[0][1] == pytest.approx(row.max(), abs=1e-4)


def test_a_bias_makes_a_token_certain_or_impossible(engine: Engine) -> None:
    sampling = Sampling(logit_bias=((17, 100.0),))
    (got,) = asked(engine, [request_of("a", [1, 2], 3, sampling=sampling)])
    assert got.tokens == [17, 17, 17]
    (free,) = asked(engine, [request_of("b", [1, 2], 1)])
    never = Sampling(logit_bias=((free.tokens[0], -100.0),))
    (got,) = asked(engine, [request_of("c", [1, 2], 1, sampling=never)])
    assert got.tokens != free.tokens


def test_penalties_see_the_whole_prompt_though_it_began_before(engine: Engine) -> None:
    prompt = np.arange(100) % 251
    strict = Sampling(repetition_penalty=1.5, presence_penalty=1.0)
    one, two = (
        asked(engine, [request_of(name, prompt, 8, sampling=strict)])[0].tokens
        for name in "ab"
    )
    assert one == two


class Even:
    """A grammar: even tokens alone; it cannot bear more than `most` of them."""

    def __init__(self, most: int):
        self.most = most

    def fill(self, mask: np.ndarray) -> None:
        mask[:] = 0x55555555

    def take(self, token: int) -> None:
        assert token % 2 == 0
        self.most -= 1
        if self.most < 0:
            raise ConfigError("the grammar grew too large.")


def test_a_grammar_allows_what_it_allows_beside_others_that_are_free(
    engine: Engine, alone: list[list[int]]
) -> None:
    bound = request_of("bound", prompt_of(1), 12, grammar=Even(100), sampling=WARM)
    got, *rest = asked(engine, [bound, *requests(6)])
    assert len(got.tokens) == 12 and all(token % 2 == 0 for token in got.tokens)
    assert [one.tokens for one in rest] == alone[:6]


def test_a_grammar_that_fails_fails_alone(
    engine: Engine, alone: list[list[int]]
) -> None:
    bound = request_of("bound", prompt_of(1), 12, grammar=Even(2))
    got, *rest = asked(engine, [bound, *requests(3)])
    assert (got.last.reason, got.last.problem) == (
        "failed",
        "the grammar grew too large.",
    )
    assert [one.tokens for one in rest] == alone[:3]


def test_an_embedding_is_the_mean_of_the_final_features(
    model: Model, engine: Engine
) -> None:
    prompt = np.arange(77) % 256
    (got,) = asked(engine, [request_of("a", prompt, 0, wants="embedding")])
    found, params = model
    x_1TD, _ = found.bind(params).features(jnp.asarray(prompt[None], jnp.int32))
    made = got.last.embedding
    assert made is not None
    np.testing.assert_allclose(made, np.asarray(x_1TD[0].mean(axis=0)), atol=2e-5)


def test_who_is_cancelled_ends_at_once_and_alone(
    engine: Engine, alone: list[list[int]]
) -> None:
    leaving = Answer()
    engine.submit(request_of("leaving", prompt_of(2), 75), leaving.hear)
    others = [Answer() for _ in range(3)]
    for request, answer in zip(requests(3), others, strict=True):
        engine.submit(request, answer.hear)
    engine.cancel("leaving")
    assert leaving.last.reason == "cancelled"
    assert [one.last.reason and one.tokens for one in others] == alone[:3]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (request_of("a", []), "prompt is empty"),
        (request_of("a", [1], 0), "max_tokens is 0"),
        (request_of("a", [1] * 128), "has 128 tokens; the context has room for 128"),
        (request_of("a", [1, 256]), "token ids from 1 to 256"),
        (request_of("a", [1], sampling=Sampling(top_p=0.0)), "top_p is 0.0"),
        (request_of("a", [1], stop_ids=frozenset(range(9))), "at most 8 have room"),
        (request_of("a", [1], alternatives=21), "it must be 0 to 20"),
        (
            request_of("a", [1], sampling=Sampling(logit_bias=((256, 1.0),))),
            "logit_bias names token 256",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    engine: Engine, request_: Request, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit(request_, Answer().hear)


def test_too_many_are_told_when_to_come_again(model: Model) -> None:
    with engine_of(*model, options=Options(max_queue=2)) as made:
        answers, refused = [], 0
        for index in range(20):
            answer = Answer()
            try:
                made.submit(request_of(index, [1, 2], 30), answer.hear)
                answers.append(answer)
            except Overloaded as problem:
                refused += 1
                assert problem.retry_after_s >= 1
        assert refused >= 10
        assert [one.last.reason for one in answers] == ["length"] * len(answers)


def test_draining_ends_what_was_accepted_and_takes_no_more(model: Model) -> None:
    with engine_of(*model) as made:
        answers = [Answer() for _ in range(6)]
        for index, answer in enumerate(answers):
            made.submit(request_of(index, [1, 2], 20), answer.hear)
        assert made.drain(30)
        assert [one.last.reason for one in answers] == ["length"] * 6
        with pytest.raises(Stopping, match="shutting down"):
            made.submit(request_of("late", [1]), Answer().hear)


def test_weights_that_are_no_numbers_fail_requests_and_not_the_engine(
    model: Model,
) -> None:
    found, params = model
    bad = params | {"embed.table": params["embed.table"].at[13].set(jnp.nan)}
    with engine_of(found, bad) as made:
        for name in "ab":
            (got,) = asked(made, [request_of(name, [5, 13], 4)])
            assert got.last.reason == "failed"
            assert "not finite" in got.last.problem
        assert made.state().stage == "ready"


def test_an_engine_that_breaks_says_so_to_all(model: Model) -> None:
    with pytest.raises(AssertionError), engine_of(*model) as made:

        def broken(work: object) -> None:
            raise MemoryError("no more")

        made._runner.send = broken  # type: ignore[method-assign, assignment]
        answer = Answer()
        made.submit(request_of("a", [1]), answer.hear)
        assert answer.last.reason == "failed"
        with pytest.raises(ServeError, match="MemoryError: no more"):
            made.submit(request_of("b", [1]), Answer().hear)
        assert made.state().stage == "failed"
        raise AssertionError("the engine is of no more use")


def test_a_program_that_was_not_planned_is_refused_and_counted(model: Model) -> None:
    with engine_of(*model) as made:
        programs = made._runner.programs
        shape = next(iter(programs._made))
        with pytest.raises(ServeError, match="was not planned"):
            programs[replace(shape, rows=3)]
        assert programs.unplanned == 1
        programs.unplanned = 0  # what `engine_of` looks at


def test_requests_from_many_threads_are_all_answered(
    engine: Engine, alone: list[list[int]]
) -> None:
    got: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        request = replace(requests(10)[index], id=f"thread {index}")
        got[index] = asked(engine, [request])[0].tokens

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[index] for index in range(10)] == alone


def test_sizes_that_do_not_go_together_are_refused(model: Model) -> None:
    for sizes, message in (
        ({"seats": 0}, "serve.seats is 0"),
        ({"seats": 64}, "serve.step_tokens is 16; it must be at least 64"),
        ({"step_tokens": 24}, "must be a power of two"),
        ({"cache_gib": 1e-5}, "GiB are left for them. Set serve.context to 0 at most"),
    ):
        with pytest.raises(LlmosError, match=message), engine_of(*model, **sizes):
            pass
