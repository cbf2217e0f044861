"""/v1/chat/completions: messages to a prompt, answers to messages."""

from __future__ import annotations

import pytest
from fake_engine import CONTEXT, FakeEngine, say
from serving_here import client_of

from llmos_jax.data import bytes_tokenizer

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client():
    with client_of(FakeEngine(say("hello"))) as client:
        yield client


def prompt_of(client, messages, **body) -> str:
    """The text that the engine was given."""
    reply = client.post(PATH, {"messages": messages, **body})
    assert reply.status_code == 200, reply.text
    room = client.app.room
    return room.tokenizer.decode(room.engine.submitted[-1].prompt)


def refused(client, messages=HI, **body) -> dict:
    reply = client.post(PATH, {"messages": messages, **body})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def test_a_turn_is_answered(client):
    reply = client.post(PATH, {"messages": HI}).json()
    assert reply["object"] == "chat.completion"
    choice = reply["choices"][0]
    assert choice["message"] == {
        "role": "assistant", "content": "hello", "refusal": None,
    }  # fmt: skip
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None


def test_messages_go_through_the_model_s_template(client):
    told = [{"role": "developer", "content": "be kind"}, *HI]
    assert prompt_of(client, told) == "<system>be kind\n<user>hi\n<assistant>"


def test_parts_of_text_are_lines(client):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    assert prompt_of(client, messages) == "<user>one\ntwo\n<assistant>"


def test_an_answer_may_have_the_rest_of_the_context(client):
    prompt = prompt_of(client, HI)
    request = client.app.room.engine.submitted[-1]
    assert request.max_tokens == CONTEXT - len(prompt)


def test_the_newer_name_of_max_tokens_counts_first(client):
    prompt_of(client, HI, max_tokens=7, max_completion_tokens=3)
    assert client.app.room.engine.submitted[-1].max_tokens == 3


def test_the_final_message_may_be_continued(client):
    begun = [*HI, {"role": "assistant", "content": "I say: "}]
    text = prompt_of(client, begun, continue_final_message=True)
    assert text == "<user>hi\n<assistant>I say:"


def test_no_header_is_added_where_none_is_wanted(client):
    assert prompt_of(client, HI, add_generation_prompt=False) == "<user>hi\n"


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([{"role": "user", "content": [{"type": "image_url"}]}], "reads text alone"),
        ([{"role": "user", "content": [{"type": "text"}]}], "without `text`"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "tool", "content": "4"}], "no tool_call_id"),
        ([{"role": "wizard", "content": "hi"}], "wizard"),
        ([], "length >= 1"),
    ],
)
def test_messages_that_cannot_be_read_are_refused(client, messages, what):
    assert what in refused(client, messages)["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(client, body, param):
    assert refused(client, **body)["param"] == param


def test_a_conversation_longer_than_the_context_is_refused(client):
    error = refused(client, [{"role": "user", "content": "x" * CONTEXT}])
    assert error["code"] == "context_length_exceeded"


def test_logprobs_tell_bytes_and_alternatives(client):
    reply = client.post(PATH, {"messages": HI, "logprobs": True, "top_logprobs": 1})
    content = reply.json()["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == "hello"
    assert content[0]["bytes"] == [ord("h")]
    assert [one["token"] for one in content[0]["top_logprobs"]] == ["h"]


def test_tokenize_reads_messages_as_a_chat_does(client):
    reply = client.post("/tokenize", {"messages": HI}).json()
    text = client.post("/detokenize", {"tokens": reply["tokens"]}).json()["prompt"]
    assert text == "<user>hi\n<assistant>"
    assert reply["count"] == len(text) and reply["max_model_len"] == CONTEXT


def test_a_template_that_refuses_says_why():
    refuses = "{{ raise_exception('no system role') }}"
    fails = "{{ 1 / 0 }}"
    for template, what in [(refuses, "no system role"), (fails, "division by zero")]:
        made = bytes_tokenizer().with_chat_template(template)
        with client_of(FakeEngine(), tokenizer=made) as client:
            assert what in refused(client)["message"]


def test_a_model_that_does_not_converse_says_so():
    with client_of(FakeEngine(), tokenizer=bytes_tokenizer()) as client:
        assert "no chat template" in refused(client)["message"]


def test_more_inputs_than_seats_are_embedded_in_turns(client):
    texts = [chr(97 + index) for index in range(26)] * 2
    reply = client.post("/v1/embeddings", {"input": texts}).json()
    assert [one["index"] for one in reply["data"]] == list(range(52))
    assert reply["usage"]["prompt_tokens"] == 52
    alone = client.post("/v1/embeddings", {"input": "c"}).json()["data"][0]
    assert reply["data"][28]["embedding"] == alone["embedding"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": HI}),
        ("/detokenize", {"tokens": [257]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/v1/embeddings", {"input": "a", "dimensions": 7}),
        ("/v1/embeddings", {"input": "x" * (CONTEXT + 1)}),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}),
    ],
)
def test_the_smaller_doors_refuse_what_cannot_be(client, path, body):
    reply = client.post(path, body)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_a_model_that_is_not_here_is_404(client):
    for path, body in [(PATH, {"messages": HI}), ("/tokenize", {"prompt": "a"})]:
        reply = client.post(path, {**body, "model": "gpt"})
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"
