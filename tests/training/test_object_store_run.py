"""A run whose checkpoints lie in an object store outlives its machine, bit for bit."""

from __future__ import annotations

import shutil

import pytest
import small
from object_store import TROUBLE

from llmos_jax.checkpoint import Mirror, bring
from llmos_jax.errors import StoreError

pytest_plugins = ["object_store"]


def texts_of(folder, small_model, text_file, store, **more):
    where = {"checkpoint__dir": f"{store.url}/run"}
    return small.overrides(folder, small_model, text_file, **where, **more)


@pytest.mark.slow
def test_a_run_goes_on_where_another_machine_left_it(
    request, tmp_path, small_model, text_file, small_run
):
    store = request.getfixturevalue("object_store")
    store.faults = TROUBLE
    small.train(texts_of(tmp_path / "a", small_model, text_file, store))
    Mirror(f"{store.url}/run", tmp_path / "none").prune({10})
    shutil.rmtree(tmp_path / "a")
    second = texts_of(tmp_path / "b", small_model, text_file, store)
    assert small.train(second)["resumed_from"] == 10
    shutil.rmtree(tmp_path / "b")
    path = bring(f"{store.url}/run")
    assert path.name == "20"
    there = small.arrays(f"{store.url}/run")
    assert small.differing(there, small.arrays(small_run)) == []


@pytest.mark.slow
def test_a_store_that_refuses_the_last_checkpoint_ends_the_run(
    request, tmp_path, small_model, text_file, monkeypatch
):
    store = request.getfixturevalue("object_store")
    monkeypatch.setenv("LLMOS_STORE_PATIENCE_S", "0.5")
    store.faults, store.only = {"slow_down": 1.0}, "/run/20/"
    texts = texts_of(tmp_path / "a", small_model, text_file, store)
    with pytest.raises(StoreError, match=r"checkpoint 20 is not in s3://.*/run: "):
        small.train(texts)
    store.faults = {}
    assert small.train(texts)["resumed_from"] == 20
    assert bring(f"{store.url}/run").name == "20"
