"""From a checkpoint to a Bundle to answers, as a user goes."""

from __future__ import annotations

import json

import pytest
import server_process
import small

# A context that no other test asks for: programs can come from the Bundle alone.
SETS = ["serve.context=128", "serve.seats=1", "serve.step_tokens=8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return server_process.write_model(tmp_path_factory.mktemp("model"))


def run(*words: str) -> dict:
    """A verb in a process with one device."""
    command = ["-m", f"llmos_jax.{words[0]}", *words[1:], "--json"]
    process = small.start(command, devices=1)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


def said(server: server_process.ServerProcess) -> str:
    server.wait_ready()
    asked = {"model": "talker", "prompt": "Hello", "max_tokens": 12, "temperature": 0}
    answer = server.post(server_process.PATH, asked).raise_for_status()
    return answer.json()["choices"][0]["text"]


def test_a_bundle_is_served_without_compiling_anything(model, tmp_path):
    out, flags = tmp_path / "bundle", small.flags(SETS)
    report = run("export", str(model), "--out", str(out), *flags)
    assert report["machines"] == 1 and report["weights"] == "int8"
    with server_process.started(out, tmp_path / "a", *flags) as server:
        got = said(server)
        assert "compiled" not in server.log and "cannot be" not in server.log
    with server_process.started(model, tmp_path / "b", *flags) as server:
        assert said(server) == got
        assert "compiled" in server.log, "the same programs came from elsewhere"


@pytest.mark.slow
def test_other_programs_read_what_is_exported_for_them(model, tmp_path):
    report = run("export", str(model), "--to", "hf", "--out", str(tmp_path / "hf"))
    assert report["form"] == "hf" and report["same_top1"] == 1
    assert (tmp_path / "hf" / "config.json").is_file()
