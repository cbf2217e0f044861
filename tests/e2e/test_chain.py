"""A chain of passes, killed and asked for again: what is done is not done again."""

from __future__ import annotations

import json
import os
import signal
import textwrap

import pytest
import small

from llmos_jax import driver
from llmos_jax.cli.main import main
from llmos_jax.errors import ConfigError
from llmos_jax.resolve import open_model

PATIENCE_S = 240

KILLED = textwrap.dedent(
    """
    import importlib, os, signal, sys
    from llmos_jax import compress, {module}
    old = {module}.{function}

    def dies(*arguments, **more):
        {before}
        os.kill(os.getpid(), signal.SIGKILL)

    {module}.{function} = dies
    sys.exit(compress.main({arguments!r}))
    """
)
MOMENTS = {
    "while it trains": ("training", "summarise", "pass"),
    "before a checkpoint is there": ("compressing", "_write_beside", "pass"),
    "before the report": (
        "compression",
        "write_report",
        "old(*arguments, **more) if arguments[1]['kind'] == 'distill' else None",
    ),
}
"""Ends while a link trains, while it writes, and within the one after it."""


@pytest.fixture
def texts(text_file):
    """A short chain of a small model."""
    values = {
        "compress.chain": '["distill","train","quantize"]',
        "compress.evaluate_batches": 1,
        "batch.seq_len": 32,
        "train.compute_dtype": "float32",
        "train.steps": 4,
        "train.warmup_steps": 1,
        "checkpoint.every": 2,
        "qat.weights": "int4",
        "qat.group": 16,
        "data.train": text_file,
    }
    return [f"{key}={value}" for key, value in values.items()]


def made(small_run, out, texts, *more):
    return driver.compress(str(small_run), [*texts, f"compress.out={out}", *more])


def stamps(out):
    """When each report of a chain was written."""
    return {
        path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/report.json")
    }


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_killed_anywhere_the_same_command_goes_on(
    moment, small_run, tmp_path, texts, capsys
):
    out = tmp_path / "chain"
    module, function, before = moment
    words = [str(small_run), "--out", str(out), *small.flags(texts)]
    code = KILLED.format(
        module=module, function=function, before=before, arguments=words
    )
    process = small.start(code)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGKILL, stderr[-2000:]
    done = stamps(out)
    report = made(small_run, out, texts)
    said = capsys.readouterr().err
    assert [row["link"] for row in report["chain"]] == [
        "1-distill", "2-train", "3-quantize"
    ]  # fmt: skip
    for name, stamp in done.items():
        assert stamps(out)[name] == stamp and f"{name} is done" in said
    # The same numbers as of a chain that nothing stopped.
    straight = made(small_run, tmp_path / "straight", texts)
    assert report["perplexity"] == straight["perplexity"]
    assert report["bytes"] == straight["bytes"]


def test_what_changed_is_done_again_with_what_follows(
    small_run, tmp_path, texts, capsys
):
    out = tmp_path / "chain"
    report = made(small_run, out, texts)
    written = json.loads((out / "report.json").read_text())
    assert written == json.loads(json.dumps(report))
    # Stored as it was trained, and the same model as the link before it.
    assert open_model(report["made"]).skeleton.spec.quantization.weights == "int4"
    rows = {row["link"]: row for row in report["chain"]}
    assert rows["1-distill"]["teacher"] == str(small_run)
    assert rows["2-train"].get("teacher") is None
    trained, stored = rows["2-train"], rows["3-quantize"]
    assert stored["kld"] > 0 and stored["bytes"] < trained["bytes"] / 4
    assert stored["perplexity"] == pytest.approx(trained["perplexity"], rel=1e-3)
    assert [len(one) > 1 for one in report["lineage"]] == [True] * 4

    before = stamps(out)
    capsys.readouterr()
    made(small_run, out, texts)
    assert stamps(out) == before
    assert capsys.readouterr().err.count("is done") == 3

    made(small_run, out, texts, "compress.weights=int8")
    after, said = stamps(out), capsys.readouterr().err
    assert "3-quantize: other settings than before" in said
    assert [name for name in before if before[name] != after[name]] == ["3-quantize"]


def test_a_student_learns_from_its_teacher(small_run, tmp_path, texts, capsys):
    """`compress.kind=distill`, and its figures for people."""
    out = tmp_path / "taught"
    words = [str(small_run), "--out", str(out), *small.flags(texts)]
    words += small.flags(
        [
            "compress.chain=[]",
            "compress.kind=distill",
            f"distill.teacher={small_run}",
            "qat.weights=int8",
            "qat.group=32",
        ]  # fmt: skip
    )
    assert main(["compress", *words]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "kld" in shown
    report = json.loads((out / "report.json").read_text())
    assert report["stored_as"] == "int8" and report["steps"] == 4
    of_teacher, before = report["perplexity_of_teacher"], report["perplexity_before"]
    assert of_teacher == pytest.approx(before, rel=1e-5)  # two programs
    assert open_model(str(out)).skeleton.spec.name == report["model"]
    with pytest.raises(ConfigError, match="not empty"):
        driver.compress(str(small_run), [*words[3:][1::2], f"compress.out={out}"])


MISTAKES = {
    "after the end": ('["export","train"]', "a Bundle is served"),
    "whole numbers": ('["quantize","distill"]', "Quantize last"),
    "unknown": ('["squeeze"]', "squeeze"),
}


@pytest.mark.parametrize(("chain", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_chain_that_makes_no_sense_is_refused(
    chain, told, small_run, tmp_path, texts
):
    with pytest.raises(ConfigError, match=told):
        made(small_run, tmp_path / "x", texts, f"compress.chain={chain}")
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_left_alone(small_run, tmp_path, texts):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no chain was begun"):
        made(small_run, tmp_path, texts)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_distill_without_a_teacher_is_refused(small_run, tmp_path):
    with pytest.raises(ConfigError, match="needs a teacher"):
        driver.compress(
            str(small_run),
            ["compress.kind=distill", f"compress.out={tmp_path / 'x'}"],
        )
