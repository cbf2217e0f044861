"""What the flags of `serve` become."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos_jax import driver, serve


@pytest.fixture
def served(monkeypatch):
    """What driver.serve was given."""
    found = {}

    def fake(model, overrides, options, *, max_queue):
        found.update(
            model=model, overrides=overrides, options=options, max_queue=max_queue
        )
        return {"url": "there"}

    monkeypatch.setattr(driver, "serve", fake, raising=False)
    monkeypatch.delenv("LLMOS_API_KEY", raising=False)
    return found


def test_a_model_is_enough(served):
    assert serve.main(["some/model"]) == 0
    options = served["options"]
    assert (options.host, options.port, options.drain_s) == ("127.0.0.1", 8000, 30)
    assert options.api_keys == () and served["max_queue"] is None


def test_every_flag_arrives(served, monkeypatch, capsys):
    monkeypatch.setenv("LLMOS_API_KEY", "three")
    words = (
        "m --set a.b=1 --host 0.0.0.0 --port 0 --api-key one --api-key two "
        "--max-queue 5 --drain-s 2.5 --tls-cert c.pem --tls-key k.pem "
        "--served-name gpt --json"
    )
    assert serve.main(words.split()) == 0
    options = served["options"]
    assert served["overrides"] == ["a.b=1"] and served["max_queue"] == 5
    assert (options.host, options.port, options.drain_s) == ("0.0.0.0", 0, 2.5)
    assert options.api_keys == ("one", "two", "three")
    assert (options.tls_cert, options.tls_key) == (Path("c.pem"), Path("k.pem"))
    assert options.served_name == "gpt"
    assert capsys.readouterr().out == '{"url": "there"}\n'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("m --port 70000", "--port is 70000"),
        ("m --drain-s -1", "--drain-s is -1.0"),
        ("m --drain-s nan", "--drain-s is nan"),
        ("m --tls-cert c.pem", "both --tls-cert and --tls-key"),
        ("m --max-queue -1", "--max-queue is -1"),
        ("m --port x", "invalid int value"),
        ("", "MODEL"),
    ],
)
def test_a_flag_that_cannot_be_is_one_sentence(served, capsys, words, said):
    assert serve.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not served


def test_an_empty_key_is_refused(served, capsys, monkeypatch):
    monkeypatch.setenv("LLMOS_API_KEY", "")
    assert serve.main(["m"]) == 2
    assert "API key is empty" in capsys.readouterr().err
