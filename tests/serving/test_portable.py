"""Exported programs run where nothing of ours is, and say what the model says."""

from __future__ import annotations

import json

import pytest
import server_process
import small

from llmos_jax import driver, serving

STRANGER = """
import json, sys
from pathlib import Path
sys.modules["llmos_jax"] = None  # whoever imports it fails
import jax, jax.export, numpy as np
from safetensors.numpy import load_file
folder = Path(sys.argv[1])
page = json.loads((folder / "bundle.json").read_text())
params = {}
for name in page["weights"]:
    params |= load_file(folder / name)
one, many = page["programs"]
cache = {}
for name, said in one["cache"].items():
    dtype, _, shape = said.partition("[")
    cache[name] = np.zeros(json.loads("[" + shape), dtype)
seats, chunk = cache["k"].shape[1], int(one["arguments"]["tokens"].split(",")[1][:-1])
run = [jax.export.deserialize(bytearray((folder / x["file"]).read_bytes())).call
       for x in (one, many)]
prompt = list(sys.argv[2].encode())
seat = seats - 1
ids = np.zeros((1, chunk), np.int32)
ids[0, :len(prompt)] = prompt
position = np.arange(chunk, dtype=np.int32)[None]
logits, cache = run[0](params, cache, ids, position, np.array([seat], np.int32),
                       np.array([len(prompt) - 1], np.int32))
said, logits = [], np.asarray(logits)[0]
for at in range(len(prompt), len(prompt) + 8):
    said.append(int(logits.argmax()))
    tokens = np.zeros((seats, 1), np.int32)
    places = np.zeros((seats, 1), np.int32)
    tokens[seat], places[seat] = said[-1], at
    logits, cache = run[1](params, cache, tokens, places)
    logits = np.asarray(logits)[seat]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(server_process.write_model(tmp_path_factory.mktemp("model")))


def test_a_stranger_gets_the_models_own_tokens(model, tmp_path):
    sets = ["serve.seats=3", "serve.step_tokens=16", "serve.context=64"]
    out = tmp_path / "bundle"
    report = driver.export(model, str(out), [*sets, "topology=cpu:1"])
    assert report["programs"] == 2 and report["machines"] == 0
    process = small.start(["-c", STRANGER, str(out), "Hello"], devices=1)
    got, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    greedy = serving.Sampling(temperature=0)
    wanted = driver.generate(str(out), "Hello", max_tokens=8, sampling=greedy)
    assert json.loads(got) == wanted["token_ids"]
