"""The engine: one thread that plans, sends and reads steps, as long as there is work.

Requests come from any thread. The engine's own thread takes them in between two steps,
so nothing of the scheduler is ever locked. While the device computes a step, the host
already plans and sends the next; what the device was asked is read one step late. Only
where a token must be known before the next can be asked for (a grammar, guesses) does
the host wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, Protocol

from llmos_jax.errors import ConfigError, Overloaded, ServeError, Stopping
from llmos_jax.scheduling import (
    MOST_ALTERNATIVES,
    Batching,
    Drawn,
    Hear,
    Progress,
    Request,
    Room,
    Scheduler,
    Work,
)
from llmos_jax.serving.choose import MOST_STOPS
from llmos_jax.serving.rates import Rates
from llmos_jax.serving.shapes import MOST_GUESSES
from llmos_jax.serving.state import EngineState, Limits, Stage
from llmos_jax.serving.steps import MOST_STEPS

DISPATCH_S = 0.025
"""Decode steps go out together as long as they take no longer than this: what a request
that comes then waits for. A judgement: a tenth of what a reader notices."""
MAX_QUEUE = 256
"""Requests that may wait, where nobody says: a judgement; eight times the seats."""
_IDLE_WAIT_S = 0.2
"""Between looks at deadlines when nothing runs."""


class Options(NamedTuple):
    """What an engine may do, beside its sizes."""

    max_queue: int = MAX_QUEUE
    max_queued_tokens: int = 2**20
    drafts: int = 0
    """Tokens that a sequence guesses at a time; 0: none."""
    overlaps: bool = True
    """Whether the next step is sent before the last is known."""
    keeps_prefixes: bool = True


DEFAULTS = Options()


class Programs(Protocol):
    """What is compiled."""

    unplanned: int

    def __len__(self) -> int: ...


class Runner(Protocol):
    """Sends works to the device, and reads what became of them."""

    @property
    def programs(self) -> Programs: ...
    def send(self, work: Work) -> Any: ...
    def read(self, sent: Any) -> tuple[Drawn, ...]: ...
    def end(self) -> None: ...


class Engine:
    """A model that answers requests until it is stopped."""

    def __init__(
        self,
        runner: Runner,
        room: Room,
        options: Options = DEFAULTS,
        *,
        scheduler: Scheduler | Batching | None = None,
        labels: tuple[str, ...] = (),
        prepare: Callable[[Callable[[], bool]], None] = lambda is_wanted: None,
        predict_step_s: Callable[[Work], float] | None = None,
        bytes_of: Callable[[Work], float] | None = None,
        planned_bandwidth: float = 0.0,
    ):
        """Begin to prepare, and then to serve.

        Args:
            runner: of the model.
            room: its sizes.
            options: what it may do.
            scheduler: who runs when; None: a Scheduler over the room's pages.
            labels: names of the classes that it tells apart; none: it makes tokens.
            prepare: what must be done first, on the engine's thread: all that compiles.
                It asks now and then whether it is still wanted.
            predict_step_s: seconds that a work should take, by the plan.
            bytes_of: bytes of weights and cache that a work reads.
            planned_bandwidth: bytes/s that the plan's machine reads at most.
        """
        self.limits = Limits(
            context=room.context,
            seats=room.seats,
            page_size=room.page_size,
            pages=room.pages,
            max_queue=options.max_queue,
            max_queued_tokens=options.max_queued_tokens,
            vocab_size=room.vocab_size,
            labels=labels,
        )
        self._runner, self._options = runner, options
        self._scheduler = scheduler or Scheduler(
            room, keeps_prefixes=options.keeps_prefixes
        )
        self._rates = Rates(predict_step_s, bytes_of, planned_bandwidth)
        self._inbox: deque[Callable[[float], None]] = deque()
        self._ids: set[str] = set()
        self._queued = 0
        self._queued_tokens = 0
        self._wake = threading.Condition()
        self._stage: Stage = "starting"
        self._prepare = prepare
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- from any thread

    def submit(self, request: Request, hear: Hear) -> None:
        """Ask for an answer; `hear` is told as it grows, on the engine's thread.

        Raises:
            ConfigError: a request that cannot be met, and why.
            Overloaded: too much waits, and when to come again.
            Stopping: the engine takes no more requests.
            ServeError: it has failed.
        """
        self._check(request)
        asked = len(request.prompt) + request.max_tokens
        with self._wake:
            if self._stage == "failed":
                raise ServeError(f"the engine has failed: {self._problem}")
            if self._stage == "starting":
                raise Stopping("the server is not ready yet; ask again in a moment.")
            if self._stage != "ready":
                raise Stopping("the server is shutting down; ask another one.")
            if request.id in self._ids:
                raise ConfigError(f"a request with the id {request.id!r} runs already.")
            self._check_queue(asked)
            self._ids.add(request.id)
            self._queued += 1
            self._queued_tokens += asked
            self._inbox.append(partial(self._add, request, hear))
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """End a request, if it has not ended."""
        with self._wake:
            self._inbox.append(partial(self._scheduler.cancel, request_id))
            self._wake.notify()

    def state(self) -> EngineState:
        """Read all gauges and counters."""
        scheduler, programs = self._scheduler, self._runner.programs
        pages = scheduler.pages
        with self._wake:
            queued, queued_tokens = self._queued, self._queued_tokens
            stage, problem = self._stage, self._problem
        return EngineState(
            stage=stage,
            problem=problem,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + queued,
            waiting_tokens=scheduler.waiting.tokens + queued_tokens,
            pages_held=pages.held,
            pages_cached=pages.cached,
            unplanned_compiles=programs.unplanned,
            programs=len(programs),
            **asdict(scheduler.counters),
            **self._rates.reading(),
        )

    def wait_until_ready(self) -> None:
        """Block until requests are taken, or never will be."""
        with self._wake:
            while self._stage == "starting":
                self._wake.wait(_IDLE_WAIT_S)

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait for those that were accepted.

        Returns whether all ended within `seconds`.
        """
        deadline = time.monotonic() + seconds
        with self._wake:
            if self._stage in ("starting", "ready"):
                self._stage = "draining"
            while self._ids and self._thread.is_alive():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._wake.wait(min(left, _IDLE_WAIT_S))
        return True

    def stop(self) -> None:
        """End the thread; what still runs ends as cancelled."""
        with self._wake:
            if self._stage != "failed":
                self._stage = "stopped"
            self._wake.notify_all()
        self._thread.join()

    def _check(self, request: Request) -> None:
        prompt, V = request.prompt, self.limits.vocab_size
        request.sampling.check()
        wants = 1 if request.wants == "tokens" else 0
        if (request.wants == "classes") != bool(self.limits.labels):
            has = "classes" if self.limits.labels else "tokens and embeddings"
            raise ConfigError(f"this model gives {has}; {request.wants} were asked.")
        if len(prompt) < 1:
            raise ConfigError("the prompt is empty; give at least one token.")
        if request.max_tokens < wants:
            raise ConfigError(
                f"max_tokens is {request.max_tokens}; it must be at least {wants}."
            )
        if len(prompt) + wants > self.limits.context:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens; the context has room for "
                f"{self.limits.context}, the answer included. Shorten the prompt."
            )
        if int(prompt.min()) < 0 or int(prompt.max()) >= V:
            raise ConfigError(
                f"the prompt has token ids from {prompt.min()} to {prompt.max()}; the "
                f"model knows 0 to {V - 1}. Encode it with the model's tokenizer."
            )
        if len(request.stop_ids) > MOST_STOPS:
            raise ConfigError(
                f"{len(request.stop_ids)} stop tokens were given; at most "
                f"{MOST_STOPS} have room."
            )
        if request.alternatives is not None and not (
            0 <= request.alternatives <= MOST_ALTERNATIVES
        ):
            raise ConfigError(
                f"{request.alternatives} alternatives were asked for; it must be 0 to "
                f"{MOST_ALTERNATIVES}."
            )
        for token, _ in request.sampling.logit_bias:
            if not 0 <= token < V:
                raise ConfigError(
                    f"logit_bias names token {token}; the model knows 0 to {V - 1}."
                )

    def _check_queue(self, asked: int) -> None:
        scheduler, limits = self._scheduler, self.limits
        waiting = len(scheduler.waiting) + self._queued
        tokens = scheduler.waiting.tokens + self._queued_tokens
        is_full = waiting >= limits.max_queue
        if not is_full and (tokens + asked <= limits.max_queued_tokens or not waiting):
            return
        what = f"{waiting} requests with {tokens} tokens wait already"
        raise Overloaded(
            f"{what}; at most {limits.max_queue} requests and "
            f"{limits.max_queued_tokens} tokens may. Ask again later.",
            retry_after_s=self._rates.seconds_for(tokens / max(1, waiting)),
        )

    # ------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            self._prepare(lambda: self._stage == "starting")
            with self._wake:
                if self._stage == "starting":
                    self._stage = "ready"
                self._wake.notify_all()
            self._loop()
        except BaseException as problem:  # told to all who wait, and by /health
            self._fail(problem)
        self._runner.end()
        with self._wake:
            self._wake.notify_all()

    def _loop(self) -> None:
        flying: deque[Any] = deque()  # what the runner sent, in order
        while self._go_on(is_busy=bool(flying)):
            self._take_in()
            while flying and self._drafts():  # guesses follow what is known
                self._read(flying)
            works = self._scheduler.plan(
                time.monotonic(), steps=self._steps(), drafts=self._drafts()
            )
            sent = [self._runner.send(work) for work in works]
            while flying:
                self._read(flying)
            for _ in sent:
                self._rates.sent()
            flying.extend(sent)
            if not self._options.overlaps:
                while flying:
                    self._read(flying)
        while flying:
            self._read(flying)
        for request_id in list(self._ids):
            self._scheduler.cancel(request_id, time.monotonic())

    def _go_on(self, *, is_busy: bool) -> bool:
        """Wait for something to do; False: the end."""
        with self._wake:
            while self._stage != "stopped":
                if is_busy or self._inbox or not self._scheduler.is_idle:
                    return True
                self._rates.idle()
                self._wake.wait(_IDLE_WAIT_S)
        return False

    def _take_in(self) -> None:
        now = time.monotonic()
        while self._inbox:
            self._inbox.popleft()(now)

    def _add(self, request: Request, hear: Hear, now: float) -> None:
        with self._wake:
            self._queued -= 1
            self._queued_tokens -= len(request.prompt) + request.max_tokens

        def told(progress: Progress) -> None:
            if progress.reason is not None:
                with self._wake:
                    self._ids.discard(request.id)
                    self._wake.notify_all()
            hear(progress)

        self._scheduler.add(request, told, now)

    def _drafts(self) -> int:
        """Tokens that each may guess: there are as many draws as seats."""
        most = min(self._options.drafts, MOST_GUESSES)
        if most == 0:
            return 0
        scheduler = self._scheduler
        asking = len(scheduler.running) + len(scheduler.waiting)
        seats = self.limits.seats
        return max(0, min(most, seats // max(1, min(asking, seats)) - 1))

    def _steps(self) -> int:
        """Decode steps of one dispatch."""
        step_s = self._rates.step_s
        if step_s <= 0:
            return 1
        return max(1, min(MOST_STEPS, int(DISPATCH_S / step_s)))

    def _read(self, flying: deque[Any]) -> None:
        sent = flying.popleft()
        drawn = self._runner.read(sent)
        now = time.monotonic()
        tokens = sum(len(one.tokens) for one in drawn)
        if sent.work.kind == "classify":
            tokens = sum(part.sequence.prompt_tokens for part in sent.work.parts)
        self._rates.read(sent.work, tokens, now)
        self._scheduler.take(sent.work, drawn, now)

    def _fail(self, problem: BaseException) -> None:
        from llmos_jax.telemetry import log

        text = f"{type(problem).__name__}: {problem}"
        log(f"error: the engine cannot go on: {text}")
        with self._wake:
            self._stage, self._problem = "failed", text
        self._take_in()
        self._scheduler.fail("the engine has failed; ask again later", time.monotonic())
