"""/v1/embeddings: a vector for each text."""

from __future__ import annotations

import base64

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmos_jax.server import prepare
from llmos_jax.server.answers import Answer, Whole
from llmos_jax.server.door import body_of, caller_of, note, room_of
from llmos_jax.server.protocol import EmbeddingRequest, prompts_of
from llmos_jax.server.refusals import Refusal
from llmos_jax.server.replies import (
    Embedding,
    Embeddings,
    EmbeddingUsage,
    json_response,
)
from llmos_jax.server.stream import unless_gone


async def embeddings(http: HttpRequest) -> Response:
    """Answer POST /v1/embeddings: means of final features, of length 1."""
    room = room_of(http)
    body = await body_of(http, EmbeddingRequest)
    room.check_model(body.model)
    caller = caller_of(http)
    asked = prompts_of(body.input, "input")
    prompts = await prepare.encode_prompts(room, asked, "input", room_for=0)
    answer_id = prepare.new_id("embd")
    requests = prepare.whole_requests(prompts, answer_id, caller, body, "embedding")
    vectors = []
    # In turns, so that a long list neither overflows the queue nor fills it.
    for begin in range(0, len(requests), room.limits.seats):
        answer = Answer(room, requests[begin : begin + room.limits.seats])
        note(http, answer)
        with answer:
            vectors += [_unit(one) for one in await unless_gone(http, answer.whole())]
    _check_size(body.dimensions, vectors[0].size)
    tokens = sum(prompt.size for prompt in prompts)
    return json_response(
        Embeddings(
            model=room.model_name,
            data=[
                Embedding(index=index, embedding=_coded(one, body.encoding_format))
                for index, one in enumerate(vectors)
            ],
            usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
        )
    )


def _unit(whole: Whole) -> np.ndarray:
    """float32 [D] of length 1."""
    if whole.embedding is None:
        raise Refusal(500, "the engine gave no embedding.", code="request_failed")
    vector = np.asarray(whole.embedding, np.float32)
    length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if length > 0 else vector


def _check_size(dimensions: int | None, size: int) -> None:
    if dimensions is not None and dimensions != size:
        raise Refusal(
            400,
            f"`dimensions` is {dimensions}; this model's embeddings have {size}, and "
            "cannot be cut. Leave it out.",
            param="dimensions",
        )


def _coded(vector: np.ndarray, form: str | None) -> list[float] | str:
    if form != "base64":
        return [float(one) for one in vector]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
