"""Damaged and foreign folders are refused, with the file and the tensor named."""

from __future__ import annotations

import json
import os

import hf_models
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmos_jax.errors import CheckpointError
from llmos_jax.interchange import (
    HuggingFaceFolder,
    foreign_spec,
    is_foreign,
    load_params,
    open_archive,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model in one file, and the same in several."""
    made = hf_models.model("llama")
    base = tmp_path_factory.mktemp("saved")
    hf_models.save(made, base / "one")
    hf_models.save(made, base / "many", max_shard_size="20KB")
    return base


@pytest.fixture
def one(saved, tmp_path):
    return _copy(saved / "one", tmp_path / "one")


@pytest.fixture
def many(saved, tmp_path):
    return _copy(saved / "many", tmp_path / "many")


def _copy(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def changed(folder, change):
    """Rewrite the tensors of a folder."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_with_its_name(one, kept):
    file = one / SINGLE
    os.truncate(file, kept if kept >= 0 else file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{SINGLE} is damaged.*cut short"):
        HuggingFaceFolder(one)


def test_a_file_that_is_too_long_is_refused(one):
    with (one / SINGLE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=f"{SINGLE} is damaged"):
        HuggingFaceFolder(one)


@pytest.mark.parametrize(
    "header", [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}']
)
def test_a_header_that_is_none_is_refused(one, header):
    (one / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=f"{SINGLE} is damaged"):
        HuggingFaceFolder(one)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [([2], [0, 4]), ([-1], [0, 8]), ([2], [8, 16]), ([2], [0, 99])],
)
def test_offsets_that_do_not_fit_are_refused_with_the_tensor(one, shape, offsets):
    row = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    header = json.dumps({"odd": row}).encode()
    (one / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=f"{SINGLE} is damaged.*odd"):
        HuggingFaceFolder(one)


def test_a_file_cut_after_it_was_opened_is_refused_with_the_tensor(one):
    folder = HuggingFaceFolder(one)
    os.truncate(one / SINGLE, 5000)
    with pytest.raises(CheckpointError, match=f"{SINGLE} is damaged: it ends within"):
        for name in folder.tensors:
            folder.read(name)


def test_an_index_of_absent_files_is_refused_with_their_names(many):
    file = sorted(many.glob("model-*.safetensors"))[1]
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX}.*{file.name}"):
        HuggingFaceFolder(many)


def test_an_index_of_absent_tensors_is_refused_with_their_names(many):
    index = json.loads((many / INDEX).read_text())
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.9.odd"] = file
    (many / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX}.*model.layers.9.odd"):
        HuggingFaceFolder(many)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": "../b"}}'])
def test_an_index_that_is_none_is_refused(many, text):
    (many / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged"):
        HuggingFaceFolder(many)


def test_pickled_weights_are_not_read(one):
    (one / SINGLE).rename(one / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*safetensors"):
        HuggingFaceFolder(one)


def test_a_folder_without_weights_is_refused(one):
    (one / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=SINGLE):
        HuggingFaceFolder(one)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_is_refused_with_its_name(one, text):
    (one / "config.json").write_text(text)
    for opening in (open_archive, foreign_spec):
        with pytest.raises(CheckpointError, match="config.json is damaged"):
            opening(one)


def test_missing_extra_and_odd_tensors_are_all_in_one_error(one):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["score.weight"] = np.ones((2, 32), np.float32)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((48, 32), np.int8)

    changed(one, change)
    with pytest.raises(CheckpointError) as caught:
        open_archive(one).params()
    text = str(caught.value)
    assert "1 missing: model.norm.weight" in text
    assert "1 not this model's: score.weight" in text
    assert "model.layers.0.mlp.up_proj.weight [32, 48] instead of [48, 32]" in text
    assert "model.layers.1.mlp.up_proj.weight I8" in text


def test_an_error_shows_ten_names_and_counts_all(one):
    changed(one, lambda tensors: tensors.clear())
    with pytest.raises(CheckpointError, match=r"55 missing") as caught:
        open_archive(one).params()
    assert str(caught.value).count("weight") + str(caught.value).count("bias") == 10


def test_computed_frequencies_are_tolerated(one):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    changed(one, lambda tensors: tensors.update({name: np.ones(8, np.float32)}))
    assert open_archive(one).params()


def test_a_tied_head_is_tolerated_only_if_it_is_the_embeddings(tmp_path):
    folder = hf_models.save(hf_models.model("qwen3"), tmp_path / "m")
    table = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    changed(folder, lambda tensors: tensors.update({"lm_head.weight": table}))
    assert "head.kernel" not in open_archive(folder).params()
    changed(folder, lambda tensors: tensors.update({"lm_head.weight": table + 1}))
    with pytest.raises(CheckpointError, match="lm_head.weight"):
        open_archive(folder).params()


@pytest.mark.parametrize("theirs", ["language_model.model.", "model.language_model."])
def test_a_model_with_vision_gives_its_text_half(theirs, tmp_path, capsys):
    made = hf_models.model("gemma3_text")
    folder = hf_models.save(made, tmp_path / "m")
    text = json.loads((folder / "config.json").read_text())
    page = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(page))

    def change(tensors):
        for name in list(tensors):
            tensors[theirs + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.patch.weight"] = np.ones(3, np.float32)
        tensors["multi_modal_projector.norm.weight"] = np.ones(3, np.float32)

    changed(folder, change)
    params = open_archive(folder).params()
    assert "2 tensors of the vision model are left out" in capsys.readouterr().err
    table = made.model.embed_tokens.weight.detach().numpy()
    assert np.array_equal(np.asarray(params["embed.table"]), table)


def test_reading_what_is_not_there_is_an_error(one):
    with pytest.raises(CheckpointError, match="no tensor odd"):
        HuggingFaceFolder(one).read("odd")


def test_rows_are_rows_of_the_whole(one):
    folder = HuggingFaceFolder(one)
    name = "model.embed_tokens.weight"
    whole = folder.read(name)
    assert np.array_equal(folder.read(name, slice(5, 11)), whole[5:11])
    assert np.array_equal(whole, load_file(one / SINGLE)[name])
    whole[:] = 0  # its own memory
    assert folder.read(name).any()


def test_a_foreign_model_is_told_from_a_run_folder(one, tmp_path):
    assert is_foreign(one) and is_foreign(tmp_path / "a.gguf")
    assert not is_foreign(tmp_path) and not is_foreign(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"there is no .*a\.gguf"):
        open_archive(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="no config.json"):
        foreign_spec(tmp_path)


def test_a_wide_dtype_is_refused_by_name(one):
    changed(
        one,
        lambda tensors: tensors.update(
            {"model.norm.weight": tensors["model.norm.weight"].astype(np.float64)}
        ),
    )
    archive = HuggingFaceFolder(one)
    with pytest.raises(CheckpointError, match="model.norm.weight F64 instead of"):
        load_params(archive, open_archive(one).skeleton)


def test_a_folder_without_a_tokenizer_opens_and_says_so_when_asked(one):
    opened = open_archive(one)
    with pytest.raises(CheckpointError, match=f"{one}.*tokenizer"):
        _ = opened.tokenizer
