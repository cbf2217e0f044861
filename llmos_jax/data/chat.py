"""Turn a conversation into ids, and say which of them the model is to learn to say.

The whole conversation is rendered and cut into tokens once. Where an answer lies in the
text is found by rendering its beginnings: up to the answer, with the header that asks
for it, and through the answer. What the second adds to the first is the answer and the
mark that ends the turn. A template that writes these beginnings otherwise than they
stand in the whole is refused: there is no telling what the model would see when it
speaks. Templates with `{% generation %}` blocks say it themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmos_jax.data.template import has_generation_blocks, render, render_spans
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.errors import ConfigError, DataError

Message = dict[str, Any]

_REMEDY = (
    "Use the model's instruction-tuned sibling, or set data.chat_template to the path "
    "of a Jinja template."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurns:
    """A conversation in tokens."""

    ids: np.ndarray
    """int32 [T], from the first header to the last turn's end."""
    is_answer: np.ndarray
    """bool [T]: tokens of the assistant's words and of the mark that ends its turn."""
    answers: str
    """The assistant's words, one after another, without marks."""


def render_chat(
    tokenizer: Tokenizer,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
    **extra: Any,
) -> str:
    """Return the text of a conversation by the tokenizer's own template.

    Raises:
        ConfigError: the model came without a template, or its template fails.
        DataError: the template turns the conversation down.
    """
    return render(
        _template(tokenizer),
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        **{**tokenizer.special_names(), **extra},
    )


def chat_prompt_ids(
    tokenizer: Tokenizer,
    messages: list[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
) -> np.ndarray:
    """Return the ids to which the model adds its answer, uint32 [tokens].

    Raises:
        ConfigError: the model came without a template, or its template fails.
        DataError: the template turns the conversation down.
    """
    text = render_chat(tokenizer, messages, add_generation_prompt=True, tools=tools)
    return tokenizer.encode_markup(text)


def encode_chat(
    tokenizer: Tokenizer,
    messages: list[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
) -> ChatTurns:
    """Return the tokens of a conversation and which of them are answers.

    Raises:
        ConfigError: the model came without a template, or its template fails.
        DataError: the template turns the conversation down, or writes its beginnings
            otherwise than they stand in the whole.
    """
    template = _template(tokenizer)
    if has_generation_blocks(template):
        text, spans = render_spans(
            template, messages, tools=tools, **tokenizer.special_names()
        )
    else:
        text, spans = _spans_by_beginnings(tokenizer, messages, tools)
    ids, characters_T2 = tokenizer.align_markup(text)
    is_answer = np.zeros(ids.size, bool)
    is_mark = np.isin(ids, np.fromiter(tokenizer.special_ids(), np.int64))
    answers = []
    for begin, end in spans:
        inside = (characters_T2[:, 0] >= begin) & (characters_T2[:, 0] < end)
        inside &= ~_after_last_mark(text, end, inside & is_mark, characters_T2)
        is_answer |= inside
        answers.append(_words(text, begin, end, characters_T2[inside & is_mark]))
    return ChatTurns(
        ids=ids.astype(np.int32), is_answer=is_answer, answers="".join(answers)
    )


def _template(tokenizer: Tokenizer) -> str:
    if tokenizer.marks.chat_template is None:
        raise ConfigError(
            "the tokenizer has no chat template: the model was not taught to converse, "
            f"or its file does not say how. {_REMEDY}"
        )
    return tokenizer.marks.chat_template


def _spans_by_beginnings(
    tokenizer: Tokenizer, messages: list[Message], tools: list[dict[str, Any]] | None
) -> tuple[str, list[tuple[int, int]]]:
    whole = render_chat(tokenizer, messages, tools=tools)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render_chat(
            tokenizer, messages[:index], tools=tools, add_generation_prompt=True
        )
        told = whole
        if index + 1 < len(messages):
            told = render_chat(tokenizer, messages[: index + 1], tools=tools)
        if not (whole.startswith(told) and told.startswith(asked)):
            raise DataError(
                f"the chat template writes message {index + 1} of {len(messages)} in "
                "one way while it is the last and in another when more follow (or "
                "heads a finished answer otherwise than one that is asked for), so "
                "the answer cannot be told from the rest. Put {% generation %} "
                "blocks around answers in a template of your own (data.chat_template), "
                "or keep one answer per conversation."
            )
        spans.append((len(asked), len(told)))
    return whole, spans


def _after_last_mark(
    text: str, end: int, marks_T: np.ndarray, characters_T2: np.ndarray
) -> np.ndarray:
    """Which tokens are white space after a turn's end mark: nobody needs to say it."""
    found = np.flatnonzero(marks_T)
    if not found.size or text[characters_T2[found[-1], 1] : end].strip():
        return np.zeros_like(marks_T)
    return np.arange(marks_T.size) > found[-1]


def _words(text: str, begin: int, end: int, marks_N2: np.ndarray) -> str:
    """The text between two characters without the marks in it and a last line's end."""
    parts = []
    for left, right in marks_N2:
        parts.append(text[begin:left])
        begin = right
    if text[begin:end].strip() or not parts:
        parts.append(text[begin:end])
    return "".join(parts)
