"""The way in and out of every request: key, id, errors, metrics and one line of log."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmos_jax.errors import LlmosError
from llmos_jax.server.answers import Answer
from llmos_jax.server.prepare import Caller, read_deadline
from llmos_jax.server.protocol import read
from llmos_jax.server.refusals import Refusal, refusal_of, unavailable
from llmos_jax.server.room import Room
from llmos_jax.server.security import OPEN_PATHS, Keys
from llmos_jax.server.stream import Gone
from llmos_jax.telemetry import log

HUNG_UP = 499
"""Status in logs and metrics where nobody waited for one: nginx's number."""
LONGEST_ID = 128
MODEL_PATH = "/v1/models/"
METHODS = frozenset("GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT".split())
_VISIT = "llmos.visit"

Body = TypeVar("Body")


@dataclass(slots=True, kw_only=True)
class Visit:
    """One HTTP request on its way through."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    caller: Caller = field(default_factory=Caller)
    status: int = 0
    is_started: bool = False
    answers: list[Answer] = field(default_factory=list)


class Door:
    """An ASGI app around the routes: nothing gets past it without an answer."""

    def __init__(self, routes: ASGIApp, paths: Iterable[str], room: Room):
        """`paths` are those of `routes`."""
        self.room = room
        self._routes = routes
        self._paths = frozenset(paths)
        self._keys = Keys(room.options.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request in, and see it out."""
        if scope["type"] != "http":
            await self._routes(scope, receive, send)
            return
        headers = Headers(scope=scope)
        visit = Visit(request_id=_request_id(headers.get("x-request-id")))
        scope.update({_VISIT: visit, "app": self})

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status, visit.is_started = message["status"], True
                MutableHeaders(scope=message)["x-request-id"] = visit.request_id
            await send(message)

        is_open = scope["path"] in OPEN_PATHS
        self.room.open_requests += not is_open
        try:
            if not is_open:
                self._admit(visit, headers)
            await self._routes(scope, receive, reply)
        except (Gone, ClientDisconnect):
            visit.status = HUNG_UP
        except Exception as problem:
            refusal = _refusal_for(problem)
            if visit.is_started:
                visit.status = refusal.status
            else:
                self._count(refusal)
                await refusal.response()(scope, receive, reply)
        finally:
            self.room.open_requests -= not is_open
            self._record(scope, visit, is_open)

    def _admit(self, visit: Visit, headers: Headers) -> None:
        tenant = self._keys.tenant_of(headers.get("authorization"))
        if self.room.is_draining:
            raise unavailable()
        deadline_s = read_deadline(headers.get("x-llmos-deadline-s"))
        visit.caller = Caller(tenant=tenant, deadline_s=deadline_s, came=visit.started)

    def _count(self, refusal: Refusal) -> None:
        error = refusal.body.error
        self.room.metrics.rejected(error.code or error.type)

    def _record(self, scope: Scope, visit: Visit, is_open: bool) -> None:
        seconds = time.monotonic() - visit.started
        status = visit.status or HUNG_UP
        path, method = _labels(scope["path"], scope["method"], self._paths)
        self.room.metrics.http(path, method, status, seconds)
        if is_open:
            return
        self.room.answered += 1
        line = {
            "time": round(time.time(), 3),
            "id": visit.request_id,
            "method": method,
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
            "tenant": visit.caller.tenant,
        }
        if visit.answers:
            line |= _tokens_of(visit.answers)
        log(json.dumps(line))
        if self.room.traces is not None:
            attributes = _attributes(line, self.room.model_name)
            headers = Headers(scope=scope)
            self.room.traces.ended(method, path, headers, seconds, attributes)


def _tokens_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """What a log line says of the engine's part."""
    prompt, generated, cached = map(sum, zip(*(one.usage() for one in answers)))
    return {
        "prompt_tokens": prompt,
        "generated_tokens": generated,
        "cached_tokens": cached,
        "first_token_s": answers[0].first_token_s(),
        "finish": [choice.reason for one in answers for choice in one.choices],
    }


def _attributes(line: dict[str, Any], model: str) -> dict[str, Any]:
    """What a span says of a request, from its line in the log."""
    names = {
        "id": "gen_ai.request.id",
        "status": "http.response.status_code",
        "prompt_tokens": "gen_ai.usage.input_tokens",
        "generated_tokens": "gen_ai.usage.output_tokens",
        "first_token_s": "gen_ai.server.time_to_first_token",
        "finish": "gen_ai.response.finish_reasons",
    }
    found = {name: line[key] for key, name in names.items() if line.get(key)}
    if "finish" in line:  # who hung up has none
        found[names["finish"]] = [str(one) for one in line["finish"] if one]
    return {"gen_ai.request.model": model, **found}


def room_of(http: HttpRequest) -> Room:
    """Return the room that a request came into."""
    room: Room = http.scope["app"].room
    return room


def caller_of(http: HttpRequest) -> Caller:
    """Return who asks."""
    caller: Caller = http.scope[_VISIT].caller
    return caller


def note(http: HttpRequest, answer: Answer) -> None:
    """Keep an answer of a request for the log."""
    http.scope[_VISIT].answers.append(answer)


async def body_of(http: HttpRequest, shape: type[Body]) -> Body:
    """Return the body of a request.

    Raises:
        Refusal: it is no JSON (415, 400), not of this shape (400), too large (413) or
            too slow (408).
    """
    options = room_of(http).options
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            415,
            f"the content-type is {kind or 'missing'!r}; it must be application/json.",
        )
    most = options.max_body_bytes
    text = bytearray()
    try:
        async with asyncio.timeout(options.stall_s):
            async for part in http.stream():
                text += part
                if len(text) > most:
                    raise Refusal(
                        413, f"the body has more than {most} bytes. Send less at once."
                    )
    except TimeoutError:
        raise Refusal(
            408, f"the body did not come within {options.stall_s:g} s."
        ) from None
    return await asyncio.to_thread(read, bytes(text), shape)


def _refusal_for(problem: Exception) -> Refusal:
    if isinstance(problem, Refusal):
        return problem
    if isinstance(problem, LlmosError):
        return refusal_of(problem)
    if isinstance(problem, HTTPException):
        what = {404: "there is nothing here; GET /openapi.json lists what is"}
        return Refusal(
            problem.status_code,
            f"{what.get(problem.status_code, problem.detail)}.",
            headers=problem.headers,
        )
    log("".join(traceback.format_exception(problem)))
    return Refusal(500, "a fault of the server's own; its log has the details.")


def _request_id(given: str | None) -> str:
    if given and len(given) <= LONGEST_ID and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex


def _labels(path: str, method: str, known: frozenset[str]) -> tuple[str, str]:
    """A path and a method for logs and metrics: strangers cannot make up new ones."""
    if path.startswith(MODEL_PATH):
        path = MODEL_PATH + "{model}"
    elif path not in known:
        path = "other"
    return path, method if method in METHODS else "other"
