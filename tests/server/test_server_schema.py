"""What /openapi.json says, and what the server does, by schemathesis."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_engine import LIMITS, FakeEngine, say
from serving_here import Client, app_of

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, settings  # noqa: E402
from schemathesis import checks as laws  # noqa: E402

from llmos_jax.server.app import ROUTES  # noqa: E402
from llmos_jax.server.openapi import CLASSIFYING, GENERATING, openapi  # noqa: E402

EXAMPLES = 15
"""Of each operation and way: a few seconds in all."""

APP = app_of(FakeEngine(say("hello")))
CONFIG = schemathesis.Config.from_dict(
    {
        "generation": {"mode": "all", "allow-x00": True},
        "checks": {"not_a_server_error": {"expected-statuses": [200, "4xx", 504]}},
    }
)
LAWS = [
    laws.not_a_server_error,
    laws.status_code_conformance,
    laws.content_type_conformance,
    laws.response_schema_conformance,
    laws.response_headers_conformance,
    laws.negative_data_rejection,
    laws.unsupported_method,
]
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP, config=CONFIG)
CLASSIFIER_APP = app_of(FakeEngine(limits=replace(LIMITS, labels=("yes", "no"))))
CLASSIFIER = schemathesis.openapi.from_asgi(
    "/openapi.json", CLASSIFIER_APP, config=CONFIG
)


@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_one_that_was_told(case):
    """No 500, no status and no body that the document does not have; what it calls
    wrong is refused."""
    case.call_and_validate(checks=LAWS)


def test_the_document_lists_every_route():
    paths = {path.replace("{model:path}", "{model}") for path, _, _ in ROUTES}
    told = Client(APP).get("/openapi.json").json()["paths"]
    assert told.keys() == paths - set(CLASSIFYING)
    assert openapi(is_classifier=True)["paths"].keys() == paths - set(GENERATING)


@CLASSIFIER.include(path="/v1/classify").parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_a_classifier_answers_as_its_document_says(case):
    case.call_and_validate(checks=LAWS)


def test_a_simple_body_of_each_operation_is_answered():
    """The examples above may all be refused; these may not."""
    for path, body in {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/embeddings": {"input": ["a"]},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [97]},
    }.items():
        assert Client(APP).post(path, body).status_code == 200, path
    assert Client(CLASSIFIER_APP).post("/v1/classify", {"input": "a"}).is_success
