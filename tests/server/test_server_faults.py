"""Overload, deadlines, failures, and clients that go away or do not read."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from dataclasses import replace

import httpx
import pytest
from fake_engine import CONTEXT, LIMITS, FakeEngine, say
from serving_here import client_of, served

from llmos_jax.errors import Overloaded, ServeError, Stopping

PATH = "/v1/completions"
BODY = {"prompt": "a", "temperature": 0}


def test_too_much_is_429_with_a_time_to_come_again():
    with client_of(FakeEngine(refuse=Overloaded("too much waits.", 2.5))) as client:
        for stream in (False, True):
            reply = client.post(PATH, {**BODY, "stream": stream})
            assert reply.status_code == 429 and reply.headers["retry-after"] == "3"
            assert reply.json()["error"]["type"] == "rate_limit_error"


def test_where_one_choice_has_no_room_none_is_kept():
    with client_of(FakeEngine(holds=True)) as client:
        engine = client.app.room.engine
        took, submit = [], engine.submit

        def second_time(request, hear):
            if took:
                raise Overloaded("no room.", 1)
            took.append(request)
            submit(request, hear)

        engine.submit = second_time
        assert client.post(PATH, {**BODY, "n": 2}).status_code == 429
        assert list(engine.wait_for_end(1).values()) == ["cancelled"]


def test_an_engine_that_stops_is_503():
    with client_of(FakeEngine(refuse=Stopping("no more."))) as client:
        reply = client.post(PATH, BODY)
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0


def test_an_engine_that_failed_is_503_everywhere():
    engine = FakeEngine(refuse=ServeError("the device is gone."))
    engine.stage = "failed"
    with client_of(engine) as client:
        assert client.post(PATH, BODY).status_code == 503
        assert client.get("/health").status_code == 503
        assert client.get("/health").json() == {"status": "failed", "problem": "burnt"}
        assert client.get("/ready").status_code == 503
        assert client.get("/metrics").status_code == 200


def test_not_ready_until_the_engine_is():
    engine = FakeEngine()
    engine.stage = "starting"
    with client_of(engine) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        engine.stage = "ready"
        assert client.get("/ready").status_code == 200


def test_a_request_that_fails_fails_alone():
    engine = FakeEngine(problem="this prompt gives NaN.")
    with client_of(engine) as client:
        reply = client.post(PATH, BODY)
        assert reply.status_code == 500 and "NaN" in reply.json()["error"]["message"]
        engine.problem = ""
        assert client.post(PATH, BODY).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_our_own_in_an_answer_fails_it_alone(stream, monkeypatch, capfd):
    monkeypatch.setattr("llmos_jax.server.words.Words.push", lambda *_: 1 / 0)
    with client_of(FakeEngine(step_s=0.01)) as client:
        reply = client.post(PATH, {**BODY, "stream": stream})
        assert reply.status_code == 500 and "its log" in reply.text
        ended = client.app.room.engine.wait_for_end(1)
        assert list(ended.values()) == ["cancelled"]
        monkeypatch.undo()
        assert client.post(PATH, BODY).status_code == 200
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_tokens_that_the_tokenizer_does_not_know_say_nothing():
    """Models pad their vocabularies."""
    with client_of(FakeEngine(lambda _: [97, 300, 98, 256])) as client:
        body = {**BODY, "logprobs": 1}
        assert client.post(PATH, body).json()["choices"][0]["text"] == "ab"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["header", "body"])
def test_a_deadline_that_passes_in_the_queue_is_504(stream, way):
    with client_of(FakeEngine(holds=True)) as client:
        more = {"headers": {"x-llmos-deadline-s": "0.05"}} if way == "header" else {}
        body = {**BODY, "stream": stream} | ({} if more else {"timeout": 0.05})
        reply = client.post(PATH, body, **more)
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "deadline_exceeded"


def test_a_deadline_that_passes_later_cuts_the_answer():
    with client_of(FakeEngine(step_s=0.02)) as client:
        body = {**BODY, "max_tokens": 200, "timeout": 0.2}
        choice = client.post(PATH, body).json()["choices"][0]
        assert choice["finish_reason"] == "abort" and choice["text"].startswith("ab")


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_not_served_on(stream):
    with served(FakeEngine(step_s=0.02)) as (address, app):
        body = {**BODY, "max_tokens": 200, "stream": stream, "n": 2}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + PATH, json=body, timeout=0.2 if not stream else 0.01)
        ended = app.room.engine.wait_for_end(2)
        assert list(ended.values()) == ["cancelled"] * 2
        wait_until(lambda: app.room.open_requests == 0)


def test_a_stream_that_is_left_in_the_middle_is_cancelled():
    with served(FakeEngine(step_s=0.02)) as (address, app):
        body = {**BODY, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", address + PATH, json=body) as reply:
            next(reply.iter_lines())
        assert list(app.room.engine.wait_for_end(1).values()) == ["cancelled"]


@contextlib.contextmanager
def deaf_client(**options):
    """A client of an endless stream that does not read: its window and the server's
    buffer fill, then tokens pile up. Gives the address, the app and its socket."""
    endless = 1 << 22
    engine = FakeEngine(
        lambda request: [97] * (endless if request.priority else 3),
        chunk=200,
        limits=replace(LIMITS, context=endless + 10),
    )
    with served(engine, **options) as (address, app), socket.socket() as deaf:
        host, port = address.removeprefix("http://").split(":")
        body = {**BODY, "max_tokens": endless, "stream": True, "priority": 1}
        text = json.dumps({**body, "logprobs": 5}).encode()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: "
            b"application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text)
        )
        yield address, app, deaf


def test_who_does_not_read_is_given_up_and_others_go_on():
    with deaf_client(max_unread_tokens=20_000) as (address, app, deaf):
        assert list(app.room.engine.wait_for_end(1, 20).values()) == ["cancelled"]
        reply = httpx.post(address + PATH, json={**BODY, "max_tokens": 3}, timeout=5)
        assert reply.json()["choices"][0]["text"] == "aaa"
        deaf.close()
        wait_until(lambda: app.room.open_requests == 0)


def test_who_does_not_read_for_long_is_hung_up_on():
    with deaf_client(max_unread_tokens=1 << 30, stall_s=0.3) as (_, app, _deaf):
        assert list(app.room.engine.wait_for_end(1, 20).values()) == ["cancelled"]
        wait_until(lambda: app.room.open_requests == 0)


def test_silence_is_broken_by_comments():
    with client_of(FakeEngine(say("ab"), step_s=0.2), ping_s=0.05) as client:
        text = client.post(PATH, {**BODY, "stream": True}).text
        assert ": still here\n\n" in text and text.endswith("data: [DONE]\n\n")


def test_many_at_once_get_each_their_own():
    with served(FakeEngine(chunk=2)) as (address, _):
        found = {}

        def ask(seed: int) -> None:
            body = {"prompt": "a", "seed": seed, "max_tokens": 20, "stream": seed % 2}
            body["stream"] = bool(seed % 2)
            reply = httpx.post(address + PATH, json=body, timeout=20)
            found[seed] = reply.text

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, text in found.items():
            if seed % 2:
                lines = text.split("\n\n")[:-2]
                chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
                said = "".join(one["choices"][0]["text"] for one in chunks)
            else:
                said = json.loads(text)["choices"][0]["text"]
            wanted = [chr(97 + (seed + step) % 26) for step in range(20)]
            assert said == "".join(wanted), seed


def test_the_longest_prompt_and_answer_fit():
    with client_of(FakeEngine()) as client:
        body = {**BODY, "prompt": "x" * (CONTEXT - 1), "max_tokens": 1}
        assert client.post(PATH, body).status_code == 200


def wait_until(holds, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    assert holds()
