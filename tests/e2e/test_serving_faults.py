"""What goes wrong around a real server: clients, overload, signals, files, weights."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from server_process import (
    CONTEXT,
    PATH,
    SEATS,
    events_of,
    started,
    text_of,
    wait_until,
    write_model,
)

QUEUE = 200
SHORT = {"prompt": "hello", "temperature": 0, "max_tokens": 20}
LONG = {**SHORT, "max_tokens": 2000}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "it"
    with started(model, folder, "--max-queue", str(QUEUE)) as made:
        made.wait_ready()
        yield made
        assert made.stop()["code"] == 0


@pytest.fixture(scope="module")
def right(server):
    """What SHORT is answered."""
    return server.post(PATH, SHORT).json()["choices"][0]["text"]


def says_right(server, right) -> bool:
    return server.post(PATH, SHORT).json()["choices"][0]["text"] == right


def freed(server) -> bool:
    """Whether all pages came back, and nothing was compiled."""
    state = server.wait_idle()
    return state["pages_held"] == 0 and state["unplanned_compiles"] == 0


def ask_many(server, bodies, **headers) -> list[httpx.Response]:
    """Ask all at once, each over a connection of its own."""

    async def all_of_them():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            address = server.address + PATH
            return await asyncio.gather(
                *(client.post(address, json=one, headers=headers) for one in bodies)
            )

    return asyncio.run(all_of_them())


@contextlib.contextmanager
def busy(server):
    """All seats are taken by streams that are left in the end."""
    body = {**LONG, "stream": True, "n": 4 * SEATS}
    with httpx.stream("POST", server.address + PATH, json=body, timeout=60) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()  # whose end is the end of the connection
        next(lines)
        yield


def test_who_hangs_up_in_the_middle_leaves_no_pages(server, right):
    with busy(server):
        assert server.state()["pages_held"] > 0
    assert freed(server) and says_right(server, right)


def test_who_does_not_wait_for_the_whole_answer_leaves_no_pages(server, right):
    with busy(server), pytest.raises(httpx.ReadTimeout):
        server.post(PATH, LONG, timeout=0.1)
    assert freed(server) and says_right(server, right)


@contextlib.contextmanager
def deaf(server, body):
    """A client that asks and never reads."""
    host, port = server.address.removeprefix("http://").split(":")
    text = json.dumps(body).encode()
    with socket.socket() as ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ear.connect((host, int(port)))
        ear.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: "
            b"application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text)
        )
        yield ear


def test_who_does_not_read_is_cut_off_and_others_go_on(server, right):
    body = {**LONG, "stream": True, "n": 2 * SEATS, "logprobs": 5}
    made = server.state()["generated_tokens"]
    with deaf(server, body):
        wait_until(lambda: server.state()["generated_tokens"] > made, 30)
        first = server.post(PATH, {**SHORT, "priority": -1})
        assert first.json()["choices"][0]["text"] == right
        assert freed(server)
        made = server.state()["generated_tokens"] - made
    assert made < 2 * SEATS * 2000  # it was not left to say everything into the void


def test_200_connections_at_once_are_all_answered_right(server, right):
    bodies = [{**SHORT, "stream": bool(index % 2)} for index in range(200)]
    for body, reply in zip(bodies, ask_many(server, bodies)):
        assert reply.status_code == 200, reply.text
        said = text_of(reply.text) if body["stream"] else None
        assert (said or reply.json()["choices"][0]["text"]) == right
    assert freed(server)


def test_of_ten_times_too_much_some_is_refused_and_the_rest_answered(server, right):
    asked = [{**SHORT, "n": 20, "max_tokens": 100}] * (10 * QUEUE // 20)
    replies = ask_many(server, asked)
    refused = [reply for reply in replies if reply.status_code == 429]
    answered = [reply for reply in replies if reply.status_code == 200]
    assert len(refused) + len(answered) == len(asked)
    assert refused and len(answered) >= QUEUE // 20
    for reply in refused:
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "overloaded"
    for reply in answered:
        texts = [one["text"] for one in reply.json()["choices"]]
        assert len(texts) == 20 and all(one.startswith(right) for one in texts)
    assert freed(server) and says_right(server, right)


def test_a_deadline_that_passes_in_the_queue_is_told_so(server, right):
    with busy(server):
        reply = server.post(PATH, {**SHORT, "timeout": 0.02})
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "deadline_exceeded"
    assert freed(server) and says_right(server, right)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(server, right):
    reply = server.post(PATH, {**SHORT, "prompt": "x" * (CONTEXT + 52)})
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert str(CONTEXT) in message and str(CONTEXT + 52) in message
    assert says_right(server, right)


def damage(folder) -> int:
    """Flip a byte of each kept program, and cut every second short; how many."""
    files = sorted(folder.rglob("*.program"))
    for index, file in enumerate(files):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data if index % 2 else data[: len(data) // 2])
    return len(files)


@pytest.mark.slow
def test_a_killed_server_starts_again_from_damaged_files(
    server, model, right, tmp_path, shared_cache
):
    """`server` is only there for its programs."""
    with started(model, tmp_path / "killed") as killed:
        killed.wait_ready()
        assert "compiled" not in killed.log  # all was found in the cache
        with pytest.raises(httpx.HTTPError), busy(killed):
            killed.process.kill()
            killed.post(PATH, SHORT)
    count = damage(shared_cache)
    assert count > 10
    with started(model, tmp_path / "again") as again:
        again.wait_ready()
        assert again.log.count("cannot be used") == count
        assert again.log.count("anew") == count
        assert says_right(again, right)
        sigterm_under_load(again, right)


def sigterm_under_load(server, right):
    """What was accepted ends within the drain, and no more is taken."""
    body = {**LONG, "stream": True, "n": SEATS}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, PATH, body) for _ in range(8)]
        wait_until(lambda: server.state()["waiting"] >= 6 * SEATS, 30)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping:" in server.log, 5)
        try:
            assert server.post(PATH, SHORT).status_code == 503
        except httpx.ConnectError:
            pass
        replies = [one.result(60) for one in asked]
    accepted = [reply for reply in replies if reply.status_code == 200]
    assert len(accepted) >= 6
    for reply in replies:
        assert reply in accepted or reply.status_code == 503
    for reply in accepted:
        assert "error" not in reply.text and text_of(reply.text).startswith(right)
        for index in range(SEATS):
            assert len(text_of(reply.text, index)) == 2000
        assert reasons_of(reply.text) == ["length"] * SEATS
    ended = server.ended(30)
    assert ended["code"] == 0 and ended["drained"] is True
    assert time.monotonic() - begun < 30


def reasons_of(text) -> list[str]:
    """How the choices of a stream ended."""
    choices = [choice for event in events_of(text) for choice in event["choices"]]
    return [one["finish_reason"] for one in choices if one["finish_reason"]]


@pytest.fixture(scope="module")
def broken(server, tmp_path_factory):
    """A server of a model with NaN in it, and with keys; `server` compiled for it."""
    folder = tmp_path_factory.mktemp("broken")
    model = write_model(folder, broken="layers.ffn.up.scale")
    flags = ["--api-key", "first", "--api-key", "second"]
    with started(model, folder / "it", *flags) as made:
        made.wait_ready()
        assert "compiled" not in made.log
        yield made
        assert made.stop()["code"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_nan_in_the_weights_is_said_and_the_server_stays(broken, stream):
    headers = {"authorization": "Bearer second"}
    for _ in range(2):
        reply = broken.post(PATH, {**SHORT, "stream": stream}, headers=headers)
        assert reply.status_code == 500
        assert "not finite" in reply.json()["error"]["message"]
    assert broken.get("/health").status_code == 200
    assert broken.get("/ready").status_code == 200
    assert freed(broken)


@pytest.mark.parametrize("key", ["", "Bearer third", "Basic first", "first"])
def test_a_wrong_key_is_401(broken, key):
    reply = broken.post(PATH, SHORT, headers={"authorization": key} if key else {})
    assert reply.status_code == 401
    assert reply.json()["error"]["type"] == "authentication_error"
