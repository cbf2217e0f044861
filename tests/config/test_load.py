"""Configs: every key is checked, every mistake names its remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from llmos_jax.config import (
    RunConfig,
    load_config,
    load_model,
    load_prices,
    model_names,
    to_toml,
)
from llmos_jax.config.build import build
from llmos_jax.errors import ConfigError
from llmos_jax.hardware import CHIPS
from llmos_jax.places import data_folder

PRICES = data_folder("configs") / "prices.toml"


def test_expanded_toml_reads_back_as_the_same_config() -> None:
    config = load_config(
        "quickstart", ["plan.mesh.fsdp=8", "data.train=a b.txt"]
    ).config
    assert build(RunConfig, tomllib.loads(to_toml(config)), "again") == config


def test_overrides_are_typed_by_the_schema() -> None:
    overrides = ["train.steps=3", "model=8", "batch.global=16", "data.test=x.txt"]
    config = load_config("quickstart", overrides).config
    assert (config.train.steps, config.model) == (3, "8")
    assert (config.batch.global_, config.data.test) == (16, ("x.txt",))


@pytest.mark.parametrize("name", model_names())
def test_every_model_file_is_a_model(name: str) -> None:
    spec = load_model(name)
    assert spec.name == name
    assert spec.num_params > 0


RUNS = sorted(set(data_folder("configs").glob("*.toml")) - {PRICES})


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_config_file_is_a_config(path: Path) -> None:
    assert load_config(str(path)).config.model


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "unknown key 'train.step'. Did you mean 'steps'"),
        ("train.steps=many", 'train.steps = "many" has the wrong type: Expected int'),
        ("train.steps.x=1", "train.steps is a value, not a section"),
        ("train.steps=0", "train.steps is 0; it must be more than 0"),
        ("train.steps", "not of the form key=value"),
        ("train.compute_dtype=float16", "is not one of float32, bfloat16"),
        ("plan.mesh.fsdp=wide", "plan.mesh"),
        ("data.validation_share=1.5", "must lie between 0 and 1"),
    ],
)
def test_bad_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=_literally(message)):
        load_config("quickstart", [override])


def test_a_batch_said_in_two_ways_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch.global = 8 and batch.per_device = 2"):
        load_config("quickstart", ["batch.global=8", "batch.per_device=2"])


def test_one_way_to_say_the_batch_replaces_the_other() -> None:
    batch = load_config("quickstart", ["batch.global=8"]).config.batch
    assert (batch.global_, batch.per_device) == (8, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quikstart", "no config is named 'quikstart'. Did you mean 'quickstart'"),
        ("nowhere/run.toml", "config file nowhere/run.toml does not exist"),
    ],
)
def test_missing_config_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=_literally(message)):
        load_config(name)


def test_unknown_key_in_a_file_is_refused_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "tiny"\n[trian]\nsteps = 3\n')
    with pytest.raises(ConfigError, match="run.toml: unknown key 'trian'.*'train'"):
        load_config(str(path))


def test_invalid_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("model = \n")
    with pytest.raises(ConfigError, match="run.toml is not valid TOML.*line 1"):
        load_config(str(path))


def test_model_is_required() -> None:
    with pytest.raises(ConfigError, match="'model' is required"):
        load_config(None, ["train.steps=3"])


def test_model_with_unequal_head_groups_is_refused(tmp_path: Path) -> None:
    text = (data_folder("configs") / "models" / "tiny.toml").read_text()
    path = tmp_path / "odd.toml"
    path.write_text(text.replace("num_heads = 8", "num_heads = 6", 1))
    with pytest.raises(ConfigError, match="num_heads = 6 is not a multiple of"):
        load_model(str(path))


def test_the_price_list_covers_every_tpu() -> None:
    prices = load_prices()
    tpus = {name for name, chip in CHIPS.items() if chip.vendor == "tpu"}
    assert tpus <= prices.usd_per_chip_hour.keys() <= CHIPS.keys()
    assert "list prices" in prices.source


def test_a_price_list_is_no_run_to_be_suggested() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("zzz")
    assert "prices" not in str(caught.value) and "quickstart" in str(caught.value)


def _literally(text: str) -> str:
    import re

    return re.escape(text)
