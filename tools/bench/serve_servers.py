"""Start and stop the servers that serve.py compares.

Not a bench of its own. A server is a process with a log file and an address.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from workers import note

START_S = 300.0
"""Until a server is given up that does not get ready."""
POLL_S = 0.02
SPARE = 64
"""Tokens of a sequence that nobody needs, for llama-server never to cut one."""
LLAMA = "LLMOS_LLAMA_SERVER"
HOW = (
    f"no llama-server of llama.cpp is found. Build it (cmake -S llama.cpp -B build && "
    f"cmake --build build --target llama-server) and set {LLAMA} to it, or leave it "
    "out with --ours-only."
)


class ServerDied(Exception):
    """A server ended before it was ready."""

    def __init__(self, what: str, status: int | None):
        super().__init__(what)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]
    ready_s: float
    """From its start until it took requests."""

    @property
    def model(self) -> str:
        """What it calls its model."""
        name: str = self.get("/v1/models")["data"][0]["id"]
        return name

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def cpu_s(self) -> float:
        """Seconds that its threads have run."""
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        end(self.process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here, politely first."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def start(command: list[str], log: pathlib.Path, path: str) -> Server:
    """Start a server with a free --port and wait until `path` answers 200.

    Raises:
        ServerDied: it ended, or took too long.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    begun = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    name = os.path.basename(command[0])
    try:
        while not _answers(url + path):
            status = process.poll()
            if status is not None:
                last = log.read_text(errors="replace").strip()[-500:]
                raise ServerDied(f"{name} ended with status {status}: {last}", status)
            if time.perf_counter() - begun > START_S:
                raise ServerDied(f"{name} was not ready after {START_S:g} s", None)
            time.sleep(POLL_S)
    except BaseException:
        end(process)
        raise
    return Server(url=url, process=process, ready_s=time.perf_counter() - begun)


def start_ours(model: pathlib.Path, folder: pathlib.Path) -> Server:
    """Serve a model of ours."""
    command = [sys.executable, "-m", "llmos_jax.serve", str(model)]
    return start(command, folder / "ours.log", "/ready")


def start_theirs(
    program: str,
    model: pathlib.Path,
    folder: pathlib.Path,
    *,
    threads: int,
    clients: int,
    context: int,
) -> Server:
    """Serve a GGUF file with llama-server, in the best form that works here.

    Its repacked weights are faster where they work; on some machines (AMX in a virtual
    one) they end the process.
    """
    command = [program, "-m", str(model), "-t", str(threads), "-tb", str(threads)]
    command += ["-np", str(clients), "-c", str(clients * (context + SPARE))]
    command += ["--no-webui"]
    log = folder / "theirs.log"
    try:
        return start(command, log, "/health")
    except ServerDied as died:
        if died.status is None or died.status >= 0:
            raise
        note(f"llama-server runs without repacked weights, which it dies of: {died}")
        return start([*command, "--no-repack"], log, "/health")


def llama_server() -> str | None:
    """The program, or None where there is none."""
    named = os.environ.get(LLAMA)
    return shutil.which(named) if named else shutil.which("llama-server")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
