"""Every config under configs/ trains two steps, in small, and speaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small

from llmos_jax.cli.main import main

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.toml")
    if path.relative_to(ROOT).parts[0]
    not in ("models", "calibration", "classify", "compress", "prices.toml")
)
MODELS = sorted(path.stem for path in (ROOT / "models").glob("*.toml"))


def test_there_are_configs_to_try():
    assert Path("quickstart.toml") in CONFIGS and "smollm2_135m" in MODELS


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_trains_two_steps_and_speaks(
    config, tmp_path, small_model, text_file, capsys
):
    """As it is, but for the model's size, the text, and how long."""
    folder = tmp_path / "run"
    sets = [
        f"model={small_model}", f"run.dir={folder}", f"data.train={text_file}",
        "batch.seq_len=64", "batch.global=8", "train.steps=2", "train.eval_every=2",
        "generate.max_tokens=4",
    ]  # fmt: skip
    assert main(["train", str(ROOT / config), *small.flags(sets), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2 and report["val_bits_per_byte"] > 0
    words = ["generate", str(folder), "--prompt", "The class", "--max-tokens", "4"]
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 4
    assert main(["evaluate", str(folder), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["bits_per_byte"] == pytest.approx(
        report["val_bits_per_byte"], rel=1e-5
    )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_plans_as_it_is(config, capsys):
    assert main(["plan", str(ROOT / config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_planned_by_its_name(name, capsys):
    sets = [f"model={name}", "topology=v5p:8x8x16", "batch.seq_len=128"]
    assert main(["plan", *small.flags(sets), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == name


@pytest.mark.parametrize(
    "config", ["lstm", pytest.param("transformer", marks=pytest.mark.slow), "backbone"]
)
def test_a_classifier_trains_two_steps_and_is_scored(
    config, tmp_path, small_model, capsys
):
    """On the task that needs no download; the backbone is small, and random."""
    sets = [
        f"run.dir={tmp_path / 'run'}", "batch.seq_len=32", "batch.global=8",
        "train.steps=2", "train.eval_every=2", "train.eval_batches=1",
        "checkpoint.every=2",
    ]  # fmt: skip
    if config == "backbone":
        sets += [f"model={small_model}", "lora.rank=0"]
    command = ["train", str(ROOT / f"classify/{config}.toml"), *small.flags(sets)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2 and len(report["labels"]) == 10
    assert 0 <= report["test_macro_f1"] <= report["test_accuracy"] * 10 <= 10
