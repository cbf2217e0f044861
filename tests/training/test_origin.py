"""Training begins with the weights of a model that has some."""

from __future__ import annotations

import json

import numpy as np
import pytest
import small

from llmos_jax import checkpoint, driver, interchange, resolve
from llmos_jax.config import load_config
from llmos_jax.errors import CheckpointError, ConfigError, LlmosError


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory):
    """The small run's model as a Hugging Face folder; its tokenizer is `bytes`."""
    folder = tmp_path_factory.mktemp("origin") / "hf"
    opened = resolve.open_model(str(small_run))
    spec, params = opened.skeleton.spec, opened.params()
    interchange.write_huggingface(folder, spec, params, opened.tokenizer)
    return folder


def asked(tmp_path, text_file, model, **more):
    """A run of two steps that change nothing, with the model's own tokenizer."""
    still = {
        "train__steps": 2,
        "train__learning_rate": 1e-9,
        "data__tokenizer": "auto",
    }
    return small.overrides(tmp_path / "run", model, text_file, **{**still, **more})


@pytest.mark.parametrize("form", ["ours", "hf"])
def test_the_first_loss_is_that_of_the_weights(
    form, folder, small_run, tmp_path, text_file
):
    model = {"ours": small_run, "hf": folder}[form]
    report = small.train(asked(tmp_path, text_file, model))
    trained = json.loads((small_run / "report.json").read_text())
    assert report["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-4)


def test_from_scratch_draws_new_weights(folder, small_run, tmp_path, text_file):
    sets = asked(
        tmp_path, text_file, folder, train__from_scratch="true", data__tokenizer="bytes"
    )
    report = small.train(sets)
    trained = json.loads((small_run / "report.json").read_text())
    assert report["val_loss"] > trained["val_loss"] + 0.2


def test_factors_are_drawn_beside_the_weights_and_saved_with_them(
    folder, small_run, tmp_path, text_file
):
    """At a rate of nothing: the model says what it said, and has factors."""
    sets = asked(tmp_path, text_file, folder, lora__rank=2, train__steps=10)
    report = small.train(sets)
    trained = json.loads((small_run / "report.json").read_text())
    assert report["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-4)
    opened = resolve.open_model(str(tmp_path / "run"))
    assert opened.skeleton.spec.lora.rank == 2
    params, base = opened.params(), resolve.open_model(str(folder)).params()
    assert all(np.array_equal(params[path], base[path]) for path in base)
    assert any(np.abs(x).max() > 0 for path, x in params.items() if "_lora.a" in path)
    merged = tmp_path / "merged"
    found = driver.convert(str(tmp_path / "run"), str(merged))
    assert (found["form"], found["same_top1"]) == ("hf", 1.0)
    assert resolve.open_model(str(merged)).skeleton.spec.lora is None


@pytest.mark.parametrize("asked", ["lora.adapter=there", "lora.rank=4"])
def test_factors_need_weights_to_lie_over(asked):
    config = load_config(None, ["model=tiny", asked]).config
    with pytest.raises(ConfigError, match="begins with random ones"):
        resolve.origin_of(config)


def test_a_checkpoint_keeps_the_dtypes_of_what_was_converted(folder, tmp_path):
    driver.convert(str(folder), str(tmp_path / "ours"), dtype="bfloat16")
    opened = checkpoint.open_checkpoint(str(tmp_path / "ours"))
    assert {str(x.dtype) for x in opened.params().values()} == {"bfloat16"}
    assert {str(x.dtype) for x in opened.params(dtype="float32").values()} == {
        "float32"
    }
    back = driver.convert(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert back["max_logit_difference"] == 0.0
    theirs = resolve.open_model(str(tmp_path / "back")).params()
    ours = opened.params()
    for path, x in theirs.items():
        assert np.asarray(x).tobytes() == np.asarray(ours[path]).tobytes(), path


def test_a_model_in_bfloat16_is_not_judged_by_the_dtype_of_its_export(folder, tmp_path):
    """float32 GGUF of bfloat16 weights: computed alike, they answer alike."""
    driver.convert(str(folder), str(tmp_path / "ours"), dtype="bfloat16")
    found = driver.convert(
        str(tmp_path / "ours"), str(tmp_path / "hf"), dtype="float32"
    )
    assert found["same_top1"] == 1.0 and found["max_logit_difference"] == 0.0


def test_what_does_not_answer_alike_is_not_called_converted(
    folder, tmp_path, monkeypatch
):
    """A writer that forgets to turn a weight: it loads, runs, and says other things."""
    write = interchange.write_huggingface

    def turned(out, spec, params, tokenizer, **more):
        wrong = {**params, "layers.ffn.down": params["layers.ffn.down"][:, ::-1]}
        write(out, spec, wrong, tokenizer, **more)

    monkeypatch.setattr(interchange, "write_huggingface", turned)
    with pytest.raises(CheckpointError, match="does not answer as"):
        driver.convert(str(folder), str(tmp_path / "wrong"), form="hf")


@pytest.mark.parametrize(
    ("form", "said"),
    [("hf", "exists and is not empty"), ("checkpoint", "exists and is not empty")],
)
def test_a_folder_in_use_is_not_written_to(form, said, folder, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(LlmosError, match=said):
        driver.convert(str(folder), str(tmp_path), form=form)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_model_without_factors_has_none_to_write(folder, tmp_path):
    with pytest.raises(ConfigError, match="has no LoRA factors"):
        driver.convert(str(folder), str(tmp_path / "adapter"), form="peft")


def test_another_vocabulary_cannot_be_compared(small_run, folder, tmp_path, text_file):
    sets = small.overrides(
        tmp_path / "run", folder, text_file, train__steps=2, data__tokenizer="train",
        train__from_scratch="true",
    )  # fmt: skip
    small.train(sets)
    with pytest.raises(ConfigError, match="its vocabulary is not that of"):
        driver.evaluate(str(folder), [f"evaluate.against={tmp_path / 'run'}"])
    same = driver.evaluate(
        str(folder),
        [
            f"data.test={text_file}",
            f"evaluate.against={small_run}",
            "batch.seq_len=64",
            "batch.global=64",
        ],
    )
    assert same["kld"] == pytest.approx(0.0, abs=1e-6)
    assert same["same_top1"] == 1.0
