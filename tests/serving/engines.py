"""Engines small enough for a test, and someone who asks them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llmos_jax import hardware, serving
from llmos_jax.config.schema import ServeSection
from llmos_jax.models import Skeleton
from llmos_jax.places import cache_folder
from llmos_jax.scheduling import Likelihood, Progress, Request
from llmos_jax.serving import Engine, Opened, Options

PATIENCE_S = 60


@dataclass
class Answer:
    """What became of a request."""

    tokens: list[int] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    end: Progress | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def hear(self, progress: Progress) -> None:
        """Take what the engine says."""
        assert self.end is None, "a request ended twice"
        self.tokens += progress.tokens
        self.likelihoods += progress.likelihoods
        if progress.reason is not None:
            self.end = progress
            self.done.set()

    @property
    def last(self) -> Progress:
        """How it ended."""
        assert self.done.wait(PATIENCE_S), "no answer came"
        assert self.end is not None
        return self.end


def asked(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Ask all at once, and wait for all."""
    answers = [Answer() for _ in requests]
    for request, answer in zip(requests, answers, strict=True):
        engine.submit(request, answer.hear)
    for answer in answers:
        assert answer.last.reason is not None
    return answers


def request_of(name: object, prompt: Any, tokens: int = 8, **rest: Any) -> Request:
    """A request; greedy, if nothing else is said."""
    return Request(
        id=str(name), prompt=np.asarray(prompt, np.int32), max_tokens=tokens, **rest
    )


@contextmanager
def engine_of(
    skeleton: Skeleton,
    params: dict[str, jax.Array],
    *,
    kv_dtype: str = "float32",
    options: Options | None = None,
    **sizes: Any,
) -> Iterator[Engine]:
    """An engine on one device that is ready; tests share compiled programs."""
    made = serving.open_forward(
        skeleton, dict(params), compute_dtype="float32", kv_dtype=kv_dtype
    )
    asked = {"seats": 2, "step_tokens": 16, "cache_gib": 0.01} | sizes
    opened = Opened(skeleton.spec, *made, hardware.parse_topology("cpu:1"))
    chosen = options or Options()
    ready = serving.make_ready(
        opened,
        ServeSection(**asked),
        guesses=chosen.drafts > 0,
        identity=f"{skeleton.spec} {kv_dtype}",
        folder=cache_folder() / "engines",
    )
    engine = serving.open_engine(opened, ready, chosen)
    try:
        engine.wait_until_ready()
        assert engine.state().stage == "ready", engine.state().problem
        yield engine
        scheduler = engine._scheduler
        scheduler.check()
        assert scheduler.pages.held == 0, "pages were lost"
        assert engine.state().unplanned_compiles == 0
    finally:
        engine.stop()
