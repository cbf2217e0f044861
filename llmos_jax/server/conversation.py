"""Turn messages, as OpenAI writes them, into the ids of a prompt."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from llmos_jax.data import Tokenizer, render_chat
from llmos_jax.errors import DataError
from llmos_jax.server.protocol import (
    ChatRequest,
    ContentPart,
    Message,
    TokenizeRequest,
    Tool,
)
from llmos_jax.server.refusals import Refusal

_TAKEN = frozenset(
    "tokenizer messages template tools documents add_generation_prompt self".split()
)


def conversation_ids(
    tokenizer: Tokenizer, body: ChatRequest | TokenizeRequest
) -> np.ndarray:
    """Return the ids to which the model adds its answer, int32 [T].

    Raises:
        Refusal: messages that the model cannot read.
        ConfigError: there is no template, or it fails or turns the messages down.
    """
    messages = [_plain(one, at) for at, one in enumerate(body.messages or ())]
    goes_on = bool(body.continue_final_message)
    asks = body.add_generation_prompt
    if goes_on and asks:
        raise Refusal(
            400,
            "`continue_final_message` and `add_generation_prompt` exclude each other.",
            param="continue_final_message",
        )
    extra = body.chat_template_kwargs or {}
    taken = sorted(_TAKEN & extra.keys())
    if taken:
        raise Refusal(
            400,
            f"`chat_template_kwargs` sets {taken[0]!r}, which has a field of its own.",
            param="chat_template_kwargs",
        )
    text = render_chat(
        tokenizer,
        messages,
        add_generation_prompt=not goes_on if asks is None else asks,
        tools=tools_of(body.tools) or None,
        **extra,
    )
    if goes_on:
        text = _cut_after(text, messages[-1]["content"])
    ids = tokenizer.encode_markup(text).astype(np.int32)
    if not ids.size:
        raise DataError("the chat template makes no text of these messages.")
    return ids


def tools_of(tools: list[Tool] | None) -> list[dict[str, Any]]:
    """Return tools as templates read them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters
                or {"type": "object", "properties": {}},
            },
        }
        for tool in tools or ()
    ]


def _plain(message: Message, at: int) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_text(part, at) for part in content)
    if content is None and message.role != "assistant":
        raise _bad(at, f"of role {message.role} has no content")
    if message.role == "tool" and message.tool_call_id is None:
        raise _bad(at, "of role tool has no tool_call_id")
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or "",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, at),
                },
            }
            for call in message.tool_calls
        ]
    return found


def _text(part: ContentPart, at: int) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal"):
        raise _bad(at, f"has a part of type {part.type!r}; this model reads text alone")
    if text is None:
        raise _bad(at, f"has a part of type {part.type!r} without `{part.type}`")
    return text


def _arguments(text: str, at: int) -> dict[str, Any]:
    """Templates write arguments as objects; OpenAI sends them as text."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        raise _bad(at, "has a tool call whose arguments are no JSON object") from None


def _cut_after(text: str, final: str) -> str:
    """The text up to the end of the last message's own words."""
    words = final.strip()
    begin = text.rfind(words)
    if not words or begin < 0:
        raise DataError(
            "`continue_final_message` needs a last message with words that the chat "
            "template writes as they are."
        )
    return text[: begin + len(words)]


def _bad(at: int, what: str) -> Refusal:
    return Refusal(400, f"message {at} {what}.", param=f"messages[{at}]")
