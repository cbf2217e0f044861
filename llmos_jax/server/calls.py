"""Tool calls in OpenAI's form, of whole answers and of streams."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from llmos_jax.server.protocol import ChatRequest, NamedTool, Tool
from llmos_jax.server.refusals import Refusal
from llmos_jax.server.replies import (
    CallFunction,
    ChatMessage,
    Delta,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from llmos_jax.server.room import Room
from llmos_jax.server.tools import CallDelta, ToolStream, ToolStyle


def style_of(room: Room, body: ChatRequest) -> ToolStyle | None:
    """Return how calls are written, where the model may call; Refusal (400) where it
    was not taught to."""
    _check(body.tools or [], body)
    if not body.tools or body.tool_choice == "none":
        return None
    if room.tool_style is None:
        raise Refusal(
            400,
            "this model's chat template has no place for tools, or writes calls in a "
            "way that is not known here. Leave `tools` out, or serve a model that was "
            "taught to call them.",
            param="tools",
        )
    return room.tool_style


def forced_call(body: ChatRequest) -> tuple[str, bool] | None:
    """Return what `ToolStyle.grammar` takes where there must be a call: (choice,
    whether several may come)."""
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return choice.function.name, False
    if choice == "required":
        return "required", body.parallel_tool_calls is not False
    return None


def message_of(text: str, style: ToolStyle | None, body: ChatRequest) -> ChatMessage:
    """Return a whole answer as a message."""
    if style is None:
        return ChatMessage(content=text)
    stream = CallStream(style, body)
    parts = stream.parts(text, ended=True)
    said = "".join(part for part in parts if isinstance(part, str))
    calls = [
        ToolCall(
            id=part.id,
            function=CallFunction(name=part.call.name, arguments=part.call.arguments),
        )
        for part in parts
        if isinstance(part, CallDelta)
    ]
    said = said.strip() if calls else said
    return ChatMessage(content=said or None, tool_calls=calls or UNSET)


class CallStream:
    """Tells calls from text while an answer comes."""

    def __init__(self, style: ToolStyle, body: ChatRequest):
        self._stream: ToolStream = style.stream()
        self._most = 1 if body.parallel_tool_calls is False else None
        self.num_calls = 0

    def parts(self, text: str, *, ended: bool) -> list[str | CallDelta]:
        """Take text; return texts and calls, without the calls beyond the one that may
        come where they may not be parallel."""
        found = self._stream.push(text)
        if ended:
            found += self._stream.flush()
        kept: list[str | CallDelta] = []
        for part in found:
            if isinstance(part, CallDelta):
                if self.num_calls == self._most:
                    continue
                self.num_calls += 1
            kept.append(part)
        return kept

    def deltas(self, text: str, *, ended: bool) -> list[Delta]:
        """Take text; return what to send."""
        found = []
        for part in self.parts(text, ended=ended):
            if isinstance(part, str):
                found.append(Delta(content=part))
                continue
            named = FunctionDelta(name=part.call.name, arguments="")
            said = FunctionDelta(arguments=part.call.arguments)
            found += [
                _delta(ToolCallDelta(
                    index=part.index, id=part.id, type="function", function=named
                )),
                _delta(ToolCallDelta(index=part.index, function=said)),
            ]  # fmt: skip
        return found


def _delta(call: ToolCallDelta) -> Delta:
    return Delta(tool_calls=[call])


def _check(tools: Sequence[Tool], body: ChatRequest) -> None:
    choice = body.tool_choice
    if choice is None or choice == "none":
        return
    names = {tool.function.name for tool in tools}
    if not names:
        raise Refusal(
            400, "`tool_choice` is set, but there are no `tools`.", param="tool_choice"
        )
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise Refusal(
            400,
            f"`tool_choice` names {choice.function.name!r}, which is none of `tools`.",
            param="tool_choice",
        )
