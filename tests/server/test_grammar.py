"""Masks of grammars: whatever is drawn through them has the form, and nothing hangs."""

from __future__ import annotations

import functools
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_models import gguf

from llmos_jax.data import Tokenizer, bytes_tokenizer, load_tokenizer
from llmos_jax.errors import ConfigError
from llmos_jax.server import grammar as module
from llmos_jax.server.grammar import Grammars

SPARE = 77  # rows of the model that no token has
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mood": {"enum": ["glad", "sad", "süß"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}


@functools.cache
def made(name: str) -> tuple[Tokenizer, Grammars]:
    if name == "bytes":
        tokenizer = bytes_tokenizer()
    elif name == "two stops":
        plain = json.loads(bytes_tokenizer().to_json())
        plain["llmos"]["stop_ids"] = [0, 256]
        tokenizer = Tokenizer.from_json(json.dumps(plain))
    else:
        tokenizer = load_tokenizer(str(gguf(name).parent / "hf"))
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size + SPARE)


def allowed(grammar, tokenizer: Tokenizer) -> np.ndarray:
    mask = np.full(-(-(tokenizer.vocab_size + SPARE) // 32), 0xFFFFFFFF, np.uint32)
    grammar.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def walk(kind: str, text: str, seed: int, name: str = "bytes", most: int = 400) -> str:
    """Draw tokens till the end; after `most` of them take the end where it is open."""
    tokenizer, grammars = made(name)
    grammar, rng, ids = grammars.compile(kind, text), np.random.default_rng(seed), []
    while True:
        open_ = allowed(grammar, tokenizer)
        assert open_.size and open_[-1] < tokenizer.vocab_size
        token = int(rng.choice(open_))
        if len(ids) > most and grammar.may_end:
            token = tokenizer.eos_id
        if token in tokenizer.stop_ids:
            grammar.take(token)
            assert set(allowed(grammar, tokenizer)) == tokenizer.stop_ids
            return tokenizer.decode(ids)
        ids.append(token)
        grammar.take(token)
        assert len(ids) < 20 * most


def spelled(kind: str, text: str, said: str, name: str = "bytes") -> bool:
    """Whether the grammar takes this very text, to its end."""
    tokenizer, grammars = made(name)
    grammar = grammars.compile(kind, text)
    for token in tokenizer.encode(said):
        if token not in allowed(grammar, tokenizer):
            return False
        grammar.take(int(token))
    return grammar.may_end


@pytest.mark.parametrize("name", ["bytes", "smollm2"])
@pytest.mark.parametrize("seed", range(8))
def test_a_walk_through_a_schema_matches_it(name, seed):
    said = json.loads(walk("json_schema", json.dumps(PERSON), seed, name))
    assert set(said) == set(PERSON["properties"])
    assert len(said["name"]) <= 8 and 0 <= said["age"] <= 130
    assert type(said["age"]) is int
    assert said["mood"] in PERSON["properties"]["mood"]["enum"]


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -5, "maximum": 9},
            {"type": "string", "maxLength": 3},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["a", 1, None]},
            {"type": "string", "pattern": "^[ab]{2}$"},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda items: {"type": "array", "items": items, "maxItems": 3}, inner
        ),
        st.builds(
            lambda some: {
                "type": "object",
                "properties": some,
                "required": sorted(some)[:1],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
        ),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=6,
)


@given(schema=SCHEMAS, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_a_walk_through_any_schema_matches_it(schema, seed):
    checker = pytest.importorskip("jsonschema")
    checker.validate(json.loads(walk("json_schema", json.dumps(schema), seed)), schema)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_a_walk_through_any_json_object_is_one(seed):
    tokenizer, grammars = made("bytes")
    grammar, said = grammars.compile("json_object", ""), b""
    rng = np.random.default_rng(seed)
    for _ in range(200):
        choice = int(rng.choice(allowed(grammar, tokenizer)))
        if choice == tokenizer.eos_id:
            assert isinstance(json.loads(said), dict)
            return
        grammar.take(choice)
        said += bytes([choice])
    assert said.startswith(b"{")


@pytest.mark.parametrize("name", ["bytes", "smollm2"])
@pytest.mark.parametrize("pattern", [r"[a-c]{2,5}", r"(yes|no)", r"\d{3}-ü?x+", ""])
@pytest.mark.parametrize("seed", range(3))
def test_a_walk_through_a_regular_expression_matches_it(name, pattern, seed):
    assert re.fullmatch(pattern, walk("regex", pattern, seed, name, most=20))


def test_a_walk_through_a_lark_grammar_follows_it():
    grammar = 'start: item ("," item)*\nitem: "(" start ")" | /[0-9]+/'
    for seed in range(5):
        said = walk("lark", grammar, seed, most=30)
        assert said.count("(") == said.count(")") and re.fullmatch(r"[0-9,()]+", said)


@pytest.mark.parametrize("name", ["bytes", "two stops"])
def test_every_stop_token_is_open_where_the_answer_may_end(name):
    tokenizer, grammars = made(name)
    grammar = grammars.compile("regex", "ab?")
    assert not set(allowed(grammar, tokenizer)) & tokenizer.stop_ids
    grammar.take(ord("a"))
    assert set(allowed(grammar, tokenizer)) == tokenizer.stop_ids | {ord("b")}
    grammar.take(ord("b"))
    assert grammar.may_end
    assert set(allowed(grammar, tokenizer)) == tokenizer.stop_ids


def test_requests_of_one_grammar_do_not_share_a_place_in_it():
    tokenizer, grammars = made("bytes")
    first, second = (grammars.compile("regex", "ab") for _ in range(2))
    first.take(ord("a"))
    assert list(allowed(first, tokenizer)) == [ord("b")]
    assert list(allowed(second, tokenizer)) == [ord("a")]


def test_json_may_be_laid_out_but_not_padded_without_end():
    schema = '{"type": "object", "properties": {"a": {"type": "array"}}}'
    for said in ('{"a":[1]}', '{"a": [1, 2]}', '{\n  "a": [\n    1\n  ]\n}'):
        assert spelled("json_schema", schema, said)
    assert not spelled("json_schema", schema, '{  "a":[1]}')
    assert not spelled("json_schema", schema, '{\n\n"a":[1]}')


def test_a_mark_of_the_model_is_no_text():
    tokenizer, grammars = made("smollm2")
    grammar = grammars.compile("regex", "(?s:.*)")
    assert set(allowed(grammar, tokenizer)) & tokenizer.special_ids() == set(
        tokenizer.stop_ids
    )
    assert grammars.marks["<|im_start|>"] == 1
    said = grammars.compile("lark", 'start: <[1]> "a"')
    assert list(allowed(said, tokenizer)) == [1]


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("json_schema", "{", "this JSON schema cannot be used: Expecting property"),
        ("json_schema", "[1]", "not an object"),
        ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)"}', "look-around"),
        ("json_schema", '{"$ref": "http://x/y"}', "http://x/y"),
        ("json_schema", '{"type": "object", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"$ref": "#"}', "nothing matches"),
        ("json_schema", "[" * 5000, "JSON schema cannot be used"),
        ("json_schema", " " * (1 << 18), "262144 characters; at most 131072"),
        ("regex", "(a", "this regular expression cannot be used: unclosed group."),
        ("regex", "(" * 5000 + "a" + ")" * 5000, "regular expression cannot"),
        ("lark", "start: b", 'this Lark grammar cannot be used: .*unknown name: "b"'),
        ("lark", "start: <foo>", 'unknown special token: "<foo>"'),
        ("lark", "\ud800", "Lark grammar"),
    ],
)
def test_a_bad_grammar_is_refused_in_one_sentence(kind, text, told):
    with pytest.raises(ConfigError, match=told) as caught:
        made("bytes")[1].compile(kind, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(40)]},
        {"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 7919}]},
    ],
    ids=["patterns", "multiples"],
)
def test_a_hostile_schema_is_given_up(schema, monkeypatch):
    monkeypatch.setattr(module, "TRIAL_S", 1.0)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="more than 1 s to make ready"):
        made("bytes")[1].compile("json_schema", json.dumps(schema))
    assert time.monotonic() - start < 10


HARD = r"(a|aa|aaa)*(b{1000}){1000}x"


def test_a_grammar_that_grows_too_large_ends_the_answer_with_a_sentence():
    tokenizer, grammars = made("bytes")
    grammar = grammars.compile("regex", HARD)
    with pytest.raises(ConfigError, match=r"cannot be followed any further: .*\. Ask"):
        for _ in range(3000):
            grammar.take(ord("b"))
            allowed(grammar, tokenizer)
