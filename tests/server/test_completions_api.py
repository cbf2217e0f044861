"""/v1/completions: fields, choices, seeds, errors."""

from __future__ import annotations

import pytest
from fake_engine import CONTEXT, FakeEngine, say
from serving_here import Client, client_of

from llmos_jax.scheduling import Request

PATH = "/v1/completions"


@pytest.fixture
def client():
    with client_of(FakeEngine()) as client:
        yield client


def asked(client: Client, **body) -> Request:
    """The one request that the engine got."""
    reply = client.post(PATH, {"prompt": "p", **body})
    assert reply.status_code == 200, reply.text
    return client.app.room.engine.submitted[-1]


def refused(client: Client, **body) -> dict:
    """The error of a request that is wrong."""
    reply = client.post(PATH, {"prompt": "p", **body})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert not client.app.room.engine.submitted
    return error


def texts(client: Client, **body) -> list[str]:
    reply = client.post(PATH, {"prompt": "p", "max_tokens": 4, **body})
    return [choice["text"] for choice in reply.json()["choices"]]


def test_what_is_not_said_is_what_openai_takes(client):
    request = asked(client)
    assert request.max_tokens == 16 and request.sampling.temperature == 1.0
    assert request.sampling.top_p == 1 and request.sampling.top_k == 0
    assert request.alternatives is None and request.stop_ids == {256}
    assert request.priority == 0 and request.deadline is None


def test_every_field_reaches_the_engine(client):
    request = asked(
        client, max_tokens=3, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1,
        repetition_penalty=1.2, presence_penalty=-1, frequency_penalty=0.5, seed=9,
        stop_token_ids=[5], logprobs=2, logit_bias={"65": -100}, user="ann",
        priority=4, ignore_eos=True, timeout=60,
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 0.5)
    assert sampling.logit_bias == ((65, -100.0),) and sampling.seed == 9
    assert request.stop_ids == {5} and request.alternatives == 2
    assert (request.tenant, request.priority) == ("ann", 4)
    assert request.deadline is not None and request.max_tokens == 3


def test_vllm_s_minus_one_keeps_all_tokens(client):
    assert asked(client, top_k=-1).sampling.top_k == 0


@pytest.mark.parametrize(
    ("prompt", "count", "tokens"),
    [("ab", 1, 2), (["ab", "c"], 2, 3), ([97, 98], 1, 2), ([[97], [98, 99]], 2, 3)],
)
def test_the_four_forms_of_a_prompt(client, prompt, count, tokens):
    reply = client.post(PATH, {"prompt": prompt}).json()
    assert len(reply["choices"]) == count
    assert reply["usage"]["prompt_tokens"] == tokens
    assert reply["usage"]["completion_tokens"] == 16 * count


def test_an_empty_prompt_begins_a_document(client):
    assert asked(client, prompt="").prompt.tolist() == [256]


def test_choices_draw_with_seeds_one_after_another(client):
    assert texts(client, n=3, seed=0) == ["abcd", "bcde", "cdef"]
    assert texts(client, n=3, seed=0) == ["abcd", "bcde", "cdef"]
    assert texts(client, prompt=["p", "q"], n=2, seed=1) == ["bcde", "cdef"] * 2


def test_without_a_seed_each_request_draws_its_own(client):
    assert asked(client).sampling.seed != asked(client).sampling.seed


def test_best_of_keeps_the_likeliest(client):
    assert texts(client, n=2, best_of=4, seed=0) == ["abcd", "bcde"]
    assert len(client.app.room.engine.submitted) == 4


def test_echo_puts_the_prompt_before_the_answer(client):
    assert texts(client, echo=True, temperature=0) == ["pabcd"]
    assert texts(client, prompt=[[80, 81]], echo=True, temperature=0) == ["PQabcd"]


def test_logprobs_tell_offsets_and_alternatives(client):
    reply = client.post(
        PATH, {"prompt": "p", "max_tokens": 2, "temperature": 0, "logprobs": 2}
    )
    found = reply.json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b"] and found["text_offset"] == [0, 1]
    assert found["token_logprobs"] == [-0.97, -0.98]
    assert found["top_logprobs"][0] == {"a": -0.97, "b": -1.97}


def test_a_stop_string_cuts_text_and_logprobs_and_ends_the_request():
    engine = FakeEngine(say("one STOP two", ends=False), step_s=0.005)
    with client_of(engine) as client:
        body = {"prompt": "p", "stop": ["STOP", "never"], "logprobs": 0}
        choice = client.post(PATH, body).json()["choices"][0]
        assert choice["text"] == "one " and choice["finish_reason"] == "stop"
        assert "".join(choice["logprobs"]["tokens"]) == "one "
        assert set(engine.wait_for_end(1).values()) == {"cancelled"}


def test_an_end_mark_ends_the_answer():
    with client_of(FakeEngine(say("hi"))) as client:
        reply = client.post(PATH, {"prompt": "p"}).json()
        assert reply["choices"][0]["text"] == "hi"
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens"] == 2


def test_an_answer_ends_with_the_context(client):
    reply = client.post(PATH, {"prompt": "x" * (CONTEXT - 2), "max_tokens": 100})
    assert reply.json()["usage"]["completion_tokens"] == 2
    assert reply.json()["choices"][0]["finish_reason"] == "length"


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(client):
    error = refused(client, prompt="x" * CONTEXT)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert f"{CONTEXT} tokens, and" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"logprobs": 6}, "logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {str(one): 1 for one in range(301)}}, "logit_bias"),
        ({"prompt": [97, "a"]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"timeout": 0}, "timeout"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_regex": "a", "guided_json": {}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(client, body, param):
    assert refused(client, **body)["param"] == param


def test_unknown_fields_are_ignored_and_null_is_nothing(client):
    assert asked(client, frobnicate=1, max_tokens=None, stop=None).max_tokens == 16


def test_more_answers_than_there_is_ever_room_for_are_refused(client):
    assert "room for 24" in refused(client, n=25)["message"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"prompt": "\xff"}', b"nul"])
def test_a_body_that_is_no_json_object_is_refused(client, text):
    headers = {"content-type": "application/json"}
    reply = client.send("POST", PATH, content=text, headers=headers)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


@pytest.mark.parametrize("field", ["guided_json", "frobnicate", "logit_bias"])
def test_json_without_a_bottom_is_refused(client, field):
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    text = b'{"prompt": "a", "%s": %s}' % (field.encode(), deep)
    headers = {"content-type": "application/json"}
    assert client.send("POST", PATH, content=text, headers=headers).status_code == 400


def test_half_of_a_surrogate_pair_is_refused(client):
    headers = {"content-type": "application/json"}
    text = b'{"prompt": "a \\ud800"}'
    assert client.send("POST", PATH, content=text, headers=headers).status_code == 400


def test_a_grammar_goes_with_each_choice(client):
    for one in range(2):
        asked(client, n=2, guided_regex="[ab]{3}")
        first, second = client.app.room.engine.submitted[-2:]
        assert first.grammar is not None and first.grammar is not second.grammar, one


def test_a_grammar_that_is_none_is_refused(client):
    assert "regular expression" in refused(client, guided_regex="(")["message"]
