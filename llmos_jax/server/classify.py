"""/v1/classify: the class of each text, as vLLM's API has it.

Beyond vLLM's fields an answer has `labels`, the names in the order of `probs`, and with
`top` the likeliest classes of each text by name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmos_jax.data import Tokenizer
from llmos_jax.errors import DataError
from llmos_jax.scheduling import Request
from llmos_jax.server import prepare
from llmos_jax.server.answers import Answer, Whole
from llmos_jax.server.door import body_of, caller_of, note, room_of
from llmos_jax.server.protocol import ClassifyRequest, prompts_of
from llmos_jax.server.refusals import Refusal
from llmos_jax.server.replies import (
    ClassifyUsage,
    ClassProbability,
    TextClass,
    TextClasses,
    json_response,
)
from llmos_jax.server.room import Room
from llmos_jax.server.stream import unless_gone


async def classify(http: HttpRequest) -> Response:
    """Answer POST /v1/classify."""
    room = room_of(http)
    body = await body_of(http, ClassifyRequest)
    room.check_model(body.model)
    prompts = await _prompts(room, body)
    caller, answer_id = caller_of(http), prepare.new_id("classify")
    requests = prepare.whole_requests(prompts, answer_id, caller, body, "classes")
    logits = await _logits(http, room, requests)
    tokens = sum(prompt.size for prompt in prompts)
    return json_response(
        TextClasses(
            id=answer_id,
            created=int(time.time()),
            model=room.model_name,
            labels=list(room.limits.labels),
            data=[
                _class(index, one, room.limits.labels, body)
                for index, one in enumerate(logits)
            ],
            usage=ClassifyUsage(prompt_tokens=tokens, total_tokens=tokens),
        )
    )


async def _logits(
    http: HttpRequest, room: Room, requests: Sequence[Request]
) -> list[np.ndarray]:
    """float32 [C] of each text, in order."""
    # Texts of like lengths share batches. In turns, so that a long list neither
    # overflows the queue nor fills it; two batches at a time keep the device busy.
    order = sorted(range(len(requests)), key=lambda index: requests[index].prompt.size)
    seats = room.limits.seats
    at_once = max(seats, min(2 * seats, room.limits.max_queue // 4))
    found: dict[int, np.ndarray] = {}
    for begin in range(0, len(order), at_once):
        turn = order[begin : begin + at_once]
        answer = Answer(room, [requests[index] for index in turn])
        note(http, answer)
        with answer:
            wholes = await unless_gone(http, answer.whole())
        found.update(zip(turn, map(_known, wholes), strict=True))
    return [found[index] for index in range(len(requests))]


async def _prompts(room: Room, body: ClassifyRequest) -> list[np.ndarray]:
    """Ids of each text, cut as the request asks for."""
    asked = prompts_of(body.input, "input")
    for one in asked:
        if not isinstance(one, str):
            prepare.check_ids(room, one, "input")
    try:
        prompts = await asyncio.to_thread(_encoded, room.tokenizer, asked)
    except DataError as problem:
        raise Refusal(400, str(problem), param="input") from None
    most = _most_tokens(room, body.truncate_prompt_tokens)
    if most is None:
        _check_lengths(room, prompts)
        return prompts
    if body.truncation_side == "left":
        return [prompt[-most:] for prompt in prompts]
    return [prompt[:most] for prompt in prompts]


def _encoded(
    tokenizer: Tokenizer, asked: Sequence[str | list[int]]
) -> list[np.ndarray]:
    """int32 [T], T >= 1, of each text, as in training and scoring: with the mark that
    the model wants before a text, if it wants one; nothing at all is one token 0."""
    texts = iter(tokenizer.encode_batch([one for one in asked if isinstance(one, str)]))
    begin = [tokenizer.begin_id] if tokenizer.marks.adds_bos else []
    found = []
    for one in asked:
        ids = [*begin, *next(texts).tolist()] if isinstance(one, str) else one
        found.append(np.asarray(ids or [0], np.int32))
    return found


def _most_tokens(room: Room, asked: int | None) -> int | None:
    """Tokens that texts are cut to; None: they are not."""
    context = room.limits.context
    if asked == 0 or (asked is not None and asked > context):
        raise Refusal(
            400,
            f"`truncate_prompt_tokens` is {asked}; it must be -1 (this model's "
            f"context, {context}) or 1 to {context}.",
            param="truncate_prompt_tokens",
        )
    return context if asked == -1 else asked


def _check_lengths(room: Room, prompts: Sequence[np.ndarray]) -> None:
    context = room.limits.context
    for index, prompt in enumerate(prompts):
        if prompt.size > context:
            raise Refusal(
                400,
                f"text {index} of `input` has {prompt.size} tokens; this model "
                f"classifies texts of up to {context}. Shorten it, or set "
                "`truncate_prompt_tokens` to -1: what is beyond is then cut off.",
                param="input",
                code="context_length_exceeded",
            )


def _known(whole: Whole) -> np.ndarray:
    if whole.class_logits is None:
        raise Refusal(500, "the engine gave no classes.", code="request_failed")
    return whole.class_logits


def _class(
    index: int, logits: np.ndarray, labels: Sequence[str], body: ClassifyRequest
) -> TextClass:
    values = logits.astype(np.float64)
    if body.use_activation is not False:
        values = np.exp(values - values.max())
        values /= values.sum()
    found = TextClass(
        index=index,
        label=labels[int(values.argmax())],
        probs=values.tolist(),
        num_classes=len(labels),
    )
    if body.top is not None:
        likeliest = np.argsort(-values, kind="stable")[: body.top]
        found.top = [
            ClassProbability(label=labels[one], prob=float(values[one]))
            for one in likeliest
        ]
    return found
