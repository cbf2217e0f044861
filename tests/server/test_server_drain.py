"""The server as a process: its address, SIGTERM, and what was accepted before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from serving_here import NAME, tokenizer

from llmos_jax.errors import ConfigError
from llmos_jax.server import ServerOptions, run

HERE = Path(__file__).parent
PATH = "/v1/completions"
WHOLE = "0123456789"


@contextlib.contextmanager
def started(*, drain_s: float = 10, step_s: float = 0.1, port: int = 0, hangs_s=0):
    """A server in a process of its own; gives it and its address."""
    words = [sys.executable, str(HERE / "drained.py"), str(port)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE.parents[1]}:{HERE}",
        "JAX_PLATFORMS": "cpu",
    }
    process = subprocess.Popen(
        [*words, str(drain_s), str(step_s), str(hangs_s)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        yield process, line.split(" at ")[-1].strip()
    finally:
        process.kill()
        process.communicate()


def ask(address: str, *, stream: bool, n: int = 1) -> list[str]:
    """The texts of an answer, and how each ended; or the error of a stream."""
    body = {"prompt": "a", "n": n, "stream": stream, "max_tokens": 100}
    reply = httpx.post(address + PATH, json=body, timeout=30)
    if not stream:
        if reply.status_code != 200:
            return [str(reply.status_code)]
        return [one["text"] for one in reply.json()["choices"]]
    found = [""] * n
    for line in reply.text.split("\n\n"):
        data = line.removeprefix("data: ")
        if data.startswith("{"):
            event = json.loads(data)
            if "error" in event:
                return [event["error"]["code"]]
            for choice in event["choices"]:
                found[choice["index"]] += choice["text"]
    return found


def ask_all(address: str) -> tuple[list[threading.Thread], list[list[str]]]:
    """Ask in six threads, half of them for streams; they are accepted on return."""
    found: list[list[str]] = []
    threads = [
        threading.Thread(
            target=lambda stream=bool(index % 2): found.append(
                ask(address, stream=stream, n=2)
            )
        )
        for index in range(6)
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while httpx.get(f"{address}/state").json()["state"]["running"] < 12:
        assert time.monotonic() < until
        time.sleep(0.02)
    return threads, found


def test_sigterm_loses_no_accepted_request():
    with started() as (process, address):
        assert httpx.get(f"{address}/ready").status_code == 200
        threads, found = ask_all(address)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert httpx.get(f"{address}/ready").status_code == 503
        assert httpx.get(f"{address}/health").status_code == 200
        late = httpx.post(address + PATH, json={"prompt": "a"})
        assert late.status_code == 503 and int(late.headers["retry-after"]) > 0
        for thread in threads:
            thread.join(20)
        assert found == [[WHOLE, WHOLE]] * 6
        out, _ = process.communicate(timeout=10)
        assert process.returncode == 0
        said = json.loads(out)
        assert said["drained"] is True and said["requests"] == 7


def test_what_does_not_end_in_time_is_told_so():
    with started(drain_s=0.3, step_s=0.5) as (process, address):
        threads, found = ask_all(address)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        assert sorted(found) == [["503"]] * 3 + [["unavailable"]] * 3
        out, _ = process.communicate(timeout=10)
        assert process.returncode == 0 and json.loads(out)["drained"] is False
        assert time.monotonic() - begun < 5


def test_a_second_signal_ends_it_at_once():
    with started(drain_s=60, step_s=1) as (process, address):
        threads, _ = ask_all(address)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert process.returncode == 0
        for thread in threads:
            thread.join(20)


def test_an_idle_server_stops_at_once():
    with started() as (process, address):
        with httpx.Client() as idle:  # a connection that is kept open
            idle.get(f"{address}/health")
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=5)
        assert process.returncode == 0


def test_a_port_that_is_taken_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with started(port=taken.getsockname()[1]) as (process, line):
            assert line.startswith("error: cannot listen") and "--port" in line
            process.communicate(timeout=5)
            assert process.returncode == 2


def test_an_engine_that_hangs_does_not_keep_the_process():
    with started(drain_s=0, step_s=0.1, hangs_s=60) as (process, _):
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=15)
        assert process.returncode == 0


def refused(**options) -> str:
    """What `run` says of options that cannot be; the engine is stopped then."""
    engine = FakeEngine()
    with pytest.raises(ConfigError) as caught:
        run(engine, tokenizer(), NAME, ServerOptions(port=0, **options))
    assert engine.stage == "stopped"
    return str(caught.value)


@pytest.mark.parametrize("host", ["no such host", "203.0.113.7"])
def test_a_host_that_is_not_here_is_a_config_error(host):
    said = refused(host=host)
    assert "--host" in said or "cannot listen" in said


def test_a_certificate_that_is_none_is_a_config_error(tmp_path):
    path = tmp_path / "cert.pem"
    path.write_text("no certificate")
    assert "--tls-cert" in refused(tls_cert=path, tls_key=path)
    assert "--tls-cert" in refused(tls_cert=path, tls_key=tmp_path / "none")
