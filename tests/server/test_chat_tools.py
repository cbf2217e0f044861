"""Tools over HTTP: calls in answers and in streams, and calls that are forced."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from fake_engine import LIMITS, FakeEngine, say
from serving_here import NAME, client_of, served

from llmos_jax.data import bytes_tokenizer
from llmos_jax.server.words import Words

PATH = "/v1/chat/completions"
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "Answer <tool_call>...</tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}"
    "\n{% endfor %}<assistant>"
)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
HI = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
    }
]
ROOMY = replace(LIMITS, context=1000)
TOKENIZER = bytes_tokenizer().with_chat_template(TEMPLATE)


def answer(text: str, **body):
    engine = FakeEngine(say(text), limits=ROOMY)
    with client_of(engine, tokenizer=TOKENIZER) as client:
        reply = client.post(PATH, {"messages": HI, "tools": TOOLS, **body})
        return reply, engine


def test_a_call_is_told_apart_from_text():
    reply, engine = answer("Wait. " + CALL)
    choice = reply.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Wait."
    call = choice["message"]["tool_calls"][0]
    assert call["type"] == "function" and call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"]) == {"x": 1}
    prompt = TOKENIZER.decode(engine.submitted[0].prompt)
    assert '"name": "f"' in prompt


def test_text_alone_has_no_calls():
    reply, _ = answer("no need")
    message = reply.json()["choices"][0]["message"]
    assert message["content"] == "no need" and "tool_calls" not in message


def test_no_calls_are_looked_for_where_none_are_wanted():
    reply, _ = answer(CALL, tool_choice="none")
    choice = reply.json()["choices"][0]
    assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"


def test_one_call_where_they_may_not_be_parallel():
    both = answer(CALL + CALL)[0].json()["choices"][0]
    one = answer(CALL + CALL, parallel_tool_calls=False)[0].json()["choices"][0]
    assert len(both["message"]["tool_calls"]) == 2
    assert len(one["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "f"}}]
)
def test_a_call_is_forced_by_a_grammar(choice):
    reply, engine = answer(CALL, tool_choice=choice)
    assert reply.status_code == 200
    grammar = engine.submitted[0].grammar
    mask = np.zeros(9, np.uint32)
    grammar.fill(mask)
    allowed = [token for token in range(257) if mask[token // 32] >> token % 32 & 1]
    assert allowed == [ord("<")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": {"function": {"name": "g"}}}, "tool_choice"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
        ),
    ],
)
def test_what_cannot_be_is_refused(body, param):
    reply, _ = answer("", **body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


def test_results_of_calls_go_back_to_the_model():
    messages = [
        *HI,
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c", "function": {"name": "f", "arguments": '{"x": 41}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ]
    reply, engine = answer("done", messages=messages)
    assert reply.status_code == 200, reply.text
    assert "<assistant>41<tool>42<assistant>" in TOKENIZER.decode(
        engine.submitted[0].prompt
    )


def test_arguments_that_are_no_object_are_refused():
    call = {"id": "c", "function": {"name": "f", "arguments": "[1]"}}
    messages = [*HI, {"role": "assistant", "tool_calls": [call]}]
    assert answer("", messages=messages)[0].status_code == 400


def test_the_official_client_puts_a_streamed_call_together():
    openai = pytest.importorskip("openai")
    engine = FakeEngine(say("Wait. " + CALL), limits=ROOMY)
    with served(engine, tokenizer=TOKENIZER) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x")
        with client.chat.completions.stream(
            model=NAME, messages=HI, tools=TOOLS
        ) as stream:
            said = [event.delta for event in stream if event.type == "content.delta"]
            found = stream.get_final_completion().choices[0]
        assert "".join(said) == "Wait. "
        assert found.finish_reason == "tool_calls"
        assert found.message.tool_calls[0].function.name == "f"
        assert json.loads(found.message.tool_calls[0].function.arguments) == {"x": 1}


def test_marks_that_are_tokens_are_seen():
    """Mistral's tokenizers do not write [TOOL_CALLS] out: it is a token that says
    nothing."""
    words = Words(bytes_tokenizer(), shown={256: "[TOOL_CALLS]"})
    assert [words.push(token)[0] for token in (97, 256, 98)] == [
        "a", "[TOOL_CALLS]", "b",
    ]  # fmt: skip
