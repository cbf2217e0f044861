"""A Bundle checks itself: what is damaged is named, what is foreign is not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import server_process

from llmos_jax import bundle, driver, resolve, stores
from llmos_jax.bundle.machine import write_machine
from llmos_jax.cli.main import main
from llmos_jax.errors import BundleError, ConfigError

pytest_plugins = ["object_store"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return server_process.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory) -> Path:
    """A Bundle without programs."""
    out = tmp_path_factory.mktemp("bundles") / "plain"
    driver.export(str(model), str(out), ["export.programs=false", "serve.seats=4"])
    return out


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def test_it_holds_the_model_bit_for_bit(model, plain):
    ours, theirs = resolve.open_model(str(model)), resolve.open_model(str(plain))
    assert isinstance(theirs, bundle.OpenedBundle)
    assert theirs.skeleton.spec == ours.skeleton.spec
    assert theirs.tokenizer.to_json() == ours.tokenizer.to_json()
    wanted, got = ours.params(), theirs.params()
    assert wanted.keys() == got.keys()
    for path, x in wanted.items():
        assert got[path].dtype == x.dtype
        assert np.asarray(got[path]).tobytes() == np.asarray(x).tobytes(), path


def test_each_device_reads_its_own_part(plain):
    opened = resolve.open_model(str(plain))
    mesh = jax.make_mesh((8,), ("tensor",))
    over = jax.sharding.NamedSharding(mesh, jax.P(None, None, "tensor"))
    path = "layers.ffn.gate.values"
    whole = np.asarray(opened.params()[path])
    split = opened.params({path: over})[path]
    assert split.sharding == over
    assert np.array_equal(np.asarray(split), whole)


def test_it_says_where_it_comes_from(model, plain):
    page = bundle.open_bundle(plain).page
    parent = page.provenance["parent"]
    assert parent == resolve.lineage(str(model)) and parent["fingerprint"]
    assert page.provenance["config"]["model"] == str(model)
    assert page.provenance["environment"]["jax"] == jax.__version__


def test_it_says_how_it_is_to_be_served(plain):
    opened = resolve.open_model(str(plain))
    assert resolve.config_of(opened, str(plain), []).serve.seats == 4
    said = resolve.config_of(opened, str(plain), ["serve.seats=2"])
    assert said.serve.seats == 2


@pytest.mark.parametrize(
    "name", ["weights-00001.safetensors", "tokenizer.json", "plan.json", "bundle.json"]
)
def test_a_flipped_bit_is_named(copy, name, capsys):
    path = copy / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert main(["doctor", str(copy)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error:") and name in said
    assert "export it anew" in said and "Traceback" not in said


@pytest.mark.parametrize("name", ["weights-00001.safetensors", "tokenizer.json"])
def test_a_short_file_and_a_missing_one_are_named_when_it_is_opened(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"{name} has .* bytes and should have"):
        bundle.open_bundle(copy)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        bundle.open_bundle(copy)


def test_altered_weights_are_not_computed_with(copy):
    path = copy / "weights-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BundleError, match="was altered"):
        bundle.open_bundle(copy).params()


def test_a_folder_in_use_is_left_alone(model, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        driver.export(str(model), str(tmp_path), ["export.programs=false"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_of_one_that_could_not_be_finished(plain, tmp_path):
    opened = bundle.open_bundle(plain)

    def fill(folder: Path) -> bundle.Bundle:
        assert bundle.is_bundle(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(BundleError, match="No space left on device"):
        bundle.write_bundle(
            *(tmp_path / "new", opened.page, opened.params(), opened.tokenizer),
            *({}, fill),
        )
    assert not list(tmp_path.iterdir())


def sealed(folder: Path) -> Path:
    here = folder / "machines" / "m"
    here.mkdir(parents=True)
    (here / "a.program").write_bytes(b"native code")
    tree = {"a": np.arange(3.0, dtype=np.float32), "b": (np.ones((2, 0), np.uint8),)}
    write_machine(here, "these programs", 7, tree)
    return here


def test_a_machines_part_comes_back_as_it_was(copy):
    sealed(copy)
    found = bundle.open_bundle(copy).machine("these programs")
    assert isinstance(found, bundle.OpenedMachine) and found.page.pages == 7
    weights = found.weights()
    assert weights["a"].tolist() == [0, 1, 2] and weights["b"][0].shape == (2, 0)
    assert bundle.open_bundle(copy).machine("others") == "it has none for this machine"


def test_code_that_another_user_made_is_not_loaded(copy, monkeypatch):
    sealed(copy)
    monkeypatch.setenv("LLMOS_BUNDLE_KEY", "somebody else")
    assert "another user" in bundle.open_bundle(copy).machine("these programs")


def test_a_forged_page_is_not_believed(copy):
    path = sealed(copy) / "machine.json"
    signed = json.loads(path.read_text())
    signed["machine"]["pages"] = 8
    path.write_text(json.dumps(signed))
    assert "another user" in bundle.open_bundle(copy).machine("these programs")


def test_altered_code_is_named_and_not_loaded(copy):
    path = sealed(copy) / "a.program"
    path.write_bytes(b"native Code")
    with pytest.raises(BundleError, match=r"a\.program was altered"):
        bundle.open_bundle(copy).machine("these programs")


def test_code_that_nobody_signed_for_is_named_and_not_loaded(copy):
    (sealed(copy) / "b.program").write_bytes(b"native code")
    with pytest.raises(BundleError, match=r"b\.program was altered or added"):
        bundle.open_bundle(copy).machine("these programs")


def test_one_in_an_object_store_is_used_like_one_here(plain, object_store):
    url = f"{object_store.url}/models/small"
    stores.upload_folder(plain, url)
    opened = resolve.open_model(url)
    assert isinstance(opened, bundle.OpenedBundle) and resolve.has_weights(url)
    assert resolve.resolve_model(url) == bundle.open_bundle(plain).page.model
    opened.check()
