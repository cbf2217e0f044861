"""Turn a conversation into text by the template that came with a model.

Templates are Jinja programs that strangers wrote. They run in Jinja's sandbox with the
names that `transformers` gives them (chat_template_utils.py of release 5), and with a
meter: every step of a loop and every call counts, and no text grows past a bound. What
they get is plain JSON data, so there is nothing to reach out with.

With `spans`, the `{% generation %}` blocks that some templates put around answers are
found again in the text: they are rendered between two characters that Unicode promises
never to use, which are then taken out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llmos_jax.errors import ConfigError, DataError

MOST_STEPS = 1_000_000
"""Loop steps and calls of one rendering; a thousand turns take some ten thousand."""
MOST_CHARACTERS = 1 << 24
"""Of the rendered text, and of any text on the way."""

_steps_left: ContextVar[list[int]] = ContextVar("steps_left")
_marks_answers: ContextVar[bool] = ContextVar("marks_answers", default=False)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WIDE = re.compile(r"\d{8}|\*")  # a width that fills the memory, or one told apart
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing, three names


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
    **extra: Any,
) -> str:
    """Return the text of a conversation, as `apply_chat_template` makes it.

    Args:
        template: Jinja source.
        messages: dicts with `role` and `content`, and whatever the template reads.
        add_generation_prompt: end with the header of the answer that is wanted.
        tools: JSON schemas of functions that the model may call.
        extra: more names for the template, such as `bos_token`.

    Raises:
        ConfigError: the template cannot be read or used: a mistake in it, a way out of
            the sandbox, or more steps or text than any conversation needs.
        DataError: the template turned the conversation down; with its words.
    """
    compiled = _compiled(template)
    steps = _steps_left.set([MOST_STEPS])
    try:
        return _bounded(
            compiled.generate(
                messages=[_spoken(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **extra,
            )
        )
    except (_Refusal, ConfigError) as problem:
        if isinstance(problem, ConfigError):
            raise
        raise DataError(
            f"the chat template refuses the conversation: {problem}"
        ) from None
    except RecursionError:
        raise ConfigError("the chat template calls itself without end.") from None
    except Exception as problem:  # a foreign program: anything may go wrong in it
        raise ConfigError(
            f"the chat template fails: {type(problem).__name__}: {problem}"
        ) from None
    finally:
        _steps_left.reset(steps)


def render_spans(
    template: str, messages: list[dict[str, Any]], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return `render`, and where its `{% generation %}` blocks lie in it."""
    token = _marks_answers.set(True)
    try:
        marked = render(template, messages, **options)
    finally:
        _marks_answers.reset(token)
    text, spans = "", []
    for index, part in enumerate(marked.split(_OPEN)):
        if index:
            answer, closed, part = part.partition(_CLOSE)
            if not closed:
                raise ConfigError("the chat template nests generation blocks.")
            spans.append((len(text), len(text) + len(answer)))
            text += answer
        text += part
    return text, spans


def has_generation_blocks(template: str) -> bool:
    """Say whether the template itself tells which text is an answer."""
    return _GENERATION.search(template) is not None


class _Refusal(jinja2.TemplateError):
    """What a template raised on purpose."""


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_answer", [])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _answer(self, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{_OPEN}{text}{_CLOSE}" if _marks_answers.get() else text


class _Metering(NodeTransformer):
    """Make every loop and every joining of texts pass by the meter."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "metered", [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(node, "sized", [], [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(
        self, source: str, name: str | None, filename: str | None
    ) -> nodes.Template:
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [one for one in (left, right) if isinstance(one, int | float)]
        if operator == "*" and len(numbers) == 1:
            other = right if numbers[0] is left else left
            if len(other) * numbers[0] > MOST_CHARACTERS:
                raise _too_large()
        if operator == "**" and any(abs(one) > 1024 for one in numbers):
            raise _too_large()
        if operator == "%":
            _check_format(left)
        return _sized(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:
        _spend(1)
        if isinstance(function, LoopContext) and args:
            args = (_metered(args[0]), *args[1:])
        _check_numbers(args, named)
        if getattr(function, "__name__", "") in ("format", "format_map"):
            # The sandbox wraps it; the text to format is what it is a method of.
            method = getattr(function, "__wrapped__", function)
            _check_format(getattr(method, "__self__", None))
        return _sized(super().call(context, function, *args, **named))


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters = {
        name: _guarded(function) for name, function in environment.filters.items()
    }
    environment.filters |= {
        "tojson": _to_json,
        "metered": jinja2.pass_context(lambda _, items: _metered(items)),
        "sized": jinja2.pass_context(lambda _, text: _sized(text)),
    }
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as problem:
        raise ConfigError(
            f"the chat template has a mistake in line {problem.lineno}: {problem}"
        ) from None
    except RecursionError:
        raise ConfigError("the chat template is nested too deeply.") from None


def _spoken(message: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is null, and give thoughts under every name templates read."""
    said = {key: value for key, value in message.items() if value is not None}
    thoughts = next((said[name] for name in _REASONING if name in said), None)
    if thoughts is None:
        return said
    return {"thinking": thoughts, **said, "reasoning_content": thoughts}


def _bounded(parts: Iterator[str]) -> str:
    taken, size = [], 0
    for part in parts:
        size += len(part)
        if size > MOST_CHARACTERS:
            raise _too_large()
        taken.append(part)
    return "".join(taken)


def _spend(steps: int) -> None:
    left = _steps_left.get([MOST_STEPS])
    left[0] -= steps
    if left[0] < 0:
        raise ConfigError(
            f"the chat template takes more than {MOST_STEPS} steps for one "
            "conversation: it loops without end, or nearly so."
        )


def _metered(items: Any) -> Iterator[Any]:
    for item in items:
        _spend(1)
        yield item


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MOST_CHARACTERS:
        raise _too_large()
    return value


def _check_numbers(args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Widths and repeats: one call could fill the memory."""
    for value in (*args, *named.values()):
        if isinstance(value, int) and abs(value) > MOST_CHARACTERS:
            raise _too_large()


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDE.search(text):
        raise _too_large()


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps the attribute by which Jinja knows what to pass
    def guarded(*args: Any, **named: Any) -> Any:
        _check_numbers(args, named)
        if function.__name__ == "do_format":
            _check_format(args[0])
        return _sized(function(*args, **named))

    return guarded


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _too_large() -> ConfigError:
    return ConfigError(
        f"the chat template makes a text of more than {MOST_CHARACTERS} characters."
    )
