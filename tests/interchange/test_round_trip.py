"""Hugging Face to ours and back is equal bit for bit, whole or over eight devices."""

from __future__ import annotations

import json

import hf_models
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from llmos_jax.data import bytes_tokenizer
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.interchange import (
    HuggingFaceFolder,
    foreign_spec,
    foreign_tensors,
    load_params,
    open_archive,
    stored_dtypes,
    write_huggingface,
)
from llmos_jax.models import skeleton

ALL = list(hf_models.FAMILIES)
BYTES = {"vocab_size": 264}
"""Room for the 257 tokens of `bytes_tokenizer`."""


def stored(folder) -> dict[str, np.ndarray]:
    """Every tensor as the safetensors package reads it."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def differing(a, b) -> list[str]:
    """Names of tensors that are not alike in dtype, shape and every bit."""
    assert a.keys() == b.keys()
    return [
        name
        for name in a
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape)
        or a[name].tobytes() != b[name].tobytes()
    ]


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [(one, "float32") for one in ALL] + [("llama", "bfloat16"), ("mixtral", "float16")],
)
def test_there_and_back_is_bit_equal(architecture, dtype, tmp_path):
    made = hf_models.model(architecture, **BYTES).to(getattr(hf_models.torch, dtype))
    folder = hf_models.save(made, tmp_path / "theirs", max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    opened = open_archive(folder)
    params = opened.params()
    assert {str(x.dtype) for x in params.values()} == {dtype}
    assert stored_dtypes(opened.archive, opened.skeleton.spec) == dict.fromkeys(
        params, dtype
    )
    write_huggingface(
        tmp_path / "ours",
        opened.skeleton.spec,
        params,
        bytes_tokenizer(),
        shard_bytes=20_000,
    )
    assert differing(stored(folder), stored(tmp_path / "ours")) == []
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    back = hf_models.transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours"
    )
    assert str(back.dtype) == f"torch.{dtype}"
    assert foreign_spec(tmp_path / "ours") == opened.skeleton.spec
    for name, tensor in made.state_dict().items():
        assert hf_models.torch.equal(tensor, back.state_dict()[name]), name


SPLITS = {
    "embed.table": PartitionSpec("a", "b"),
    "layers.attention.q": PartitionSpec(None, "b", "a"),
    "layers.attention.k": PartitionSpec("b", None, None, "a"),
    "layers.attention.o": PartitionSpec(None, None, "b", "a"),
    "layers.attention.q_norm.scale": PartitionSpec("b", "a"),
    "layers.ffn.gate": PartitionSpec("b", "a"),
    "layers.ffn.down": PartitionSpec("b", None, ("a",)),
    "final_norm.scale": PartitionSpec(("a", "b")),
}
"""Every way to cut a tensor's rows, columns, heads and layers, on a mesh of 4 x 2."""


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_shards_on_eight_devices_are_parts_of_the_whole(architecture, tmp_path):
    folder = hf_models.save(hf_models.model(architecture, **BYTES), tmp_path / "m")
    opened = open_archive(folder)
    whole = opened.params()
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    shardings = {
        path: NamedSharding(mesh, SPLITS.get(path, PartitionSpec())) for path in whole
    }
    spread = opened.params(shardings)
    assert (
        differing(
            {path: np.asarray(x) for path, x in whole.items()},
            {path: np.asarray(x) for path, x in spread.items()},
        )
        == []
    )
    assert all(spread[path].sharding == shardings[path] for path in whole)
    assert spread["embed.table"].addressable_shards[0].data.shape == (66, 16)
    assert (
        differing(stored(folder), dict(foreign_tensors(opened.skeleton.spec, spread)))
        == []
    )


def test_only_what_has_a_sharding_is_read(tmp_path):
    opened = open_archive(hf_models.save(hf_models.model("llama"), tmp_path / "m"))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    params = opened.params({"final_norm.scale": here}, dtype="bfloat16")
    assert params.keys() == {"final_norm.scale"}
    assert params["final_norm.scale"].dtype == "bfloat16"
    assert params["final_norm.scale"].devices() == {jax.devices()[3]}


def test_a_cast_rounds_as_jax_does(tmp_path):
    opened = open_archive(hf_models.save(hf_models.model("llama"), tmp_path / "m"))
    exact, cast = opened.params(), opened.params(dtype="bfloat16")
    for path in exact:
        assert bool((exact[path].astype("bfloat16") == cast[path]).all()), path


def test_layers_of_two_dtypes_become_float32(tmp_path):
    made = hf_models.model("llama")
    made.model.layers[1].mlp.to(hf_models.torch.bfloat16)
    folder = HuggingFaceFolder(hf_models.save(made, tmp_path / "m"))
    spec = foreign_spec(folder.path)
    dtypes = stored_dtypes(folder, spec)
    assert dtypes["layers.ffn.up"] == "float32"
    params = load_params(folder, skeleton(spec))
    up = made.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    assert np.array_equal(np.asarray(params["layers.ffn.up"][1]).T, up)


def test_progress_counts_every_byte_once(tmp_path):
    folder = HuggingFaceFolder(
        hf_models.save(hf_models.model("gemma2"), tmp_path / "m")
    )
    told = []
    load_params(
        folder,
        skeleton(foreign_spec(folder.path)),
        on_progress=lambda done, total: told.append((done, total)),
    )
    total = sum(facts.stored_bytes for facts in folder.tensors.values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_donated_parameter_leaves_the_others_alone(tmp_path):
    """On CPUs our buffers become JAX's; what a program may overwrite is copied."""
    opened = open_archive(hf_models.save(hf_models.model("llama"), tmp_path / "m"))
    params = opened.params()
    wanted = np.array(params["embed.table"])
    add = jax.jit(lambda x: x + x.dtype.type(1), donate_argnums=0)
    assert np.array_equal(np.asarray(add(params["embed.table"])), wanted + 1)


def test_a_written_folder_has_the_files_of_a_saved_model(tmp_path):
    opened = open_archive(
        hf_models.save(hf_models.model("llama", **BYTES), tmp_path / "m")
    )
    tokenizer = bytes_tokenizer()
    write_huggingface(
        tmp_path / "out", opened.skeleton.spec, opened.params(), tokenizer
    )
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["dtype"]) == (tokenizer.eos_id, "float32")
    again = open_archive(tmp_path / "out").tokenizer
    assert again.encode("ab").tolist() == tokenizer.encode("ab").tolist()


def test_a_folder_in_use_is_not_written_to(tmp_path):
    opened = open_archive(hf_models.save(hf_models.model("llama"), tmp_path / "m"))
    with pytest.raises(ConfigError, match="exists and is not empty"):
        write_huggingface(
            tmp_path / "m", opened.skeleton.spec, opened.params(), bytes_tokenizer()
        )


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    opened = open_archive(hf_models.save(hf_models.model("llama"), tmp_path / "m"))

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_huggingface(
            tmp_path / "out",
            opened.skeleton.spec,
            opened.params(),
            bytes_tokenizer(),
            on_progress=interrupt,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path):
    opened = open_archive(hf_models.save(hf_models.model("llama"), tmp_path / "m"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_huggingface(
            tmp_path / "file" / "out",
            opened.skeleton.spec,
            opened.params(),
            bytes_tokenizer(),
        )


def test_integers_are_not_exported(tmp_path):
    opened = open_archive(hf_models.save(hf_models.model("llama"), tmp_path / "m"))
    params = {**opened.params(), "final_norm.scale": np.ones(32, np.int8)}
    with pytest.raises(CheckpointError, match="final_norm.scale is int8"):
        next(foreign_tensors(opened.skeleton.spec, params))
