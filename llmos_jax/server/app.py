"""The routes of the server, behind its door."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, Router

from llmos_jax.data import Tokenizer
from llmos_jax.server.chat import chat_completions
from llmos_jax.server.classify import classify
from llmos_jax.server.completions import completions
from llmos_jax.server.door import Door, room_of
from llmos_jax.server.embeddings import embeddings
from llmos_jax.server.openapi import CLASSIFYING, GENERATING, openapi
from llmos_jax.server.options import ServerOptions
from llmos_jax.server.page import headers, page
from llmos_jax.server.refusals import RETRY_AFTER_S, Refusal
from llmos_jax.server.replies import ModelCard, ModelList, Status, json_response
from llmos_jax.server.room import Engine, Room
from llmos_jax.server.tokens import detokenize, tokenize


def make_app(
    engine: Engine,
    tokenizer: Tokenizer,
    model_name: str,
    options: ServerOptions | None = None,
) -> Door:
    """Return the ASGI app that serves a model; its `room` has the state."""
    options = (options or ServerOptions()).check()
    room = Room(engine, tokenizer, model_name, options)
    others = GENERATING if room.is_classifier else CLASSIFYING
    routes = [
        Route(path, _other_kind if path in others else endpoint, methods=[method])
        for path, method, endpoint in ROUTES
    ]
    paths = [path for path, _, _ in ROUTES]
    return Door(Router(routes, redirect_slashes=False), paths, room)


async def _other_kind(http: HttpRequest) -> Response:
    room = room_of(http)
    does, paths = "generates text", GENERATING
    if room.is_classifier:
        does, paths = "classifies texts", CLASSIFYING
    raise Refusal(
        404,
        f"{room.model_name} {does}, and {http.url.path} is for other models. POST to "
        f"{' or '.join(paths)}.",
        code="other_kind_of_model",
    )


async def _models(http: HttpRequest) -> Response:
    return json_response(ModelList(data=[_card(room_of(http))]))


async def _model(http: HttpRequest) -> Response:
    room = room_of(http)
    room.check_model(http.path_params["model"])
    return json_response(_card(room))


def _card(room: Room) -> ModelCard:
    return ModelCard(
        id=room.model_name, created=room.created, max_model_len=room.limits.context
    )


async def _health(http: HttpRequest) -> Response:
    state = room_of(http).engine.state()
    if state.stage in ("failed", "stopped"):
        return _unavailable(state.stage, state.problem)
    return json_response(Status(status="ok"))


async def _ready(http: HttpRequest) -> Response:
    room = room_of(http)
    state = room.engine.state()
    stage = "draining" if room.is_draining else state.stage
    if stage != "ready":
        return _unavailable(stage, state.problem)
    return json_response(Status(status="ready"))


def _unavailable(status: str, problem: str) -> Response:
    return json_response(
        Status(status=status, problem=problem or msgspec.UNSET),
        503,
        {"retry-after": str(RETRY_AFTER_S)},
    )


async def _metrics(http: HttpRequest) -> Response:
    text, kind = room_of(http).metrics.render()
    return Response(text, headers={"content-type": kind})


async def _state(http: HttpRequest) -> Response:
    room = room_of(http)
    said: dict[str, Any] = {
        "model": room.model_name,
        "limits": room.limits,
        "state": room.engine.state(),
        "is_draining": room.is_draining,
        "latency": room.metrics.histograms(),
    }
    return json_response(said)


async def _openapi(http: HttpRequest) -> Response:
    return json_response(openapi(is_classifier=room_of(http).is_classifier))


async def _page(http: HttpRequest) -> Response:
    shown = page(is_classifier=room_of(http).is_classifier)
    return HTMLResponse(shown, headers=headers())


ROUTES = [
    ("/v1/completions", "POST", completions),
    ("/v1/chat/completions", "POST", chat_completions),
    ("/v1/embeddings", "POST", embeddings),
    ("/v1/classify", "POST", classify),
    ("/v1/models", "GET", _models),
    ("/v1/models/{model:path}", "GET", _model),
    ("/tokenize", "POST", tokenize),
    ("/detokenize", "POST", detokenize),
    ("/health", "GET", _health),
    ("/ready", "GET", _ready),
    ("/metrics", "GET", _metrics),
    ("/state", "GET", _state),
    ("/openapi.json", "GET", _openapi),
    ("/", "GET", _page),
]
