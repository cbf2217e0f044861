"""Turn the body of a request into what the engine is asked."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from llmos_jax.data import prompt_ids
from llmos_jax.errors import ConfigError
from llmos_jax.scheduling import Grammar, Request, Sampling
from llmos_jax.server.grammar import Kind
from llmos_jax.server.protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    Generate,
    StructuredOutputs,
)
from llmos_jax.server.refusals import Refusal, refusal_of, too_long
from llmos_jax.server.room import Room

LONGEST_DEADLINE_S = 86400.0

Shape = tuple[Kind, str]
"""What an answer must look like: what `Grammars.compile` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, and since when, as the door found out."""

    tenant: str = ""
    """Of the API key; empty: there are none."""
    deadline_s: float | None = None
    came: float = field(default_factory=time.monotonic)
    """In seconds of time.monotonic."""


def new_id(kind: str) -> str:
    """Return a name that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def whole_requests(
    prompts: Sequence[np.ndarray],
    answer_id: str,
    caller: Caller,
    body: EmbeddingRequest | ClassifyRequest,
    wants: Literal["embedding", "classes"],
) -> list[Request]:
    """Return a request for each prompt of which no token is to follow."""
    return [
        Request(
            id=f"{answer_id}-{index}",
            prompt=prompt,
            max_tokens=0,
            tenant=caller.tenant or body.user or "",
            priority=body.priority or 0,
            deadline=deadline_of(caller, body.timeout),
            wants=wants,
        )
        for index, prompt in enumerate(prompts)
    ]


def deadline_of(caller: Caller, timeout: float | None) -> float | None:
    """Return when a request is given up, in seconds of time.monotonic."""
    given = [one for one in (caller.deadline_s, timeout) if one is not None]
    return caller.came + min(given) if given else None


def read_deadline(text: str | None) -> float | None:
    """Return the seconds of an x-llmos-deadline-s header, or raise Refusal."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_DEADLINE_S:
        raise Refusal(
            400,
            f"x-llmos-deadline-s is {text!r}; it must be a number of seconds in "
            f"(0, {LONGEST_DEADLINE_S:.0f}].",
            param="x-llmos-deadline-s",
        )
    return seconds


async def encode_prompts(
    room: Room, prompts: Sequence[str | list[int]], param: str, *, room_for: int
) -> list[np.ndarray]:
    """Return the ids of each prompt, int32 [T], T >= 1; texts are cut off the loop.

    Args:
        room: where this happens.
        prompts: texts or ids.
        param: the field they came in.
        room_for: tokens that the context must have left.
    """

    def encode() -> list[np.ndarray]:
        return [
            prompt_ids(room.tokenizer, one).astype(np.int32)
            if isinstance(one, str)
            else np.asarray(one, np.int32)
            for one in prompts
        ]

    try:
        found = await asyncio.to_thread(encode)
    except ConfigError as problem:
        raise refusal_of(problem) from None
    for one, ids in zip(prompts, found):
        if not isinstance(one, str):
            check_ids(room, ids, param)
        check_length(room, ids, room_for=room_for)
    return found


def check_ids(room: Room, ids: Sequence[int] | np.ndarray, param: str) -> None:
    """Raise Refusal (400) for ids that the model does not have."""
    most = max((int(one) for one in ids), default=0)
    if most >= room.limits.vocab_size:
        raise Refusal(
            400,
            f"`{param}` has the token {most}; this model's are in "
            f"[0, {room.limits.vocab_size}).",
            param=param,
        )


def check_length(room: Room, ids: np.ndarray, *, room_for: int) -> None:
    """Raise Refusal (400) for a prompt that leaves no room for so many tokens."""
    if ids.size + room_for > room.limits.context:
        raise too_long(ids.size, room.limits.context)


def sampling_of(body: Generate) -> Sampling:
    """Return how to choose tokens; Refusal names a value that is out of range."""
    biases = []
    for token, bias in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 11):
            raise Refusal(
                400,
                f"`logit_bias` has the key {token!r}; keys are ids of tokens.",
                param="logit_bias",
            )
        biases.append((int(token), float(bias)))
    seed = secrets.randbits(62) if body.seed is None else body.seed
    try:
        return Sampling(
            temperature=_or(body.temperature, 1.0),
            top_k=max(_or(body.top_k, 0), 0),
            top_p=_or(body.top_p, 1.0),
            min_p=_or(body.min_p, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            logit_bias=tuple(biases),
            seed=seed,
        ).check()
    except ConfigError as problem:
        raise refusal_of(problem) from None


def stops_of(body: Generate) -> tuple[str, ...]:
    """Return the stop strings."""
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


async def requests_of(
    room: Room,
    body: Generate,
    caller: Caller,
    prompts: Sequence[np.ndarray],
    *,
    answer_id: str,
    count: int,
    max_tokens: int | None,
    alternatives: int | None,
    grammar: Shape | None,
) -> list[Request]:
    """Return `count` requests for each prompt, in this order.

    Args:
        room: where this happens.
        body: what was asked.
        caller: who asks.
        prompts: int32 [T] each.
        answer_id: what the names of the requests begin with.
        count: choices of each prompt; choice i draws with the seed plus i.
        max_tokens: of each choice; None: the rest of the context.
        alternatives: as in Request.
        grammar: (kind, text) that each choice follows.
    """
    sampling = sampling_of(body)
    check_ids(room, [token for token, _ in sampling.logit_bias], "logit_bias")
    stop_ids = frozenset(body.stop_token_ids or ())
    check_ids(room, sorted(stop_ids), "stop_token_ids")
    if not body.ignore_eos:
        stop_ids |= room.tokenizer.stop_ids
    total = len(prompts) * count
    grammars: list[Grammar | None] = [None] * total
    if grammar is not None:
        grammars = await _compile(room, grammar, total)
    base = Request(
        id="",
        prompt=prompts[0],
        max_tokens=1,
        stop_ids=stop_ids,
        alternatives=alternatives,
        tenant=caller.tenant or body.user or "",
        priority=_or(body.priority, 0),
        deadline=deadline_of(caller, body.timeout),
    )
    found = []
    for index in range(total):
        prompt = prompts[index // count]
        left = room.limits.context - prompt.size
        found.append(
            replace(
                base,
                id=f"{answer_id}-{index}",
                prompt=prompt,
                max_tokens=left if max_tokens is None else min(max_tokens, left),
                sampling=replace(sampling, seed=sampling.seed + index % count),
                grammar=grammars[index],
            )
        )
    return found


def grammar_of(body: Generate) -> Shape | None:
    """Return what the answer must follow, (kind, text), or None; Refusal where two
    fields say something."""
    found: list[Shape] = [
        *_of_format(body),
        *_of_structured(body.structured_outputs or StructuredOutputs()),
    ]
    if body.guided_json is not None:
        found.append(("json_schema", _text(body.guided_json)))
    if body.guided_regex is not None:
        found.append(("regex", body.guided_regex))
    if body.guided_grammar is not None:
        found.append(("lark", body.guided_grammar))
    if len(found) > 1:
        raise Refusal(
            400,
            "more than one field says what the answer must look like "
            "(response_format, structured_outputs, guided_*); use one.",
            param="response_format",
        )
    return found[0] if found else None


def check_stream_options(body: Generate) -> bool:
    """Return whether a stream ends with its usage."""
    if body.stream_options is not None and not body.stream:
        raise Refusal(
            400,
            "`stream_options` is for streams; set `stream` as well.",
            param="stream_options",
        )
    return bool(body.stream_options and body.stream_options.include_usage)


def _of_format(body: Generate) -> list[Shape]:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [("json_object", "")]
    schema = None if wanted.json_schema is None else wanted.json_schema.schema_
    if schema is None:
        raise Refusal(
            400,
            "`response_format` of type json_schema needs `json_schema.schema`.",
            param="response_format",
        )
    return [("json_schema", _text(schema))]


def _of_structured(wanted: StructuredOutputs) -> list[Shape]:
    found: list[Shape] = []
    if wanted.json is not None:
        found.append(("json_schema", _text(wanted.json)))
    if wanted.regex is not None:
        found.append(("regex", wanted.regex))
    if wanted.choice is not None:
        texts = " | ".join(json.dumps(one) for one in wanted.choice)
        found.append(("lark", f"start: {texts}"))
    if wanted.grammar is not None:
        found.append(("lark", wanted.grammar))
    if wanted.json_object:
        found.append(("json_object", ""))
    return found


async def _compile(room: Room, grammar: Shape, count: int) -> list[Grammar | None]:
    def compile_all() -> list[Grammar | None]:
        return [room.grammars.compile(*grammar) for _ in range(count)]

    try:
        return await asyncio.to_thread(compile_all)
    except ConfigError as problem:
        raise Refusal(400, str(problem), param="response_format") from None


def _text(schema: str | dict[str, Any]) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
