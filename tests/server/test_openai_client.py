"""OpenAI's own client, and OpenAI's own description of its answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_engine import FakeEngine, say
from serving_here import NAME, Client, app_of, served

openai = pytest.importorskip("openai")

HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def address():
    with served(FakeEngine(say("hello world"), chunk=3), api_keys=("secret",)) as here:
        yield here[0]


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(
        base_url=f"{address}/v1", api_key="secret", max_retries=0
    ) as made:
        yield made


def test_completions(client):
    found = client.completions.create(model=NAME, prompt="a", n=2, logprobs=1)
    assert [one.text for one in found.choices] == ["hello world"] * 2
    assert found.choices[0].logprobs.tokens[0] == "h"
    assert found.usage.total_tokens == 1 + 22
    assert found.usage.prompt_tokens_details.cached_tokens == 3


def test_completions_stream(client):
    found = list(client.completions.create(
        model=NAME, prompt=["a", "b"], stream=True, stop="rld",
        stream_options={"include_usage": True},
    ))  # fmt: skip
    texts = ["", ""]
    for chunk in found[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["hello wo"] * 2
    assert found[-1].choices == [] and found[-1].usage.prompt_tokens == 2


def test_completions_stream_logprobs_line_up_with_text(client):
    chunks = client.completions.create(
        model=NAME, prompt="a", stream=True, logprobs=0, stop=["wo"]
    )
    for chunk in chunks:
        choice = chunk.choices[0]
        assert "".join(choice.logprobs.tokens) == choice.text


def test_chat(client):
    found = client.chat.completions.create(
        model=NAME, messages=HI, logprobs=True, top_logprobs=2, n=2
    )
    assert [one.message.content for one in found.choices] == ["hello world"] * 2
    assert len(found.choices[1].logprobs.content[0].top_logprobs) == 2


def test_chat_stream(client):
    with client.chat.completions.stream(
        model=NAME, messages=HI, n=2, logprobs=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        for _ in stream:
            pass
        found = stream.get_final_completion()
    assert [one.message.content for one in found.choices] == ["hello world"] * 2
    assert [one.finish_reason for one in found.choices] == ["stop", "stop"]
    assert len(found.choices[0].logprobs.content) == 11
    assert found.usage.completion_tokens == 22


def test_embeddings(client):
    by_text = client.embeddings.create(model=NAME, input=["ab", "c"])
    assert by_text.usage.prompt_tokens == 3
    vector = np.array(by_text.data[0].embedding)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    plain = client.embeddings.create(
        model=NAME, input=[97, 98], encoding_format="float"
    )
    np.testing.assert_allclose(plain.data[0].embedding, vector, rtol=1e-6)


def test_models(client):
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_errors_are_the_client_s_own(client, address):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="a" * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HI)
    other = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        other.models.list()


def test_a_stream_that_fails_in_the_middle_raises_with_its_reason():
    engine = FakeEngine(problem="the model says nothing but NaN.")
    with served(engine) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        heard = ""
        with pytest.raises(openai.APIError, match="nothing but NaN"):
            for chunk in client.completions.create(
                model=NAME, prompt="a", stream=True, temperature=0
            ):
                heard += chunk.choices[0].text
        assert heard == "ab"
        with pytest.raises(openai.InternalServerError, match="nothing but NaN"):
            client.completions.create(model=NAME, prompt="a")


@pytest.fixture(scope="module")
def spec():
    """OpenAI's openapi.yaml, where LLMOS_OPENAI_SPEC names it."""
    path = os.environ.get("LLMOS_OPENAI_SPEC")
    if path is None:
        pytest.skip("LLMOS_OPENAI_SPEC does not name OpenAI's openapi.yaml")
    yaml = pytest.importorskip("yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return with_nulls(yaml.load(Path(path).read_text(encoding="utf-8"), loader))


def with_nulls(part: Any) -> Any:
    """The same with `nullable`, OpenAPI 3.0's word, said as JSON schema says it."""
    if isinstance(part, list):
        return [with_nulls(one) for one in part]
    if not isinstance(part, dict):
        return part
    found = {key: with_nulls(value) for key, value in part.items()}
    if found.pop("nullable", False) is True:
        return {"anyOf": [found, {"type": "null"}]}
    return found


def check(spec: dict[str, Any], name: str, body: Any) -> None:
    """Fail unless a body is what the schema of this name says."""
    jsonschema = pytest.importorskip("jsonschema")
    root = {"$ref": f"#/components/schemas/{name}", "components": spec["components"]}
    jsonschema.Draft202012Validator(root).validate(body)


@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        (
            "/v1/completions",
            {"prompt": "a", "logprobs": 2, "model": NAME},
            "CreateCompletionResponse",
            None,  # its schema has no null for finish_reason, which its streams have
        ),
        ("/v1/completions", {"prompt": "a"}, "CreateCompletionResponse", None),
        (
            "/v1/chat/completions",
            {"messages": HI, "logprobs": True, "top_logprobs": 2},
            "CreateChatCompletionResponse",
            "CreateChatCompletionStreamResponse",
        ),
        (
            "/v1/chat/completions",
            {"messages": HI},
            "CreateChatCompletionResponse",
            "CreateChatCompletionStreamResponse",
        ),
        ("/v1/embeddings", {"input": "a"}, "CreateEmbeddingResponse", None),
    ],
)
def test_answers_are_what_openai_describes(spec, path, body, whole, chunk):
    engine = FakeEngine(say("hello"))
    client = Client(app_of(engine))
    check(spec, whole, client.post(path, body).json())
    if chunk is not None:
        lines = client.post(path, {**body, "stream": True}).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""] and len(lines) > 4
        for line in lines[:-2]:
            check(spec, chunk, msgspec.json.decode(line.removeprefix("data: ")))
    check(spec, "ErrorResponse", client.post(path, {}).json())
    engine.stop()
