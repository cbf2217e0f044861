"""Serve until told to stop, then let what was accepted end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from llmos_jax.data import Tokenizer
from llmos_jax.errors import ConfigError
from llmos_jax.server.app import make_app
from llmos_jax.server.door import Door
from llmos_jax.server.options import ServerOptions
from llmos_jax.server.room import Engine, Room
from llmos_jax.telemetry import log

LAST_WORDS_S = 5.0
"""Seconds in which answers that ended are still written out: a judgement."""
IDLE_S = 75
"""Seconds that an idle connection is kept: more than the 60 s of common proxies."""
MOST_HEADER_BYTES = 64 << 10


def run(
    engine: Engine, tokenizer: Tokenizer, model_name: str, options: ServerOptions
) -> dict[str, Any]:
    """Serve a model over HTTP in this thread, the main one, and stop the engine.

    SIGTERM and SIGINT make it drain: no more is taken, and what was accepted has
    `options.drain_s` to end. A second signal ends it at once.

    Returns:
        What it came to: `url`, `requests`, and whether all was `drained`.

    Raises:
        ConfigError: the address is taken, or the certificate cannot be used.
    """
    try:
        app = make_app(engine, tokenizer, model_name, options)
        _check_tls(options)
        listener = _listen(options.host, options.port)
        with contextlib.closing(listener):
            return asyncio.run(_serve(app, listener))
    except BaseException:
        _beside(engine.stop).join(LAST_WORDS_S)
        raise


class _Server(uvicorn.Server):
    """uvicorn without its own way to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(app: Door, listener: socket.socket) -> dict[str, Any]:
    room, options = app.room, app.room.options
    told, hurry = asyncio.Event(), asyncio.Event()

    def heard() -> None:
        (hurry if told.is_set() else told).set()

    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, heard)
    server = _Server(config_of(app, options))
    serving = asyncio.create_task(server.serve([listener]))
    url = _url(listener, options)
    log(f"serving {room.model_name} at {url}")
    _beside(lambda: _warm_up(room))
    await _first(serving, told.wait())
    drained = await _drain(room, hurry)
    if room.traces is not None:
        await asyncio.to_thread(room.traces.close)
    server.should_exit = True
    server.force_exit = hurry.is_set()
    await serving
    return {
        "url": url,
        "model": room.model_name,
        "requests": room.answered,
        "drained": drained,
    }


def _warm_up(room: Room) -> None:
    """Read the vocabulary for grammars, so that the first one need not wait."""
    if room.is_classifier:
        return
    with contextlib.suppress(ConfigError):  # said to whom asks for a grammar
        room.grammars.prepare()


async def _drain(room: Room, hurry: asyncio.Event) -> bool:
    """Take no more, wait for the rest, stop the engine; return whether all ended."""
    room.is_draining = True
    seconds = room.options.drain_s
    log(f"stopping: {room.open_requests} open requests have {seconds:g} s to end")
    begun = time.monotonic()
    found: list[bool] = []
    draining = _beside(lambda: found.append(room.engine.drain(seconds)))
    while draining.is_alive() and not hurry.is_set():
        await asyncio.sleep(0.01)
    ended = found == [True]
    stopping = _beside(room.engine.stop)
    until = time.monotonic() + (0 if hurry.is_set() else LAST_WORDS_S)
    while (stopping.is_alive() or room.open_requests) and time.monotonic() < until:
        await asyncio.sleep(0.01)
    took = time.monotonic() - begun
    log(f"{'drained' if ended else 'stopped before all was done'} after {took:.1f} s")
    return ended and not room.open_requests


def _beside(work: Callable[[], object]) -> threading.Thread:
    """Do something beside the loop: an engine that hangs must not keep the process."""
    thread = threading.Thread(target=work, name="beside", daemon=True)
    thread.start()
    return thread


async def _first(task: asyncio.Task[Any], other: Any) -> None:
    """Wait for either; the second is given up."""
    watch = asyncio.ensure_future(other)
    await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    watch.cancel()


def config_of(app: Door, options: ServerOptions) -> uvicorn.Config:
    """Return how uvicorn is to run the app."""
    return uvicorn.Config(
        app,
        http="h11",  # the one that bounds headers
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )


def _check_tls(options: ServerOptions) -> None:
    if options.tls_cert is None or options.tls_key is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A key that asks for a password would wait for a terminal.
        context.load_cert_chain(options.tls_cert, options.tls_key, password=lambda: "")
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f"--tls-cert {options.tls_cert} and --tls-key {options.tls_key} cannot be "
            f"used: {problem}. Give a PEM certificate and its PEM key, without a "
            "password."
        ) from None


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as problem:
        raise ConfigError(
            f"--host {host} is no address of this machine: {problem}."
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as problem:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {problem.strerror}. Choose another "
            "with --port; 0 takes any that is free."
        ) from None
    return listener


def _url(listener: socket.socket, options: ServerOptions) -> str:
    scheme = "http" if options.tls_cert is None else "https"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"
