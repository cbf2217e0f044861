"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import asyncio

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmos_jax.errors import ConfigError
from llmos_jax.server import prepare
from llmos_jax.server.conversation import conversation_ids
from llmos_jax.server.door import body_of, room_of
from llmos_jax.server.protocol import DetokenizeRequest, TokenizeRequest
from llmos_jax.server.refusals import Refusal, refusal_of
from llmos_jax.server.replies import Detokenized, Tokenized, json_response
from llmos_jax.server.room import Room


async def tokenize(http: HttpRequest) -> Response:
    """Answer POST /tokenize: the ids of a prompt, or of messages."""
    room = room_of(http)
    body = await body_of(http, TokenizeRequest)
    room.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "give either `prompt` or `messages`.", param="prompt")
    try:
        ids = await asyncio.to_thread(_ids, room, body)
    except ConfigError as problem:
        raise refusal_of(problem) from None
    return json_response(
        Tokenized(
            tokens=ids.tolist(), count=ids.size, max_model_len=room.limits.context
        )
    )


async def detokenize(http: HttpRequest) -> Response:
    """Answer POST /detokenize: the text of ids."""
    room = room_of(http)
    body = await body_of(http, DetokenizeRequest)
    room.check_model(body.model)
    prepare.check_ids(room, body.tokens, "tokens")
    text = await asyncio.to_thread(room.tokenizer.decode, body.tokens)
    return json_response(Detokenized(prompt=text))


def _ids(room: Room, body: TokenizeRequest) -> np.ndarray:
    if body.prompt is None:
        return conversation_ids(room.tokenizer, body)
    if body.add_special_tokens is False:
        return room.tokenizer.encode(body.prompt)
    return room.tokenizer.encode_prompt(body.prompt)
