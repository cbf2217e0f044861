"""Find the tool calls in what a model says, by the style that its template taught it.

There is no standard: a model writes calls as the conversations of its training did, and
only the chat template shows how. Three families cover most open models:

    tags      <tool_call>{"name": ..., "arguments": {...}}</tool_call>, Hermes and Qwen,
              SmolLM3; one block for each call
    list      [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], Mistral
    bare      {"name": ..., "parameters": {...}}, Llama 3: the whole answer is the call

What looks like a call and is none stays text: nothing that a model said is lost.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmos_jax.errors import ConfigError, did_you_mean
from llmos_jax.server.grammar import WHITESPACE

Family = Literal["tags", "list", "bare"]

_MOST_HELD = 1 << 18
"""Characters that may wait for the end of a call; then they are text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that the model wants called."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStyle:
    """How one model writes tool calls."""

    family: Family
    opens: str
    """What stands before a call; of the bare family nothing does."""
    closes: str
    arguments_key: str
    """`arguments` or `parameters`."""

    @classmethod
    def of(cls, template: str) -> ToolStyle | None:
        """Return the style of a chat template; None for one that has no tools, or has
        them in a way that is not known here."""
        if not re.search(r"\btools\b", template):
            return None
        if "<tool_call>" in template:
            if re.search(r"<function=|<arg_key>", template):
                return None  # XML, not JSON, within the tags
            return cls(
                family="tags",
                opens="<tool_call>",
                closes="</tool_call>",
                arguments_key="arguments",
            )
        if "[TOOL_CALLS]" in template:
            if "[ARGS]" in template:
                return None
            return cls(
                family="list",
                opens="[TOOL_CALLS]",
                closes="",
                arguments_key="arguments",
            )
        if re.search(r'\{"name":\s*function name,\s*"parameters"', template):
            return cls(family="bare", opens="", closes="", arguments_key="parameters")
        return None

    @property
    def marks(self) -> tuple[str, ...]:
        """Text that must be seen for a call to be found: a token of this name has to be
        decoded as its name, be it a mark or not."""
        bare = ("<|python_tag|>",) if self.family == "bare" else ()
        return tuple(filter(None, (self.opens, self.closes, *bare)))

    def new_id(self) -> str:
        """Return a fresh id of a call; Mistral's templates want nine letters."""
        return secrets.token_hex(5)[:9] if self.family == "list" else _long_id()

    def parse(self, text: str) -> tuple[str | None, list[ToolCall]]:
        """Return the text around the calls (None: there is none), and the calls."""
        stream = self.stream()
        parts = [*stream.push(text), *stream.flush()]
        said = "".join(part for part in parts if isinstance(part, str))
        calls = [part.call for part in parts if isinstance(part, CallDelta)]
        if calls:
            said = said.strip()
        return said or None, calls

    def stream(self) -> ToolStream:
        """Return a parser of an answer that comes in pieces."""
        return ToolStream(self)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str,
        parallel: bool = True,
        marks: Mapping[str, int] | None = None,
    ) -> tuple[Literal["lark"], str]:
        """Return the grammar of answers that are calls, for `Grammars.compile`.

        Args:
            tools: OpenAI's `tools`, with at least one function.
            choice: `required` for any of them, or the name of one.
            parallel: whether several calls may come.
            marks: `Grammars.marks`: tokens that no text spells.

        Raises:
            ConfigError: no tool has this name, or there is none at all.
        """
        known = {one["function"]["name"]: one["function"] for one in tools}
        if choice != "required" and choice not in known:
            raise ConfigError(
                f"tool_choice names {choice!r}, which is not among the tools."
                f"{did_you_mean(choice, known)}"
            )
        wanted = list(known.values()) if choice == "required" else [known[choice]]
        if not wanted:
            raise ConfigError("tool_choice asks for a call, and there are no tools.")
        schema = self._schema(wanted)
        rules = [f"start: {self._shape(marks or {}, parallel)}"]
        if self.family == "list":
            most = {} if parallel else {"maxItems": 1}
            schema = {"type": "array", "items": schema, "minItems": 1, **most}
        layout = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
        rules.append(f"call: %json {json.dumps({**layout, **schema})}")
        return "lark", "\n".join(rules)

    def _shape(self, marks: Mapping[str, int], parallel: bool) -> str:
        if self.family == "bare":
            return "call"  # Llama's template takes no more than one
        opens = _spelled(self.opens, marks)
        if self.family == "list":
            return f"{opens} call"
        one = f'{opens} "\\n"? call "\\n"? {_spelled(self.closes, marks)}'
        return f'{one} ("\\n"? {one})*' if parallel else one

    def _schema(self, functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Definitions of one schema may not reach into another's, so that each keeps
        its own `$defs` by a resource id."""
        shapes = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": one["name"]},
                    self.arguments_key: _arguments(one, index),
                },
                "required": ["name", self.arguments_key],
                "additionalProperties": False,
            }
            for index, one in enumerate(functions)
        ]
        return shapes[0] if len(shapes) == 1 else {"anyOf": shapes}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """A call that is complete, for a delta of a stream."""

    index: int
    id: str
    call: ToolCall

    def to_plain(self) -> list[dict[str, Any]]:
        """Return OpenAI's `delta.tool_calls` entries, in order: the first has id, type
        and name, the second the arguments."""
        function = {"name": self.call.name, "arguments": ""}
        return [
            {
                "index": self.index,
                "id": self.id,
                "type": "function",
                "function": function,
            },
            {
                "index": self.index,
                "function": {"arguments": self.call.arguments},
            },
        ]


class _Scan:
    """Where the object or list ends that a text begins with: counts brackets."""

    __slots__ = ("_depth", "_is_escaped", "_is_quoted", "at", "is_closed", "is_open",
                 "start")  # fmt: skip

    def __init__(self, start: int):
        self.start = self.at = start
        self.is_open = True
        """More text may end it."""
        self.is_closed = False
        """It ends before `at`."""
        self._depth = 0
        self._is_quoted = False
        self._is_escaped = False

    def run(self, text: str) -> None:
        """Go on through text, of which what was seen has not changed."""
        while self.is_open and self.at < len(text):
            self._step(text[self.at])
            self.at += 1

    def _step(self, letter: str) -> None:
        if self._is_quoted:
            self._is_quoted = self._is_escaped or letter != '"'
            self._is_escaped = letter == "\\" and not self._is_escaped
            self.is_open = letter >= " "  # JSON has no such letters in strings
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1
            self.is_closed = self._depth == 0
            self.is_open = self._depth > 0
        elif letter == '"' and self._depth:
            self._is_quoted = True
        elif self._depth == 0:
            self.is_open = letter.isspace()


class ToolStream:
    """Tell calls from text as an answer comes.

    Strings are text to show at once; what may be the beginning of a mark waits, and a
    call is told when it is whole.
    """

    __slots__ = ("_gap", "_held", "_is_text", "_scan", "_style", "num_calls")

    def __init__(self, style: ToolStyle):
        self._style = style
        self._held = ""
        self._scan: _Scan | None = None
        self._gap: str | None = None
        self._is_text = False  # of a bare answer: no call can come any more
        self.num_calls = 0

    def push(self, text: str) -> list[str | CallDelta]:
        """Take more text; return what is certain now."""
        self._held += text
        found: list[str | CallDelta] = []
        while (part := self._next(at_end=False)) is not None:
            found += part
        return found

    def flush(self) -> list[str | CallDelta]:
        """Return what is left; a call that was not finished is text."""
        found: list[str | CallDelta] = []
        while self._held:
            part = self._next(at_end=True)
            found += part if part is not None else self._take(len(self._held))
        return found

    def _next(self, *, at_end: bool) -> list[str | CallDelta] | None:
        """Take one part off what is held; None: it must wait."""
        if not self._held:
            return None
        if self._style.family == "bare":
            return self._next_bare(at_end)
        opens, held = self._style.opens, self._held
        start = held.find(opens)
        if start < 0:
            certain = len(held) - (0 if at_end else _overlap(held, opens))
            return self._take(certain) if certain else None
        if start > 0:
            return self._take(start)
        if self._style.family == "tags":
            return self._next_tag()
        return self._next_list()

    def _next_tag(self) -> list[str | CallDelta] | None:
        opens, closes = self._style.opens, self._style.closes
        scan = self._scanned(len(opens))
        if scan.is_open:
            return self._wait()
        value = _json_of(self._held[scan.start : scan.at]) if scan.is_closed else None
        after = self._held[scan.at :].lstrip()
        if value is not None and after.startswith(closes):
            length = len(self._held) - len(after) + len(closes)
            return self._calls([value], length)
        if value is not None and closes.startswith(after):
            return self._wait()
        return self._take(len(opens))

    def _next_list(self) -> list[str | CallDelta] | None:
        scan = self._scanned(len(self._style.opens))
        if scan.is_open:
            return self._wait()
        value = _json_of(self._held[scan.start : scan.at]) if scan.is_closed else None
        if value is None:
            return self._take(len(self._style.opens))
        return self._calls(value if isinstance(value, list) else [value], scan.at)

    def _next_bare(self, at_end: bool) -> list[str | CallDelta] | None:
        """Only an answer that begins with a call has calls, with ; between them."""
        held, tag = self._held, self._style.marks[0]
        if self._is_text:
            return self._take(len(held))
        head = re.match(r"\s*(;\s*)?" if self.num_calls else r"\s*", held)
        assert head
        rest = held[head.end() :]
        if tag.startswith(rest) and not at_end:
            return None
        rest = rest.removeprefix(tag).lstrip()
        if not rest and not at_end:
            return None
        if rest.startswith("{"):
            scan = self._scanned(len(held) - len(rest))
            if scan.is_open:
                return self._wait()
            value = _json_of(held[scan.start : scan.at])
            if value is not None:
                return self._calls([value], scan.at)
        self._is_text = True
        return self._take(len(held))

    def _scanned(self, start: int) -> _Scan:
        """The brackets from `start` on; what was looked at is not looked at again."""
        if self._scan is None:
            self._scan = _Scan(start)
        self._scan.run(self._held)
        return self._scan

    def _wait(self) -> list[str | CallDelta] | None:
        return None if len(self._held) < _MOST_HELD else self._take(len(self._held))

    def _calls(self, values: list[Any], length: int) -> list[str | CallDelta]:
        """Take `length` characters as calls; as text if one of them is none."""
        calls = [_call_of(one, self._style.arguments_key) for one in values]
        if not calls or any(call is None for call in calls):
            self._is_text = True
            return self._take(length)
        self._held, self._scan, self._gap = self._held[length:], None, ""
        found: list[str | CallDelta] = []
        for call in calls:
            assert call is not None
            identity = self._style.new_id()
            found.append(CallDelta(index=self.num_calls, id=identity, call=call))
            self.num_calls += 1
        return found

    def _take(self, length: int) -> list[str | CallDelta]:
        """Take text; white space right after a call waits for more than that."""
        text, self._held = self._held[:length], self._held[length:]
        self._scan = None
        if self._gap is None:
            return [text]
        self._gap += text
        if not self._gap.strip():
            return []
        text, self._gap = self._gap, None
        return [text]


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _call_of(value: Any, key: str) -> ToolCall | None:
    """A call from its JSON; a model may use the other family's word for arguments, or
    write them as a string of JSON."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    other = "parameters" if key == "arguments" else "arguments"
    arguments = value.get(key, value.get(other))
    if isinstance(arguments, str):
        arguments = _json_of(arguments)
    if not isinstance(arguments, dict) or not value["name"]:
        return None
    return ToolCall(
        name=value["name"], arguments=json.dumps(arguments, ensure_ascii=False)
    )


def _json_of(text: str) -> Any:
    """The value that text spells; None where it spells none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters of text begin the mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def _spelled(mark: str, marks: Mapping[str, int]) -> str:
    """A mark in Lark: the token where it is one, else its letters."""
    return f"<[{marks[mark]}]>" if mark in marks else json.dumps(mark)


def _arguments(function: Mapping[str, Any], index: int) -> dict[str, Any]:
    parameters = {"type": "object", **(function.get("parameters") or {})}
    if "$defs" in parameters or "definitions" in parameters:
        return {"$id": f"urn:tool:{index}", **parameters}
    return parameters
