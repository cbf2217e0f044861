"""A real server in this process, and clients for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn
from fake_engine import FakeEngine

from llmos_jax.data import Tokenizer, bytes_tokenizer
from llmos_jax.server import ServerOptions, make_app
from llmos_jax.server.door import Door
from llmos_jax.server.run import config_of

NAME = "fake"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> Tokenizer:
    """256 bytes, and a template to converse by."""
    return bytes_tokenizer().with_chat_template(TEMPLATE)


def app_of(engine: FakeEngine, **options: Any) -> Door:
    """The app over an engine and the byte tokenizer."""
    made = options.pop("tokenizer", None) or tokenizer()
    return make_app(engine, made, NAME, ServerOptions(**options))


@contextlib.contextmanager
def client_of(engine: FakeEngine, **options: Any) -> Iterator[Client]:
    """A client that calls the app without a network."""
    yield Client(app_of(engine, **options))
    engine.stop()


class Client:
    """Calls an app in a loop of its own for each request."""

    def __init__(self, app: Door):
        self.app = app

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        """POST JSON."""
        return self.send("POST", path, json=body, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        """GET."""
        return self.send("GET", path, **more)

    def send(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Send any request and read the whole answer."""

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://here", timeout=20
            ) as client:
                return await client.request(method, path, **more)

        return asyncio.run(ask())


@contextlib.contextmanager
def served(engine: FakeEngine, **options: Any) -> Iterator[tuple[str, Door]]:
    """A uvicorn on a free port; gives its address and the app."""
    app = app_of(engine, **options)
    config = config_of(app, app.room.options)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    scheme = "https" if options.get("tls_cert") else "http"
    try:
        yield f"{scheme}://127.0.0.1:{port}", app
    finally:
        server.should_exit = True
        thread.join(10)
        engine.stop()
