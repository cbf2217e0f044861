"""Errors as OpenAI's API shows them: a status, and {"error": {message, type, ...}}."""

from __future__ import annotations

import math
from collections.abc import Mapping

from starlette.responses import Response

from llmos_jax.errors import ConfigError, LlmosError, Overloaded, Stopping
from llmos_jax.server.replies import ErrorBody, ErrorDetail, json_response

RETRY_AFTER_S = 10
"""When to ask again where nobody knows better: a judgement; another copy of the server
takes about so long to be put in front."""

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""`type` of each status that is sent."""


class Refusal(Exception):
    """A request that is not answered, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(
            error=ErrorDetail(
                message=message,
                type=KINDS.get(status, "invalid_request_error"),
                param=param,
                code=code,
            )
        )
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """Return it as an answer."""
        return json_response(self.body, self.status, self.headers)


def refusal_of(problem: LlmosError) -> Refusal:
    """Return the answer to a request that caused, or met, an error of ours."""
    if isinstance(problem, Overloaded):
        return Refusal(
            429,
            str(problem),
            code="overloaded",
            headers=_retry(problem.retry_after_s),
        )
    if isinstance(problem, Stopping):
        return unavailable(str(problem))
    if isinstance(problem, ConfigError):
        return Refusal(400, str(problem), param=_param(str(problem)))
    return Refusal(503, str(problem), code="engine", headers=_retry(RETRY_AFTER_S))


def unavailable(message: str = "the server is stopping and takes no more.") -> Refusal:
    """Return the answer of a server that goes down, or is not up yet."""
    headers = _retry(RETRY_AFTER_S)
    return Refusal(503, message, code="unavailable", headers=headers)


def too_long(tokens: int, context: int) -> Refusal:
    """Return the answer to a prompt that leaves no room for an answer."""
    return Refusal(
        400,
        f"the prompt has {tokens} tokens, and this model's maximum context length is "
        f"{context} tokens, of which the answer needs at least one. Shorten the "
        "prompt.",
        param="prompt",
        code="context_length_exceeded",
    )


def _retry(seconds: float) -> dict[str, str]:
    """Whole seconds, as the header wants them; a minute where the guess is none."""
    whole = math.ceil(seconds) if math.isfinite(seconds) else 60
    return {"retry-after": str(min(max(whole, 1), 3600))}


def _param(message: str) -> str | None:
    """The field that a message of Sampling.check begins with."""
    words = message.split(maxsplit=2)
    is_named = len(words) > 1 and words[1] in ("is", "names", "of")
    return words[0].strip("`") if is_named and words[0].isidentifier() else None
