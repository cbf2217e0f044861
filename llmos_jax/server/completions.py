"""/v1/completions: go on from prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmos_jax.server import prepare
from llmos_jax.server.answers import Answer, Piece, Whole
from llmos_jax.server.door import body_of, caller_of, note, room_of
from llmos_jax.server.protocol import CompletionRequest, prompts_of
from llmos_jax.server.refusals import Refusal
from llmos_jax.server.replies import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Finish,
    PromptDetails,
    Usage,
    json_response,
)
from llmos_jax.server.room import Room
from llmos_jax.server.stream import stream, unless_gone
from llmos_jax.server.words import Said

MAX_TOKENS = 16
"""Of an answer, where the request does not say: OpenAI's default."""
LEAST_LOGPROB = -9999.0
"""JSON has no infinity; vLLM's stand-in."""


async def completions(http: HttpRequest) -> Response:
    """Answer POST /v1/completions."""
    room = room_of(http)
    body = await body_of(http, CompletionRequest)
    room.check_model(body.model)
    _check(body)
    n = body.n or 1
    count = max(body.best_of or n, n)
    asked = prompts_of(body.prompt, "prompt")
    prompts = await prepare.encode_prompts(room, asked, "prompt", room_for=1)
    answer_id = prepare.new_id("cmpl")
    ranks = count > n
    requests = await prepare.requests_of(
        room,
        body,
        caller_of(http),
        prompts,
        answer_id=answer_id,
        count=count,
        max_tokens=body.max_tokens or MAX_TOKENS,
        alternatives=0 if ranks and body.logprobs is None else body.logprobs,
        grammar=prepare.grammar_of(body),
    )
    with_usage = prepare.check_stream_options(body)
    answer = Answer(
        room,
        requests,
        stops=prepare.stops_of(body),
        n=count,
        bounds_unread=bool(body.stream),
    )
    note(http, answer)
    echoed = await _echoes(room, asked) if body.echo else [""] * len(asked)
    base = Completion(
        id=answer_id, created=int(time.time()), model=room.model_name, choices=[]
    )
    maker = _Maker(room, body, base, answer, echoed, n)
    if body.stream:
        return await stream(
            http,
            room,
            answer,
            opening=maker.opening(with_usage),
            chunks=lambda piece: maker.chunks(piece, with_usage),
            closing=lambda: maker.closing() if with_usage else (),
        )
    with answer:
        wholes = await unless_gone(http, answer.whole())
    return json_response(maker.whole(wholes, count))


def usage_of(answer: Answer) -> Usage:
    """Return the tokens of an answer, as OpenAI counts them."""
    prompt_tokens, answer_tokens, cached = answer.usage()
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=answer_tokens,
        total_tokens=prompt_tokens + answer_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
    )


def finish_of(piece: Piece | Whole) -> Finish | None:
    """Return a reason to end as OpenAI calls it."""
    if piece.reason is None:
        return None
    return {"stop": "stop", "length": "length"}.get(piece.reason, "abort")  # type: ignore[return-value]


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(float(logprob), LEAST_LOGPROB)


class _Maker:
    """Makes the bodies of one request's answer."""

    def __init__(
        self,
        room: Room,
        body: CompletionRequest,
        base: Completion,
        answer: Answer,
        echoed: Sequence[str],
        n: int,
    ):
        self._room = room
        self._body = body
        self._base = base
        self._answer = answer
        self._echoed = echoed
        self._n = n

    def opening(self, with_usage: bool) -> list[Completion]:
        """The prompts again, if they are wanted."""
        if not self._body.echo:
            return []
        return [
            self._chunk(
                [CompletionChoice(index=index, text=self._echoed[index // self._n])],
                with_usage,
            )
            for index in range(len(self._answer.choices))
        ]

    def chunks(self, piece: Piece, with_usage: bool) -> Iterable[Completion]:
        """What to send of a piece."""
        if not (piece.text or piece.said or piece.reason):
            return
        choice = CompletionChoice(
            index=piece.index,
            text=piece.text,
            logprobs=self._logprobs(piece.said),
            finish_reason=finish_of(piece),
        )
        yield self._chunk([choice], with_usage)

    def closing(self) -> list[Completion]:
        """The usage."""
        chunk = self._chunk([], False)
        chunk.usage = usage_of(self._answer)
        return [chunk]

    def whole(self, wholes: Sequence[Whole], count: int) -> Completion:
        """Everything at once: the n likeliest of `count` choices of each prompt."""
        choices = []
        for index, echo in enumerate(self._echoed):
            ours = list(wholes[index * count : (index + 1) * count])
            if count > self._n:
                ours.sort(key=_mean_logprob, reverse=True)
            choices += [
                CompletionChoice(
                    index=index * self._n + rank,
                    text=echo + one.text,
                    logprobs=self._logprobs(one.said),
                    finish_reason=finish_of(one),
                )
                for rank, one in enumerate(ours[: self._n])
            ]
        base = self._base
        return Completion(
            id=base.id,
            created=base.created,
            model=base.model,
            choices=choices,
            usage=usage_of(self._answer),
        )

    def _chunk(self, choices: list[CompletionChoice], with_usage: bool) -> Completion:
        base = self._base
        chunk = Completion(
            id=base.id, created=base.created, model=base.model, choices=choices
        )
        if with_usage:
            chunk.usage = None
        return chunk

    def _logprobs(self, said: Sequence[Said]) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        names = self._room.names
        found = CompletionLogprobs(
            text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[]
        )
        for one in said:
            if one.likelihood is None:
                continue
            name, logprob = names[one.token], finite(one.likelihood.logprob)
            found.text_offset.append(one.begin)
            found.token_logprobs.append(logprob)
            found.tokens.append(name)
            top = {names[token]: finite(value) for token, value in one.likelihood.top}
            found.top_logprobs.append({**top, name: logprob})
        return found


def _check(body: CompletionRequest) -> None:
    n = body.n or 1
    if body.suffix:
        raise _bad("suffix", "text cannot be filled in between; leave `suffix` out.")
    if body.echo and body.logprobs is not None:
        raise _bad(
            "logprobs",
            "the prompt's log-probabilities are not told; use `echo` or `logprobs`.",
        )
    if body.best_of is not None and body.best_of < n:
        raise _bad("best_of", f"`best_of` is {body.best_of}, less than `n` = {n}.")
    if body.stream and (body.best_of or n) > n:
        raise _bad(
            "best_of", "the best answer is known at the end; it cannot be streamed."
        )


def _bad(param: str, message: str) -> Refusal:
    return Refusal(400, message, param=param)


async def _echoes(room: Room, prompts: Sequence[str | list[int]]) -> list[str]:
    def decode() -> list[str]:
        return [
            one if isinstance(one, str) else room.tokenizer.decode(one)
            for one in prompts
        ]

    return await asyncio.to_thread(decode)


def _mean_logprob(whole: Whole) -> float:
    values = [one.likelihood.logprob for one in whole.said if one.likelihood]
    return sum(values) / len(values) if values else LEAST_LOGPROB
