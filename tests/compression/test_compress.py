"""The verb `compress`: a model in a folder, a report, one line for a mistake."""

from __future__ import annotations

import json

import pytest
import small

from llmos_jax.cli.main import main
from llmos_jax.resolve import open_model


@pytest.fixture
def sets(text_file):
    """A short calibration text, and a short text to compare on."""
    values = {
        "compress.sequences": 8,
        "compress.seq_len": 64,
        "compress.evaluate_batches": 2,
        "batch.seq_len": 64,
        "train.compute_dtype": "float32",
        "data.train": text_file,
    }
    return small.flags([f"{key}={value}" for key, value in values.items()])


INT4 = small.flags(["compress.weights=int4", "compress.group=32"])
GPTQ = small.flags(["compress.method=gptq", "compress.smooth=0.5"])


def test_what_it_makes_is_a_model_that_says_how_near_it_is(
    small_run, tmp_path, sets, capsys
):
    out = tmp_path / "few"
    words = ["compress", str(small_run), "--out", str(out), *INT4, *GPTQ, *sets]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert 0 < report["kld"] < 0.1 and report["same_top1"] > 0.5
    assert report["calibration_tokens"] == 8 * 64
    opened = open_model(str(out))
    assert opened.skeleton.spec.quantization.weights == "int4"
    assert report["bytes"] == sum(x.nbytes for x in opened.params().values())
    assert report["bytes"] < report["bytes_before"] / 5
    # Its own words, read back, on the same text.
    words = ["evaluate", str(out), *sets, "--set", f"evaluate.against={small_run}"]
    assert main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["kld"] == pytest.approx(report["kld"], rel=0.5)


def test_a_config_names_the_model(small_run, tmp_path, sets, capsys):
    config = tmp_path / "asked.toml"
    out = tmp_path / "few"
    config.write_text(f'model = "{small_run}"\n[compress]\nout = "{out}"\n')
    words = [str(config), *sets, "--set", "batch.global=8"]
    assert main(["compress", *words]) == 0
    printed = capsys.readouterr().out
    assert "kld" in printed and "worst matrix" in printed
    assert open_model(str(out)).skeleton.spec.quantization.weights == "int8"


def refused(capsys, *words):
    """Exit code and the one error line."""
    code = main(["compress", *map(str, words)])
    lines = capsys.readouterr().err.splitlines()
    (message,) = [line for line in lines if line.startswith("error:")]
    return code, message


def test_too_far_from_its_source_nothing_is_written(small_run, tmp_path, sets, capsys):
    out = tmp_path / "few"
    limit = small.flags(["compress.max_kld=1e-9"])
    code, message = refused(capsys, small_run, "--out", out, *sets, *limit)
    assert code == 1
    assert "compress.max_kld = 1e-09" in message and "compress.method=gptq" in message
    assert not out.exists()


MISTAKES = {
    "no place": ([], "Give --out FOLDER"),
    "unknown kind": (["compress.kind=shrink"], "not one of quantize"),
    "odd group": (
        ["compress.out=x", "compress.weights=int4", "compress.group=48"],
        "does not divide",
    ),
    "no group": (["compress.out=x", "compress.weights=int4"], "needs group"),
    "text that is not there": (
        ["compress.out=x", "data.test=/nowhere/a.txt"],
        "does not exist",
    ),
    "no calibration text": (
        ["compress.out=x", "compress.method=gptq", "compress.calibration=/nowhere/a"],
        "does not exist",
    ),
    "more than all": (["compress.out=x", "compress.smooth=1.5"], "between 0"),
}


@pytest.mark.parametrize(("settings", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(
    settings, told, small_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code, message = refused(capsys, small_run, *small.flags(settings))
    assert code == 2 and told in message
    assert not (tmp_path / "x").exists()


def test_a_folder_in_use_and_a_model_without_weights_are_refused(
    small_run, small_model, tmp_path, capsys
):
    assert "not empty" in refused(capsys, small_run, "--out", small_run)[1]
    config = tmp_path / "asked.toml"
    config.write_text(f'model = "{small_model}"\n')
    code, message = refused(capsys, config, "--out", tmp_path / "few")
    assert code == 2 and "has none" in message
