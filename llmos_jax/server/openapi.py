"""Describe the server as OpenAPI 3.1, from the types that check its requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from llmos_jax.server import protocol, replies

_REF = "#/components/schemas/{name}"

_REFUSALS = {
    400: "What was asked cannot be done.",
    401: "The API key is missing or wrong.",
    404: "The model is not here.",
    408: "The request, or its reader, was too slow.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too much waits already; Retry-After says when to ask again.",
    500: "The request failed.",
    503: "The server stops, or its engine does not work.",
    504: "The deadline passed before the first token.",
}
_DEADLINE = {
    "name": "x-llmos-deadline-s",
    "in": "header",
    "description": "Seconds after which the request is given up.",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
}

_POSTS = [
    ("/v1/completions", "createCompletion", "Go on from prompts.",
     protocol.CompletionRequest, replies.Completion, replies.Completion),
    ("/v1/chat/completions", "createChatCompletion", "Give the next turn.",
     protocol.ChatRequest, replies.Chat, replies.ChatChunk),
    ("/v1/embeddings", "createEmbedding", "Give a vector for each text.",
     protocol.EmbeddingRequest, replies.Embeddings, None),
    ("/v1/classify", "createClassification", "Give the class of each text.",
     protocol.ClassifyRequest, replies.TextClasses, None),
    ("/tokenize", "tokenize", "Give the ids of a text.",
     protocol.TokenizeRequest, replies.Tokenized, None),
    ("/detokenize", "detokenize", "Give the text of ids.",
     protocol.DetokenizeRequest, replies.Detokenized, None),
]  # fmt: skip


CLASSIFYING: tuple[str, ...] = ("/v1/classify",)
"""What only a classifier does."""
GENERATING: tuple[str, ...] = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
)
"""What only a language model does."""


@cache
def openapi(*, is_classifier: bool = False) -> dict[str, Any]:
    """Return the document of a language model, or of a classifier."""
    others = GENERATING if is_classifier else CLASSIFYING
    posts = [post for post in _POSTS if post[0] not in others]
    shapes = [
        *(shape for post in posts for shape in post[3:] if shape is not None),
        replies.ErrorBody, replies.ModelList, replies.ModelCard, replies.Status,
    ]  # fmt: skip
    _, schemas = msgspec.json.schema_components(shapes, ref_template=_REF)
    _tell_inputs_apart(schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llmos_jax",
            "version": _version(),
            "description": (
                "A text classifier, served as vLLM's API."
                if is_classifier
                else "A language model, served as OpenAI's API."
            ),
        },
        "paths": {**_posts(posts), **_gets()},
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _posts(posts: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    return {
        path: {
            "post": {
                "operationId": name,
                "summary": summary,
                "security": [{}, {"key": []}],
                "parameters": [_DEADLINE],
                "requestBody": {"required": True, "content": _json(asked)},
                "responses": {
                    "200": {"description": "Done.", "content": _told(body, chunk)},
                    **_refused(*_REFUSALS),
                },
            }
        }
        for path, name, summary, asked, body, chunk in posts
    }


def _gets() -> dict[str, Any]:
    text: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    anything: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    html: dict[str, Any] = {"text/html": {"schema": {"type": "string"}}}
    model = {
        "name": "model", "in": "path", "required": True,
        "schema": {"type": "string", "minLength": 1},
    }  # fmt: skip
    down = {"503": {"description": "It is not.", "content": _json(replies.Status)}}
    locked = {"security": [{}, {"key": []}], "parameters": [_DEADLINE]}
    refused = _refused(400, 401, 503)
    return {
        "/v1/models": _get(
            "listModels", "The model that is served.", _json(replies.ModelList),
            refused, **locked,
        ),
        "/v1/models/{model}": _get(
            "getModel", "One model.", _json(replies.ModelCard),
            {**refused, **_refused(404)},
            security=locked["security"], parameters=[model, _DEADLINE],
        ),
        "/health": _get("health", "Is it alive?", _json(replies.Status), down),
        "/ready": _get("ready", "Does it answer now?", _json(replies.Status), down),
        "/metrics": _get("metrics", "Figures for Prometheus.", text, {}),
        "/state": _get("state", "Figures for the page.", anything, {}),
        "/openapi.json": _get("openapi", "This document.", anything, {}),
        "/": _get("page", "A page: live figures, and a box to try.", html, {}),
    }  # fmt: skip


def _get(
    name: str,
    summary: str,
    content: dict[str, Any],
    others: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    done = {"200": {"description": "Done.", "content": content}}
    return {
        "get": {
            "operationId": name,
            "summary": summary,
            **more,
            "responses": {**done, **others},
        }
    }


def _refused(*statuses: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status in statuses:
        one = {"description": _REFUSALS[status], "content": _json(replies.ErrorBody)}
        if status in (429, 503):
            wait = {"schema": {"type": "integer", "minimum": 1}}
            one["headers"] = {"Retry-After": wait}
        found[str(status)] = one
    return found


def _told(body: type, chunk: type | None) -> dict[str, Any]:
    told = _json(body)
    if chunk is not None:
        told["text/event-stream"] = {"schema": {"type": "string"}}
    return told


def _json(shape: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=shape.__name__)}}}


def _tell_inputs_apart(schemas: dict[str, Any]) -> None:
    """Say what `prompts_of` checks: a list is of texts, of ids or of lists of ids."""
    token = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    ids = {"type": "array", "items": token, "minItems": 1}
    most = {"minItems": 1, "maxItems": protocol.MOST_PROMPTS}
    form = {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, **most},
            ids,
            {"type": "array", "items": ids, **most},
        ]
    }
    for name, field in (
        ("CompletionRequest", "prompt"),
        ("EmbeddingRequest", "input"),
        ("ClassifyRequest", "input"),
    ):
        if name in schemas:
            schemas[name]["properties"][field] = form


def _version() -> str:
    try:
        return version("llmos_jax")
    except PackageNotFoundError:
        return "0"
