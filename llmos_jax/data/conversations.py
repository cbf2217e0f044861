"""Turn JSON lines with `messages` into conversations, checked.

A conversation travels through the rooms that split, spool and hash text as one line of
JSON: {"messages": [{"role", "content", ...}, ...]}, with "tools" where the row has
them. Contents given as lists of text parts become the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from llmos_jax.config.schema import DataSection
from llmos_jax.data.document import Document
from llmos_jax.data.fields import json_kind, near
from llmos_jax.data.readers import read_rows
from llmos_jax.data.sources import expand, find, local
from llmos_jax.errors import DataError, did_you_mean
from llmos_jax.stores import Remote

ROLES = ("system", "developer", "user", "assistant", "tool")


def is_chat(section: DataSection, patterns: Sequence[str]) -> bool:
    """Say whether these sources are conversations, as `data.format` wants it.

    `auto` looks at the first row of the first file: JSON lines with the field that
    `data.messages_key` names are.
    """
    if section.format != "auto":
        return section.format == "chat"
    first = find(patterns)[0]
    name = first.url if isinstance(first, Remote) else str(first)
    path = local(first) if name.lower().endswith(".jsonl") else None
    if path is None:
        return False
    for _, row in read_rows(path):
        return section.messages_key in row
    return False


def read_conversations(
    patterns: Sequence[str], *, messages_key: str
) -> Iterator[Document]:
    """Yield every conversation, streaming.

    Raises:
        DataError: a file that is not JSON lines, or a row that is no conversation.
    """
    found = False
    for path in expand(patterns):
        for place, row in _rows(path):
            found = True
            yield Document(name=place, text=_conversation(row, messages_key, place))
    if not found:
        raise DataError(f"no conversation in {', '.join(patterns)}.")


def parse(text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return the messages and tools of what `read_conversations` gave."""
    row = msgspec.json.decode(text)
    return row["messages"], row.get("tools")


def _rows(path: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if path is None or path.suffix.lower() != ".jsonl":
        raise DataError(
            f"{path or 'python-docs'}: conversations are read from .jsonl files, one "
            'to a line: {"messages": [{"role": "user", "content": "..."}, ...]}. Set '
            "data.format = `text` if this is plain text."
        )
    yield from read_rows(path)


def _conversation(row: dict[str, Any], key: str, place: str) -> str:
    if key not in row:
        raise DataError(
            f"{place}: no field {key!r}; the fields are "
            f"{', '.join(map(repr, row)) or 'none'}.{near(key, row)} Set "
            "data.messages_key to the one that holds the messages."
        )
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else f"a {json_kind(messages)}"
        raise DataError(f"{place}: field {key!r} is {what}, not a list of messages.")
    clean: dict[str, Any] = {
        "messages": [
            _message(message, f"{place}, message {number}")
            for number, message in enumerate(messages, 1)
        ]
    }
    if isinstance(row.get("tools"), list) and row["tools"]:
        clean["tools"] = row["tools"]
    return msgspec.json.encode(clean).decode()


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(
            f"{place}: wanted a JSON object with `role` and `content`, got a "
            f"{json_kind(message)}."
        )
    role = message.get("role")
    if role not in ROLES:
        raise DataError(
            f"{place}: role is {role!r}.{did_you_mean(str(role), ROLES)} Roles are "
            f"{', '.join(ROLES)}."
        )
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise DataError(f"{place}: content is a {json_kind(content)}, not text.")
    return {**message, "content": content}


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else json_kind(part)
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(
            f"{place}: content has a part of type {kind!r}; only text parts can be "
            "learned from. Leave the conversation out."
        )
    text: str = part["text"]
    return text
