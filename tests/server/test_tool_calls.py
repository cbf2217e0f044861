"""Tool calls in what models say: found whole, in pieces, forced, and left as text."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmos_jax.data import Tokenizer, bytes_tokenizer
from llmos_jax.errors import ConfigError
from llmos_jax.server.grammar import Grammars
from llmos_jax.server.tools import CallDelta, ToolCall, ToolStyle

# The parts of each family's template that tell it apart.
TEMPLATES = {
    "tags": """{%- if tools %}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}
{{- "return a json object within <tool_call></tool_call> XML tags:\\n<tool_call>\\n" }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}' }}{%- endif %}""",
    "list": """{%- if tools is not none %}{{ "[AVAILABLE_TOOLS] [" }}{{ tools }}
{%- endif %}{{- "[TOOL_CALLS] [" }}""",
    "bare": """{%- if tools is not none %}{{- 'Respond in the format
{"name": function name, "parameters": dictionary of argument name and its value}.' }}
{%- endif %}""",
}
STYLES = {name: ToolStyle.of(text) for name, text in TEMPLATES.items()}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"$ref": "#/$defs/word"}},
                "required": [key],
                "additionalProperties": False,
                "$defs": {"word": {"type": "string", "maxLength": 4}},
            },
        },
    }
    for name, key in (("weather", "city"), ("add", "what"))
]


def written(family: str, *calls: tuple[str, dict]) -> str:
    key = STYLES[family].arguments_key
    bodies = [
        json.dumps({"name": name, key: arguments}, ensure_ascii=False)
        for name, arguments in calls
    ]
    if family == "tags":
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in bodies)
    if family == "list":
        return f"[TOOL_CALLS][{', '.join(bodies)}]"
    return "; ".join(bodies)


def plain(calls: list[ToolCall]) -> list[tuple[str, dict]]:
    return [(one.name, json.loads(one.arguments)) for one in calls]


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_template_tells_the_style(family):
    assert STYLES[family].family == family


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "{{ 'the toolset of <tool_call>' }}",
        "{% if tools %}{{ tools }}{% endif %}",
        "{% if tools %}<tool_call>\n<function=name>{% endif %}",
        "{% if tools %}<tool_call>{name}\n<arg_key>{% endif %}",
        "{% if tools %}[TOOL_CALLS]name[ARGS]{}{% endif %}",
    ],
)
def test_a_template_without_a_known_style_has_none(template):
    assert ToolStyle.of(template) is None


CALLS = [("weather", {"city": "Zürich \U0001f327 ]}", "deep": {"a": [{"b": "}{"}]}})]
TWO = [*CALLS, ("add", {"what": '</tool_call> [TOOL_CALLS] \\ "'})]


@pytest.mark.parametrize("calls", [CALLS, TWO, [("now", {})]], ids=["one", "two", "no"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_calls_are_found_with_their_arguments(family, calls):
    content, found = STYLES[family].parse(written(family, *calls))
    assert content is None
    assert plain(found) == calls


@pytest.mark.parametrize("family", ["tags", "list"])
def test_text_around_calls_is_kept(family):
    content, found = STYLES[family].parse("Let me see. " + written(family, *CALLS))
    assert content == "Let me see." and plain(found) == CALLS


def test_a_bare_call_may_stand_behind_its_mark():
    content, found = STYLES["bare"].parse("<|python_tag|>" + written("bare", *CALLS))
    assert content is None and plain(found) == CALLS


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("tags", '<tool_call>\n{"name": "a", "arguments": {}}\n'),
        ("tags", '<tool_call>{"name": "a", "argum</tool_call>'),
        ("tags", "<tool_call>hello</tool_call>"),
        ("tags", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("tags", '<tool_call>{"name": "a", "arguments": [1]}</tool_call>'),
        ("tags", '<tool_call>{"name": "a"}</tool_call>'),
        ("tags", '<tool_call>{"name": "a\nb"}</tool_call>'),
        ("tags", "a < b and <tool"),
        ("list", "[TOOL_CALLS] none"),
        ("list", "[TOOL_CALLS][]"),
        ("list", '[TOOL_CALLS][{"name": "a", "arguments": {}}, 3]'),
        ("list", '[TOOL_CALLS][{"name": "a", "arguments": {}}'),
        ("bare", '{"name": "a", "parameters": {}'),
        ("bare", '{"answer": 42}'),
        ("bare", 'It is {"name": "a", "parameters": {}}'),
        ("bare", "{not JSON}"),
        ("bare", "[" * 3000),
        ("tags", "<tool_call>" + "[" * 3000),
    ],
)
def test_what_is_no_call_stays_text(family, text):
    assert STYLES[family].parse(text) == (text, [])


def test_a_good_call_after_a_bad_one_is_found():
    text = "<tool_call>oops</tool_call>" + written("tags", *CALLS)
    content, found = STYLES["tags"].parse(text)
    assert content == "<tool_call>oops</tool_call>" and plain(found) == CALLS


@pytest.mark.parametrize(
    "arguments", ['{"arguments": "{\\"a\\": 1}"}', '{"parameters": {"a": 1}}']
)
def test_arguments_may_come_as_a_string_or_by_the_other_word(arguments):
    body = {"name": "f", **json.loads(arguments)}
    _, found = STYLES["tags"].parse(f"<tool_call>{json.dumps(body)}</tool_call>")
    assert plain(found) == [("f", {"a": 1})]


def streamed(family: str, pieces: list[str]) -> tuple[str, list[CallDelta]]:
    stream = STYLES[family].stream()
    parts = [part for piece in pieces for part in stream.push(piece)]
    parts += stream.flush()
    return (
        "".join(one for one in parts if isinstance(one, str)),
        [one for one in parts if isinstance(one, CallDelta)],
    )


MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<tool_", "{", "}", "[", "]",
         '"', "\\", " ", "\n", "x", "é", ";", "<|python_tag|>"]  # fmt: skip
WORDS = [*MARKS, *(written(name, *CALLS) for name in TEMPLATES)]


@pytest.mark.parametrize("family", TEMPLATES)
@given(words=st.lists(st.sampled_from(WORDS), max_size=6), cuts=st.data())
@settings(max_examples=80, deadline=None)
def test_pieces_say_what_the_whole_says(family, words, cuts):
    text = "".join(words)
    at = sorted(cuts.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)])]
    letters, calls = streamed(family, pieces), streamed(family, list(text))
    whole = streamed(family, [text])
    for said, found in (letters, calls):
        assert said == whole[0]
        assert [one.call for one in found] == [one.call for one in whole[1]]
    if not whole[1]:
        assert whole[0] == text


@given(text=st.text())
@example(text="<tool_call")
@settings(max_examples=60, deadline=None)
def test_text_without_calls_comes_through_as_it_is(text):
    for family in TEMPLATES:
        assert streamed(family, list(text)) == (text, [])


@pytest.mark.parametrize("family", ["tags", "list"])
def test_a_stream_shows_text_at_once_and_never_half_a_mark(family):
    stream = STYLES[family].stream()
    assert stream.push("Hello <b> [T] ") == ["Hello <b> [T] "]
    shown = [part for letter in written(family, *TWO) for part in stream.push(letter)]
    assert [type(part) for part in shown] == [CallDelta, CallDelta]
    assert [part.index for part in shown] == [0, 1]
    assert stream.num_calls == 2 and stream.flush() == []


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_long_call_takes_time_by_its_length(family):
    calls = [("f", {"text": "word " * 20_000})]
    start = time.monotonic()
    _, found = streamed(family, list(written(family, *calls)))
    assert plain([one.call for one in found]) == calls
    assert time.monotonic() - start < 10


def test_a_call_without_end_is_text_after_a_while():
    text = '<tool_call>{"name": "' + "x" * (1 << 19)
    stream = STYLES["tags"].stream()
    first, second = stream.push(text[:1000]), stream.push(text[1000:])
    assert first == [] and "".join(second) == text


def test_a_bare_answer_in_words_streams_at_once():
    stream = STYLES["bare"].stream()
    assert stream.push("It") == ["It"] and stream.push(" is {") == [" is {"]


def test_a_delta_tells_the_name_first_and_then_the_arguments():
    _, (call,) = streamed("tags", [written("tags", *CALLS)])
    first, second = call.to_plain()
    assert first["id"].startswith("call_") and first["type"] == "function"
    assert first["index"] == second["index"] == 0
    assert first["function"] == {"name": "weather", "arguments": ""}
    assert json.loads(second["function"]["arguments"]) == CALLS[0][1]


def drawn(kind: str, text: str, seed: int) -> str:
    tokenizer = bytes_tokenizer()
    grammar = Grammars(tokenizer, tokenizer.vocab_size).compile(kind, text)
    rng, ids = np.random.default_rng(seed), []
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    while True:
        grammar.fill(mask)
        token = int(rng.choice(np.flatnonzero(np.unpackbits(
            mask.view(np.uint8), bitorder="little"))))  # fmt: skip
        if token == tokenizer.eos_id or (len(ids) > 300 and grammar.may_end):
            return tokenizer.decode(ids)
        ids.append(token)
        grammar.take(token)
        assert len(ids) < 10_000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("choice", ["required", "add"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_a_grammar_forces_calls_that_the_parser_finds(family, choice, parallel, seed):
    style = STYLES[family]
    content, calls = style.parse(drawn(*style.grammar(TOOLS, choice, parallel), seed))
    assert content is None and calls
    assert parallel or len(calls) == 1
    keys = {"weather": {"city"}, "add": {"what"}}
    for name, arguments in plain(calls):
        assert choice in ("required", name) and set(arguments) == keys[name]
        assert all(len(value) <= 4 for value in arguments.values())


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_forced_call_cannot_be_padded_without_end(family):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    tokenizer, style = bytes_tokenizer(), STYLES[family]
    text = written(family, ("f", {"a": 1}))
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    grammar = grammars.compile(*style.grammar(tools, "f", False))
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    for letter in text[: text.index(" ") + 1].encode():
        grammar.take(letter)
    grammar.fill(mask)
    assert not mask[1] & 1  # a second space


def test_a_mark_that_is_a_token_is_asked_for_as_one():
    marks = {"<tool_call>": 7, "</tool_call>": 8}
    _, text = STYLES["tags"].grammar(TOOLS, "add", False, marks)
    assert text.startswith('start: <[7]> "\\n"? call "\\n"? <[8]>\n')


def with_marks() -> Tokenizer:
    """Bytes, and Qwen's tokens for the marks of a call: not special, but one each."""
    plain = json.loads(bytes_tokenizer().to_json())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    plain["added_tokens"] += [
        {"id": 257 + index, "content": name, "special": False, **flags}
        for index, name in enumerate(("<tool_call>", "</tool_call>"))
    ]
    return Tokenizer.from_json(json.dumps(plain))


def test_the_marks_of_a_vocabulary_are_forced_as_tokens():
    tokenizer = with_marks()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    style = STYLES["tags"]
    grammar = grammars.compile(*style.grammar(TOOLS, "add", False, grammars.marks))
    mask, said = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32), []
    for token in tokenizer.encode_markup(written("tags", ("add", {"what": "x"}))):
        grammar.fill(mask)
        said.append(int(token))
        assert mask[token // 32] >> (token % 32) & 1, tokenizer.decode(said)
        grammar.take(int(token))
    assert grammar.may_end and said[0] == 257 and said[-1] == 258
    assert plain(style.parse(tokenizer.decode(said))[1]) == [("add", {"what": "x"})]


def test_ids_are_fresh_and_as_the_template_wants_them():
    ids = [STYLES["list"].new_id() for _ in range(50)]
    assert len(set(ids)) == 50 and all(len(one) == 9 and one.isalnum() for one in ids)


def test_a_choice_that_is_no_tool_is_refused():
    with pytest.raises(ConfigError, match="'ad', .* Did you mean 'add'"):
        STYLES["tags"].grammar(TOOLS, "ad")
    with pytest.raises(ConfigError, match="there are no tools"):
        STYLES["tags"].grammar([], "required")
