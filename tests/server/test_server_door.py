"""Keys, request ids, bodies, TLS, logs: what every request passes."""

from __future__ import annotations

import json
import ssl
import subprocess

import httpx
import pytest
from fake_engine import FakeEngine, say
from serving_here import client_of, served

from llmos_jax.errors import ConfigError
from llmos_jax.server import ServerOptions

OPEN = ["/health", "/ready", "/metrics", "/", "/state", "/openapi.json"]
BODY = {"prompt": "a", "max_tokens": 1}


@pytest.fixture
def client():
    with client_of(FakeEngine(say("hi")), api_keys=("one", "two")) as client:
        yield client


def bearer(key: str) -> dict:
    return {"headers": {"authorization": f"Bearer {key}"}}


@pytest.mark.parametrize("key", ["one", "two"])
def test_every_key_opens_the_door(client, key):
    assert client.get("/v1/models", **bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer three"},
        {"authorization": "Bearer"},
        {"authorization": "Basic one"},
        {"authorization": "one"},
        {"authorization": b"Bearer \xff"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/nothing"])
def test_without_a_key_nothing_opens(client, headers, path):
    reply = client.get(path, headers=headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", OPEN)
def test_how_the_server_is_may_be_asked_without_a_key(client, path):
    assert client.get(path).status_code == 200


def test_each_key_is_a_tenant_of_its_own(client):
    for key in ("one", "two", "two"):
        client.post("/v1/completions", {**BODY, "user": "ann"}, **bearer(key))
    first, second, third = client.app.room.engine.submitted
    assert first.tenant != second.tenant == third.tenant
    assert len(first.tenant) == 12 and "one" not in first.tenant


@pytest.mark.parametrize("key", ["", "two words", "sch\N{LATIN SMALL LETTER O}\xe4"])
def test_a_key_that_no_header_can_carry_is_refused(key):
    with pytest.raises(ConfigError, match="API key"):
        ServerOptions(api_keys=(key,)).check()


def test_request_ids_come_back():
    with client_of(FakeEngine()) as client:
        reply = client.get("/health", headers={"x-request-id": "abc-1"})
        assert reply.headers["x-request-id"] == "abc-1"
        made = {client.get("/nothing").headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2
        for bad in ("x" * 129, b"a\xff"):
            reply = client.get("/health", headers={"x-request-id": bad})
            assert len(reply.headers["x-request-id"]) == 32


def test_one_line_of_json_for_each_request(capfd, client):
    client.post("/v1/completions", BODY, headers={
        "x-request-id": "r1", "authorization": "Bearer one",
    })  # fmt: skip
    client.get("/health")
    client.get("/v1/models")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["path"] for line in lines] == ["/v1/completions", "/v1/models"]
    done = lines[0]
    assert (done["id"], done["status"], done["finish"]) == ("r1", 200, ["length"])
    assert (done["prompt_tokens"], done["generated_tokens"]) == (1, 1)
    assert len(done["tenant"]) == 12 and done["seconds"] >= done["first_token_s"] >= 0
    assert lines[1]["status"] == 401


def figures(client) -> dict:
    """Every sample of /metrics that is not 0: {(name, label values): value}."""
    parser = pytest.importorskip("prometheus_client.parser")
    families = parser.text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
        if sample.value
    }


def test_metrics_count_what_was_asked_and_how_it_ended():
    with client_of(FakeEngine(say("hello"))) as client:
        client.post("/v1/completions", {**BODY, "n": 2})
        client.post("/v1/completions", {**BODY, "stop": "l", "max_tokens": 9})
        client.app.room.engine.wait_for_end(3)
        client.post("/v1/completions", {**BODY, "prompt": "x" * 300})
        client.send("BREW", "/tea/" + "x" * 50)
        found = figures(client)
    asked = [value for key, value in found.items() if key[0] == "http_requests_total"]
    assert sum(asked) == 4
    success = "vllm:request_success_total"
    assert found[success, "0", "fake", "length"] == 2
    assert found[success, "0", "fake", "stop"] == 1
    rejected = "llmos_rejected_requests_total"
    assert found[rejected, "0", "context_length_exceeded", "fake"] == 1
    assert not any("tea" in part for key in found for part in key)


def test_a_body_that_is_too_large_is_413():
    with client_of(FakeEngine(), max_body_bytes=100) as client:
        reply = client.post("/v1/completions", {"prompt": "x" * 100})
        assert reply.status_code == 413 and "100 bytes" in reply.text
        assert client.post("/v1/completions", BODY).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "", None])
def test_a_body_that_is_not_called_json_is_415(kind):
    """A page of another site could send it without asking."""
    with client_of(FakeEngine()) as client:
        headers = {} if kind is None else {"content-type": kind}
        reply = client.send(
            "POST", "/tokenize", content=b'{"prompt": "a"}', headers=headers
        )
        assert reply.status_code == 415


def test_a_body_that_does_not_come_is_408():
    async def slow():
        import asyncio

        yield b'{"prompt"'
        await asyncio.sleep(5)

    with client_of(FakeEngine(), stall_s=0.05) as client:
        headers = {"content-type": "application/json"}
        reply = client.send("POST", "/tokenize", content=slow(), headers=headers)
        assert reply.status_code == 408


def test_a_wrong_method_and_a_wrong_path_answer_as_openai_does():
    with client_of(FakeEngine()) as client:
        reply = client.get("/v1/completions")
        assert reply.status_code == 405 and reply.headers["allow"] == "POST"
        assert reply.json()["error"]["message"]
        assert client.get("/v1/completions/").status_code == 404
        assert client.get("/v1/models/a/b").status_code == 404


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "1e9"])
def test_a_deadline_that_is_none_is_refused(value):
    with client_of(FakeEngine()) as client:
        reply = client.post(
            "/v1/completions", BODY, headers={"x-llmos-deadline-s": value}
        )
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "x-llmos-deadline-s"


def test_a_fault_of_our_own_is_500_and_goes_to_the_log(capfd):
    engine = FakeEngine()
    engine.submit = lambda *_: 1 / 0
    with client_of(engine) as client:
        reply = client.post("/v1/completions", BODY)
    assert reply.status_code == 500 and "ZeroDivision" not in reply.text
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        f"-days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -out {cert} "
        f"-keyout {key}"
    )
    try:
        subprocess.run(words.split(), check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not there to make a certificate")
    return cert, key


def test_tls(certificate):
    cert, key = certificate
    with served(FakeEngine(say("hi")), tls_cert=cert, tls_key=key) as (address, _):
        trust = ssl.create_default_context(cafile=str(cert))
        reply = httpx.post(f"{address}/v1/completions", json=BODY, verify=trust)
        assert reply.status_code == 200 and reply.json()["choices"][0]["text"] == "h"
        with pytest.raises(httpx.TransportError):
            httpx.get(address.replace("https", "http") + "/health")


def test_half_of_tls_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="both --tls-cert and --tls-key"):
        ServerOptions(tls_cert=tmp_path / "cert.pem").check()
