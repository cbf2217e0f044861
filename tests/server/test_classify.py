"""/v1/classify over real HTTP and a real model: answers, bad bodies, faults."""

from __future__ import annotations

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
import numpy as np
import pytest
from classifiers import CONTEXT, LABELS, classifying, logits_of, write_classifier
from fake_engine import FakeEngine
from serving_here import NAME, served

from llmos_jax.data import bytes_tokenizer
from llmos_jax.errors import ServeError
from llmos_jax.serving import Options

PATH = "/v1/classify"
TEXTS = ["hello there", "", "what is it?", "é" * 7, "hello there"]


@pytest.fixture(scope="module")
def address():
    with classifying(seats=4, options=Options(max_queue=64)) as engine:
        with served(engine, tokenizer=bytes_tokenizer()) as (found, _):
            yield found


def ask(address, body, **more) -> httpx.Response:
    return httpx.post(address + PATH, json=body, timeout=60, **more)


def probabilities(ids) -> np.ndarray:
    logits = logits_of(ids or [0]).astype(np.float64)
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def test_an_answer_is_vllms_with_names_for_its_probabilities(address):
    reply = ask(address, {"model": NAME, "input": TEXTS, "user": "me"})
    assert reply.status_code == 200, reply.text
    said = reply.json()
    assert said["id"].startswith("classify-") and said["object"] == "list"
    assert abs(said["created"] - time.time()) < 60 and said["model"] == NAME
    assert said["labels"] == list(LABELS)
    tokens = sum(max(1, len(text.encode())) for text in TEXTS)
    assert said["usage"] == {
        "prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0,
    }  # fmt: skip
    assert [one["index"] for one in said["data"]] == [0, 1, 2, 3, 4]
    for text, one in zip(TEXTS, said["data"], strict=True):
        wanted = probabilities(list(text.encode()))
        np.testing.assert_allclose(one["probs"], wanted, atol=2e-5)
        assert one["label"] == LABELS[int(wanted.argmax())]
        assert one["num_classes"] == 4 and "top" not in one
        assert sum(one["probs"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "count"),
    [("a", 1), (["a"], 1), ([1, 2, 3], 1), ([[1, 2], [3]], 2), ("", 1), ([""], 1)],
)
def test_inputs_are_texts_or_ids(address, given, count):
    reply = ask(address, {"input": given, "another_field": 1})
    assert reply.status_code == 200 and len(reply.json()["data"]) == count


def test_top_names_the_likeliest(address):
    one = ask(address, {"input": "what?", "top": 2}).json()["data"][0]
    best = sorted(zip(one["probs"], LABELS), reverse=True)[:2]
    assert [(two["prob"], two["label"]) for two in one["top"]] == best
    assert len(ask(address, {"input": "a", "top": 99}).json()["data"][0]["top"]) == 4


def test_without_activation_there_are_logits(address):
    body = {"input": "what?", "use_activation": False}
    found = ask(address, body).json()["data"][0]["probs"]
    np.testing.assert_allclose(found, logits_of(list(b"what?")), atol=2e-5)


def test_a_long_text_is_refused_unless_it_may_be_cut(address):
    long = "".join(chr(97 + index % 26) for index in range(100))
    reply = ask(address, {"input": ["short", long]})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["code"] == "context_length_exceeded" and error["param"] == "input"
    assert "text 1" in error["message"] and "100 tokens" in error["message"]
    for more, kept in (
        ({"truncate_prompt_tokens": -1}, long[:CONTEXT]),
        ({"truncate_prompt_tokens": 7}, long[:7]),
        ({"truncate_prompt_tokens": 7, "truncation_side": "left"}, long[-7:]),
    ):
        said = ask(address, {"input": long, **more}).json()
        assert said["usage"]["prompt_tokens"] == len(kept)
        np.testing.assert_allclose(
            said["data"][0]["probs"], probabilities(list(kept.encode())), atol=2e-5
        )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": 7}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [5000]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "top": 0}, "top"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 41}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "truncation_side": "middle"}, "truncation_side"),
    ],
)
def test_what_cannot_be_is_400_and_named(address, body, param):
    reply = ask(address, body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_bodies_that_are_none(address):
    plain = {"content-type": "application/json"}
    for text, status in ((b"{", 400), (b'{"input": "\xff"}', 400), (b"[]", 400)):
        reply = httpx.post(address + PATH, content=text, headers=plain)
        assert reply.status_code == status
    assert httpx.post(address + PATH, content=b"{}").status_code == 415
    assert httpx.get(address + PATH).status_code == 405
    assert ask(address, {"input": "a", "model": "other"}).status_code == 404
    half = httpx.post(address + PATH, content=b'{"input": "\\ud800"}', headers=plain)
    assert half.status_code == 400


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
)
def test_what_a_classifier_does_not_do_names_what_it_does(address, path):
    reply = httpx.post(address + path, json={"prompt": "a"})
    assert reply.status_code == 404
    assert "classifies texts" in reply.json()["error"]["message"]
    assert PATH in reply.json()["error"]["message"]
    assert path not in httpx.get(f"{address}/openapi.json").json()["paths"]


def test_a_language_model_does_not_classify():
    with served(FakeEngine()) as (found, _):
        reply = ask(found, {"input": "a"})
        assert reply.status_code == 404
        assert "/v1/completions" in reply.json()["error"]["message"]
        assert PATH not in httpx.get(f"{found}/openapi.json").json()["paths"]


def test_a_thousand_texts_in_one_request_keep_their_order(address):
    texts = [f"{index:03d}" * (1 + index % 12) for index in range(1000)]
    reply = ask(address, {"input": texts})
    assert reply.status_code == 200
    found = [one["probs"] for one in reply.json()["data"]]
    assert [one["index"] for one in reply.json()["data"]] == list(range(1000))
    for index in (0, 1, 11, 500, 999):
        wanted = probabilities(list(texts[index].encode()))
        np.testing.assert_allclose(found[index], wanted, atol=2e-5)


def test_the_rest_of_the_server_knows_it(address):
    ask(address, {"input": "a"})
    models = httpx.get(f"{address}/v1/models").json()["data"]
    assert [(one["id"], one["max_model_len"]) for one in models] == [(NAME, CONTEXT)]
    state = httpx.get(f"{address}/state").json()
    assert state["limits"]["labels"] == list(LABELS)
    assert state["state"]["texts"] > 0 and state["latency"]["ttft"]["count"] > 0
    metrics = httpx.get(f"{address}/metrics").text
    for line in (
        r'llmos_batches_total{engine="0",model_name="fake",rows="4"}',
        "llmos_classified_texts_total",
        "llmos_waiting_requests",
        "vllm:e2e_request_latency_seconds_bucket",
    ):
        assert line in metrics
    page = httpx.get(address).text
    assert '<html data-serves="classes"' in page
    assert httpx.post(f"{address}/tokenize", json={"prompt": "ab"}).json()["count"] == 2


@pytest.fixture
def held():
    """An engine with one seat that waits before its batches, and its server."""
    options = Options(max_queue=2)
    with classifying(seats=1, context=16, options=options) as engine:
        gate, send = threading.Event(), engine._runner.send
        engine._runner.send = lambda work: gate.wait(30) and send(work)
        with served(engine, tokenizer=bytes_tokenizer()) as (found, _):
            try:
                yield found, engine, gate
            finally:
                gate.set()


def in_threads(address, count: int) -> tuple[list[threading.Thread], list[int]]:
    """Ask from so many threads; 0 is who found the door closed."""
    found: list[int] = []

    def one() -> None:
        try:
            found.append(ask(address, {"input": "a"}).status_code)
        except httpx.ConnectError:
            found.append(0)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


def wait_until(is_so, seconds=10):
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_full_queue_is_429_with_a_time(held):
    address, engine, gate = held
    threads, found = in_threads(address, 3)
    wait_until(lambda: engine.state().running + engine.state().waiting == 3)
    reply = ask(address, {"input": "a"})
    assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
    gate.set()
    for thread in threads:
        thread.join(30)
    assert found == [200] * 3


def test_a_deadline_that_passes_is_504(held):
    address, _, gate = held
    threads, _ = in_threads(address, 1)
    time.sleep(0.2)
    threading.Timer(0.3, gate.set).start()
    assert ask(address, {"input": "a", "timeout": 0.05}).status_code == 504
    for thread in threads:
        thread.join(30)


def test_a_client_that_hangs_up_is_forgotten(held):
    address, engine, gate = held
    host, port = address.removeprefix("http://").split(":")
    threads, found = in_threads(address, 1)
    wait_until(lambda: engine.state().running == 1)
    body = json.dumps({"input": "b"}).encode()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /v1/classify HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
            % len(body)
            + body
        )
        wait_until(lambda: engine.state().waiting == 1)
    time.sleep(0.3)
    gate.set()
    threads[0].join(30)
    wait_until(lambda: engine._scheduler.is_idle)
    assert found == [200]
    assert engine.state().texts == 1, "nobody waited for the second"


def test_a_failed_engine_is_told(held):
    address, engine, gate = held
    threads, found = in_threads(address, 1)
    wait_until(lambda: engine.state().running == 1)

    def broken(sent):
        raise ServeError("the device is gone.")

    engine._runner.read = broken
    gate.set()
    threads[0].join(30)
    assert found == [500]
    assert ask(address, {"input": "a"}).status_code == 503
    assert httpx.get(f"{address}/health").status_code == 503
    assert "the device is gone" in httpx.get(f"{address}/ready").json()["problem"]


def test_serve_serves_a_classifier_and_drains_on_sigterm(tmp_path):
    """The verb itself, as a process."""
    folder = write_classifier(tmp_path / "model")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    sizes = ["--set", "serve.seats=2", "--set", "serve.context=16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmos_jax.serve", str(folder), "--port", "0", "--json",
         *sizes],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        lines = iter(process.stderr.readline, "")
        line = next(line for line in lines if line.startswith("serving "))
        address = line.split(" at ")[-1].strip()
        wait_until(lambda: httpx.get(f"{address}/ready").status_code == 200, 120)
        threads, found = in_threads(address, 6)
        wait_until(lambda: found)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert len(found) == 6 and set(found) <= {200, 503, 0} and 200 in found
    assert process.returncode == 0, err[-2000:]
    assert json.loads(out)["drained"] is True
