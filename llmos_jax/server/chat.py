"""/v1/chat/completions: the next turn of a conversation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmos_jax.errors import ConfigError
from llmos_jax.server import prepare
from llmos_jax.server.answers import Answer, Piece, Whole
from llmos_jax.server.calls import CallStream, forced_call, message_of, style_of
from llmos_jax.server.completions import finish_of, finite, usage_of
from llmos_jax.server.conversation import conversation_ids, tools_of
from llmos_jax.server.door import body_of, caller_of, note, room_of
from llmos_jax.server.protocol import ChatRequest
from llmos_jax.server.refusals import Refusal, refusal_of
from llmos_jax.server.replies import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    Finish,
    TokenLogprob,
    TopLogprob,
    json_response,
)
from llmos_jax.server.room import Room
from llmos_jax.server.stream import stream, unless_gone
from llmos_jax.server.tools import ToolStyle
from llmos_jax.server.words import Said


async def chat_completions(http: HttpRequest) -> Response:
    """Answer POST /v1/chat/completions."""
    room = room_of(http)
    body = await body_of(http, ChatRequest)
    room.check_model(body.model)
    _check(body)
    style = style_of(room, body)
    prompt = await _prompt(room, body)
    answer_id = prepare.new_id("chatcmpl")
    requests = await prepare.requests_of(
        room,
        body,
        caller_of(http),
        [prompt],
        answer_id=answer_id,
        count=body.n or 1,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        alternatives=body.top_logprobs or 0 if body.logprobs else None,
        grammar=await _grammar(room, body, style),
    )
    with_usage = prepare.check_stream_options(body)
    answer = Answer(
        room,
        requests,
        stops=prepare.stops_of(body),
        n=body.n or 1,
        bounds_unread=bool(body.stream),
        shown=room.tool_marks if style is not None else None,
    )
    note(http, answer)
    if body.stream:
        chunks = _Chunks(room, answer, answer_id, style, body, with_usage)
        return await stream(
            http,
            room,
            answer,
            opening=chunks.opening(),
            chunks=chunks.chunks,
            closing=chunks.closing,
        )
    with answer:
        wholes = await unless_gone(http, answer.whole())
    choices = [
        _choice(room, index, one, style, body) for index, one in enumerate(wholes)
    ]
    return json_response(
        Chat(
            id=answer_id,
            created=int(time.time()),
            model=room.model_name,
            choices=choices,
            usage=usage_of(answer),
        )
    )


class _Chunks:
    """Makes the chunks of one streamed answer."""

    def __init__(
        self,
        room: Room,
        answer: Answer,
        answer_id: str,
        style: ToolStyle | None,
        body: ChatRequest,
        with_usage: bool,
    ):
        self._room = room
        self._answer = answer
        self._id = answer_id
        self._created = int(time.time())
        self._body = body
        self._with_usage = with_usage
        count = len(answer.choices)
        self._calls = [
            None if style is None else CallStream(style, body) for _ in range(count)
        ]

    def opening(self) -> list[ChatChunk]:
        """Who speaks."""
        first = Delta(role="assistant", content="")
        return [
            self._chunk(ChunkChoice(index=index, delta=first))
            for index in range(len(self._answer.choices))
        ]

    def chunks(self, piece: Piece) -> Iterable[ChatChunk]:
        """What to send of a piece."""
        calls = self._calls[piece.index]
        if calls is None:
            deltas = [Delta(content=piece.text)] if piece.text else []
        else:
            deltas = calls.deltas(piece.text, ended=piece.reason is not None)
        logprobs = _logprobs(self._room, self._body, piece.said)
        if not deltas and piece.said and logprobs is not None:
            deltas = [Delta(content="")]
        for delta in deltas:
            choice = ChunkChoice(index=piece.index, delta=delta, logprobs=logprobs)
            logprobs = None
            yield self._chunk(choice)
        finish = finish_of(piece)
        if finish is not None:
            has_calls = calls is not None and calls.num_calls > 0
            finish = _with_calls(finish, has_calls)
            yield self._chunk(
                ChunkChoice(index=piece.index, delta=Delta(), finish_reason=finish)
            )

    def closing(self) -> list[ChatChunk]:
        """The usage, if it is wanted."""
        if not self._with_usage:
            return []
        chunk = self._chunk()
        chunk.usage = usage_of(self._answer)
        return [chunk]

    def _chunk(self, *choices: ChunkChoice) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._room.model_name,
            choices=list(choices),
            usage=None if self._with_usage else UNSET,
        )


def _choice(
    room: Room, index: int, whole: Whole, style: ToolStyle | None, body: ChatRequest
) -> ChatChoice:
    message = message_of(whole.text, style, body)
    return ChatChoice(
        index=index,
        message=message,
        logprobs=_logprobs(room, body, whole.said),
        finish_reason=_with_calls(
            finish_of(whole) or "stop", message.tool_calls is not UNSET
        ),
    )


def _with_calls(finish: Finish, has_calls: bool) -> Finish:
    return "tool_calls" if has_calls and finish == "stop" else finish


def _logprobs(
    room: Room, body: ChatRequest, said: Sequence[Said]
) -> ChatLogprobs | None:
    if not body.logprobs:
        return None
    names = room.names
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=names[one.token],
                logprob=finite(one.likelihood.logprob),
                bytes=names.bytes(one.token),
                top_logprobs=[
                    TopLogprob(
                        token=names[token],
                        logprob=finite(logprob),
                        bytes=names.bytes(token),
                    )
                    for token, logprob in one.likelihood.top
                ],
            )
            for one in said
            if one.likelihood is not None
        ]
    )


def _check(body: ChatRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise Refusal(
            400,
            "`top_logprobs` needs `logprobs` to be true.",
            param="top_logprobs",
        )


async def _grammar(
    room: Room, body: ChatRequest, style: ToolStyle | None
) -> prepare.Shape | None:
    wanted = prepare.grammar_of(body)
    forced = forced_call(body)
    if style is None or forced is None:
        return wanted
    if wanted is not None:
        raise Refusal(
            400,
            "the answer cannot be a tool call and follow `response_format` at once.",
            param="tool_choice",
        )
    choice, is_parallel = forced

    def write() -> prepare.Shape:
        marks = room.grammars.marks
        return style.grammar(tools_of(body.tools), choice, is_parallel, marks)

    try:
        return await asyncio.to_thread(write)
    except ConfigError as problem:
        raise refusal_of(problem) from None


async def _prompt(room: Room, body: ChatRequest) -> np.ndarray:
    try:
        ids = await asyncio.to_thread(conversation_ids, room.tokenizer, body)
    except ConfigError as problem:
        raise refusal_of(problem) from None
    prepare.check_length(room, ids, room_for=1)
    return ids
