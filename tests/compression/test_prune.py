"""The verb `compress` with `compress.kind=prune`: a model, a report, mistakes."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest
import small

from llmos_jax.cli.main import main
from llmos_jax.resolve import open_model


@pytest.fixture
def sets(text_file):
    """A short calibration text, and a short text to compare on."""
    values = {
        "compress.kind": "prune",
        "compress.sequences": 8,
        "compress.seq_len": 64,
        "compress.evaluate_batches": 2,
        "batch.seq_len": 64,
        "train.compute_dtype": "float32",
        "data.train": text_file,
        "prune.multiple": 16,
        "prune.candidates": 2,
        "serve.seats": 1,
        "topology": "cpu:1",
    }
    return small.flags([f"{key}={value}" for key, value in values.items()])


def test_a_smaller_model_says_what_it_was_chosen_from(
    small_run, tmp_path, sets, capsys
):
    out = tmp_path / "less"
    words = ["compress", str(small_run), "--out", str(out), *sets]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    opened = open_model(str(out))
    spec = opened.skeleton.spec
    assert spec.name == report["model"] and spec.num_params == report["params"]
    assert 0.55 < report["params"] / report["params_before"] < 0.8
    assert report["bytes"] == sum(x.nbytes for x in opened.params().values())
    assert report["decode_ms"] < report["decode_ms_before"]
    tried = [one for one in report["candidates"] if one["loss"] is not None]
    assert len(tried) == 2 and tried[0]["loss"] <= tried[1]["loss"]
    assert {name: tried[0][name] for name in report["shape"]} == report["shape"]
    assert all("not_tried" in one for one in report["candidates"][2:])
    assert report["kld"] > 0 and report["made_by"]["pruned_from"] == str(small_run)
    # A chain goes on from it: whole numbers, then words.
    few = tmp_path / "few"
    here = [word for word in sets if word != "topology=cpu:1"]
    here = small.flags([word for word in here if word != "--set"])
    again = ["--set", "compress.kind=quantize", "--out", str(few)]
    assert main(["compress", str(out), *here, *again]) == 0
    capsys.readouterr()
    words = ["generate", str(few), "--prompt", "The", "--max-tokens", "3"]
    assert main([*words, "--json"]) == 0


def test_zeros_are_counted(small_run, tmp_path, sets, capsys):
    out = tmp_path / "zeros"
    masks = small.flags(["prune.method=wanda", "prune.pattern=2:4"])
    assert main(["compress", str(small_run), "--out", str(out), *sets, *masks]) == 0
    printed = capsys.readouterr().out
    assert "zeros" in printed and "0.5" in printed
    params = open_model(str(out)).params()
    assert float(jnp.mean(params["layers.ffn.down"] == 0)) == 0.5
    report = json.loads((out / "report.json").read_text())
    assert report["zeros"] == 0.5 and report["params"] == report["params_before"]
    assert (
        open_model(str(small_run)).skeleton.spec == open_model(str(out)).skeleton.spec
    )


MISTAKES = {
    "share": (["prune.method=wanda", "prune.sparsity=1.5"], 2, "between 0 and 1"),
    "pattern": (["prune.method=wanda", "prune.pattern=1:2"], 2, "2:4"),
    "keep": (["prune.keep=1"], 2, "prune.keep = 1"),
    "pin": (["prune.num_layers=9"], 2, "has 2"),
    "too far": (["compress.max_kld=1e-9"], 1, "pruned model is"),
    "few bits": (["compress.weights=int4"], 2, "needs group"),
}


@pytest.mark.parametrize(("asked", "status", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(asked, status, told, small_run, tmp_path, sets, capsys):
    out = tmp_path / "x"
    flags = small.flags(asked)
    assert (
        main(["compress", str(small_run), "--out", str(out), *sets, *flags]) == status
    )
    lines = capsys.readouterr().err.splitlines()
    (message,) = [line for line in lines if line.startswith("error:")]
    assert told in message and not out.exists()
