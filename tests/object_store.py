"""A real S3-speaking server on loopback (moto), and a proxy in front that hurts it.

Fixtures, for a conftest.py: `from object_store import moto, object_store`. A test gets
an empty bucket, and the environment that points at it; `faults` says what goes wrong.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

START_S = 60
"""Moto imports much, and two cores are shared."""

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code>'
    b"<Message>Access Denied</Message></Error>"
)

TROUBLE = {
    "slow_down": 0.08,
    "error": 0.06,
    "too_many": 0.04,
    "reset": 0.04,
    "lost": 0.04,
    "cut": 0.04,
}
"""Thirty requests of a hundred go wrong."""


class ObjectStore:
    """What a test holds: a bucket behind the proxy.

    Attributes:
        url: `s3://bucket`.
        endpoint: the proxy's.
        faults: share of requests by kind: slow_down (503), error (500), too_many (429),
            denied (403), reset (dropped unread), lost (done, then dropped unanswered),
            cut (half the answer), flip (a bit of a body that is read), spoil (a bit of
            a body that is written), delay (`delay_s` late).
        only: faults strike only requests whose `METHOD /path?query` holds this.
        etags: ETags that are told otherwise, both ways.
        injected: how often each kind struck.
        requests: `METHOD /path?query` of each request.
    """

    def __init__(self, backend: int, seed: int = 0):
        self.bucket = f"b{uuid.uuid4().hex[:12]}"
        self.url = f"s3://{self.bucket}"
        self.backend = backend
        self.faults: dict[str, float] = {}
        self.only = ""
        self.delay_s = 0.5
        self.etags: dict[str, str] = {}
        self.injected: Counter[str] = Counter()
        self.requests: list[str] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def keys(self) -> list[str]:
        """Names in the bucket, asked of the server itself."""
        link = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=30)
        link.request("GET", f"/{self.bucket}?list-type=2")
        page = link.getresponse().read().decode()
        return sorted(re.findall(r"<Key>([^<]*)</Key>", page))

    def make_bucket(self) -> None:
        link = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=30)
        link.request("PUT", f"/{self.bucket}")
        assert link.getresponse().status == 200

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def strike(self, request: str) -> str | None:
        """Return what goes wrong with this request, if anything."""
        with self._lock:
            self.requests.append(request)
            if self.only not in request:
                return None
            draw = self._random.random()
            for kind, share in self.faults.items():
                if draw < share:
                    self.injected[kind] += 1
                    return kind
                draw -= share
        return None

    def flip(self, data: bytes) -> bytes:
        """Return the bytes with one bit changed."""
        if not data:
            return data
        with self._lock:
            at = self._random.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _handler(store: ObjectStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _serve(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            fault = store.strike(f"{self.command} {self.path}")
            if fault == "delay":
                time.sleep(store.delay_s)
            if fault == "reset":
                return self._drop()
            if fault in _REFUSALS:
                return self._answer(*_REFUSALS[fault], {})
            if fault == "spoil":
                body = store.flip(body)
            with contextlib.closing(
                http.client.HTTPConnection("127.0.0.1", store.backend, timeout=60)
            ) as link:
                headers = dict(self.headers)
                told = {shown: real for real, shown in store.etags.items()}
                asked = headers.get("if-match", "")
                if asked in told:
                    headers["if-match"] = told[asked]
                link.request(self.command, self.path, body, headers)
                answer = link.getresponse()
                data = answer.read()
            if fault == "lost":
                return self._drop()
            if fault == "flip" and answer.status < 300:
                data = store.flip(data)
            return self._answer(
                answer.status, data, dict(answer.headers), cut=fault == "cut"
            )

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        def _answer(self, status, data, headers, *, cut=False):
            self.send_response(status)
            skipped = {"content-length", "connection", "transfer-encoding", "date"}
            for name, value in headers.items():
                if name.lower() not in skipped and name.lower() != "server":
                    self.send_header(name, store.etags.get(value, value))
            empty = self.command == "HEAD"
            said = headers.get("Content-Length", "0") if empty else str(len(data))
            self.send_header("Content-Length", said)
            self.end_headers()
            if not empty:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True

        def _drop(self):
            """Close with a reset, as a router that forgot the connection."""
            self.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            self.connection.close()
            self.close_connection = True

        def finish(self):
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def handle(self):
            with contextlib.suppress(OSError, ValueError):
                super().handle()

    return Handler


_REFUSALS = {
    "slow_down": (503, SLOW_DOWN),
    "error": (500, b""),
    "too_many": (429, b""),
    "denied": (403, DENIED),
}


@pytest.fixture(scope="session")
def moto(tmp_path_factory):
    """The port of a moto_server."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=file,
            stderr=file,
            env={**os.environ, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"},
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def object_store(moto, monkeypatch, tmp_path):
    """An empty bucket, without faults yet, and a cache of its own."""
    store = ObjectStore(moto)
    store.make_bucket()
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "STORAGE_EMULATOR")):
            monkeypatch.delenv(name)
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLMOS_CACHE", str(tmp_path / "llmos-cache"))
    try:
        yield store
    finally:
        store.close()
