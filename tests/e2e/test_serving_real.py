"""The server and the engine together, over HTTP, on a small model with int8 weights."""

from __future__ import annotations

import math

import pytest
from server_process import PATH, events_of, started, text_of, write_model

from llmos_jax import driver
from llmos_jax.serving import Sampling

pytestmark = pytest.mark.slow  # its server compiles for half a minute

PROMPTS = ["hello", "a", "The harbour at low tide smelled of rope. " * 8]
GREEDY = {"temperature": 0, "max_tokens": 40}
DRAWN = {"prompt": "hello", "temperature": 1, "max_tokens": 30, "seed": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with started(model, tmp_path_factory.mktemp("served") / "it") as made:
        made.wait_ready()
        yield made
        ended = made.stop()
        assert ended["code"] == 0 and ended["drained"] is True


def choices(server, body, path=PATH):
    """The choices of an answer."""
    reply = server.post(path, body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answers_are_those_of_generate(server, model, prompt):
    wanted = driver.generate(str(model), prompt, max_tokens=40, sampling=Sampling())
    reply = server.post(PATH, {"prompt": prompt, **GREEDY}).json()
    assert reply["choices"][0]["text"] == wanted["text"] and len(wanted["text"]) == 40
    assert reply["choices"][0]["finish_reason"] == wanted["finish_reason"]
    assert reply["usage"]["prompt_tokens"] == wanted["prompt_tokens"]


def test_answers_do_not_depend_on_who_else_asks(server):
    alone = [choices(server, {"prompt": one, **GREEDY})[0]["text"] for one in PROMPTS]
    together = choices(server, {"prompt": PROMPTS * 4, **GREEDY})
    assert [one["text"] for one in together] == alone * 4


@pytest.mark.parametrize("more", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_stream_says_the_same(server, more):
    body = {**more, "prompt": PROMPTS[2], "n": 2}
    whole = [one["text"] for one in choices(server, body)]
    streamed = server.post(PATH, {**body, "stream": True}).text
    assert [text_of(streamed, index) for index in (0, 1)] == whole
    assert streamed.endswith("data: [DONE]\n\n")


def test_the_seed_decides(server):
    first, again, other = (
        choices(server, {**DRAWN, "seed": seed})[0]["text"] for seed in (7, 7, 8)
    )
    assert first == again != other


def test_n_answers_differ(server):
    texts = [one["text"] for one in choices(server, {**DRAWN, "n": 4})]
    assert len(set(texts)) == 4


def test_an_answer_ends_before_a_stop_string(server):
    text = choices(server, {"prompt": "hello", **GREEDY})[0]["text"]
    stop = text[10:13]
    body = {"prompt": "hello", **GREEDY, "stop": stop}
    (cut,) = choices(server, body)
    assert cut["text"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_logprobs_are_of_the_tokens_that_were_chosen(server):
    (choice,) = choices(server, {"prompt": "hello", **GREEDY, "logprobs": 3})
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 40
    for name, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"]
    ):
        assert logprob < 0 and top[name] == max(top.values()) and len(top) == 3


def test_a_chat_is_its_template_completed(server):
    path = "/v1/chat/completions"
    said = [{"role": "user", "content": "hi"}]
    (chat,) = choices(server, {"messages": said, **GREEDY}, path)
    (plain,) = choices(server, {"prompt": "<user>hi\n<assistant>", **GREEDY})
    assert chat["message"]["content"] == plain["text"]
    streamed = server.post(path, {"messages": said, **GREEDY, "stream": True}).text
    deltas = [event["choices"][0]["delta"] for event in events_of(streamed)]
    assert "".join(one.get("content") or "" for one in deltas) == plain["text"]


def test_a_structured_answer_has_its_structure(server):
    body = {**DRAWN, "structured_outputs": {"regex": "[a-c]{5}-[0-9]{3}"}}
    text = choices(server, body)[0]["text"]
    assert len(text) == 9 and set(text[:5]) <= set("abc") and text[6:].isdecimal()


def test_embeddings_are_unit_vectors_of_texts(server):
    asked = {"input": ["one", "two", "one", PROMPTS[2]]}
    reply = server.post("/v1/embeddings", asked).json()
    vectors = [one["embedding"] for one in reply["data"]]
    for vector in vectors:
        assert math.sqrt(sum(x * x for x in vector)) == pytest.approx(1, abs=1e-4)
    assert vectors[0] == vectors[2] != vectors[1]


def test_tokens_there_and_back(server):
    made = server.post("/tokenize", {"prompt": "héllo"}).json()
    assert made["count"] == len("héllo".encode()) and made["max_model_len"] == 2048
    back = server.post("/detokenize", {"tokens": made["tokens"]}).json()
    assert back["prompt"] == "héllo"


def test_a_prompt_that_begins_alike_is_found_again(server):
    body = {"prompt": "z" * 300, **GREEDY}
    first, again = (server.post(PATH, body).json() for _ in range(2))
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256


def test_the_metrics_move(server):
    before, counted = server.get("/metrics").text, server.state()
    choices(server, {"prompt": "hello", **GREEDY})
    after, state = server.get("/metrics").text, server.wait_idle()
    assert state["generated_tokens"] == counted["generated_tokens"] + 40
    assert state["prompt_tokens"] == counted["prompt_tokens"] + 5
    name = "vllm:generation_tokens_total"
    values = [_value(text, name) for text in (before, after)]
    assert values[1] == values[0] + 40


def test_nothing_was_compiled_or_kept_on_the_way(server):
    state = server.wait_idle()
    assert state["unplanned_compiles"] == 0 and state["pages_held"] == 0


def _value(text: str, name: str) -> float:
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return float(lines[0].rsplit(" ", 1)[1])
