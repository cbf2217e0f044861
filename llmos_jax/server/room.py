"""What every endpoint needs at hand: the engine, the tokenizer, names and bounds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from typing import Protocol

from llmos_jax.data import Tokenizer
from llmos_jax.scheduling import Hear, Progress, Request
from llmos_jax.server.grammar import Grammars
from llmos_jax.server.metrics import Metrics
from llmos_jax.server.options import ServerOptions
from llmos_jax.server.refusals import Refusal
from llmos_jax.server.tools import ToolStyle
from llmos_jax.server.traces import Traces
from llmos_jax.server.words import TokenNames
from llmos_jax.serving.state import EngineState, Limits


class Engine(Protocol):
    """What the server asks of an engine; every method but `drain` returns at once."""

    @property
    def limits(self) -> Limits: ...
    def submit(self, request: Request, hear: Hear) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def state(self) -> EngineState: ...
    def drain(self, seconds: float) -> bool: ...
    def stop(self) -> None: ...


class Post:
    """Hands what the engine's thread says over to an event loop.

    One wakeup of the loop brings everything that was said since the last one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Hear, Progress]] = deque()
        self._is_rung = False

    def to(self, take: Hear) -> Hear:
        """Return what the engine may call; `take` is then called on the loop."""

        def hear(progress: Progress) -> None:
            with self._lock:
                self._waiting.append((take, progress))
                rings, self._is_rung = not self._is_rung, True
            if rings:
                with suppress(RuntimeError):  # the loop is closed: nobody listens
                    self.loop.call_soon_threadsafe(self._deliver)

        return hear

    def _deliver(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
            self._is_rung = False
        for take, progress in waiting:
            take(progress)


class Room:
    """The server's own state; its methods belong to the event loop."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        model_name: str,
        options: ServerOptions,
    ):
        self.engine = engine
        self.limits = engine.limits
        self.tokenizer = tokenizer
        self.model_name = options.served_name or model_name
        self.options = options
        self.metrics = Metrics(self.model_name, engine.limits, engine.state)
        self.traces = Traces.of_environment()
        self.created = int(time.time())
        self.is_draining = False
        self.open_requests = 0
        """HTTP requests to the model that are not answered yet."""
        self.answered = 0
        self._post: Post | None = None

    @property
    def is_classifier(self) -> bool:
        """Whether the model gives classes, and not tokens."""
        return bool(self.limits.labels)

    @property
    def post(self) -> Post:
        """The post of the loop that runs."""
        loop = asyncio.get_running_loop()
        if self._post is None or self._post.loop is not loop:
            self._post = Post(loop)
        return self._post

    @cached_property
    def names(self) -> TokenNames:
        """The text of single tokens."""
        return TokenNames(self.tokenizer)

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars; the first use takes a moment."""
        return Grammars(self.tokenizer, self.limits.vocab_size)

    @cached_property
    def tool_style(self) -> ToolStyle | None:
        """How this model calls tools; None: its template does not say."""
        template = self.tokenizer.marks.chat_template
        return None if template is None else ToolStyle.of(template)

    @cached_property
    def tool_marks(self) -> Mapping[int, str]:
        """Marks that are tokens, and have to be seen for a tool call to be found."""
        names = () if self.tool_style is None else self.tool_style.marks
        vocabulary, special = self.tokenizer.vocabulary(), self.tokenizer.special_ids()
        return {
            vocabulary[name]: name for name in names if vocabulary.get(name) in special
        }

    def check_model(self, name: str | None) -> None:
        """Raise Refusal (404) for a model that is not served."""
        if name is not None and name != self.model_name:
            raise Refusal(
                404,
                f"the model {name!r} is not here; this server has "
                f"{self.model_name!r} (GET /v1/models).",
                param="model",
                code="model_not_found",
            )
