"""A model written as GGUF is the same model when it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_models import SPECS, params_for, small_tokenizer, spec_for, written

from llmos_jax.data import Tokenizer, train_bpe
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.interchange import foreign_tensors, spec_of
from llmos_jax.interchange.gguf_file import GgufFile
from llmos_jax.interchange.gguf_write import write_gguf
from llmos_jax.ir import RopeScaling

Q8_0_RELATIVE = 0.5 / 127 + 2**-11
"""Half a step of 127 to a block's largest number, and the float16 of its scale."""


@pytest.mark.parametrize("name", SPECS)
def test_the_spec_comes_back(name: str, tmp_path: Path) -> None:
    spec = spec_for(name)
    file = GgufFile(written(tmp_path, name))
    assert spec_of(file.config, name) == spec


@pytest.mark.parametrize("name", SPECS)
def test_the_tensors_come_back(name: str, tmp_path: Path) -> None:
    spec = spec_for(name)
    file = GgufFile(written(tmp_path, name))
    tensors = dict(foreign_tensors(spec, params_for(spec)))
    assert set(tensors) == set(file.tensors)
    for tensor, values in tensors.items():
        if spec.norm_offset and tensor.endswith("norm.weight"):
            # (w + 1) - 1 is rounded as a number near 1 is.
            np.testing.assert_allclose(file.read(tensor), values, rtol=0, atol=2**-23)
        else:
            assert np.array_equal(file.read(tensor), values), tensor


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(tmp_path, "llama3"))
    spec = spec_for("llama3")
    found = {tensor.name: tensor for tensor in reader.tensors}
    tensors = dict(foreign_tensors(spec, params_for(spec)))
    up = found["blk.1.ffn_up.weight"]
    assert np.array_equal(up.data, tensors["model.layers.1.mlp.up_proj.weight"])
    # Row 1 of a head of 64 is llama.cpp's second neighbour, Hugging Face's row 32.
    q = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(found["blk.0.attn_q.weight"].data[65], q[64 + 32])
    assert found["rope_freqs.weight"].data[-1] == 8
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2


@pytest.mark.parametrize(
    ("kind", "wanted"), [("f16", "F16"), ("q8_0", "Q8_0"), ("f32", "F32")]
)
def test_matrices_are_packed_and_the_rest_is_not(
    kind: Any, wanted: str, tmp_path: Path
) -> None:
    spec = spec_for("qwen3_moe", ffn_dim=80)
    params = params_for(spec)
    write_gguf(tmp_path / "a.gguf", spec, params, small_tokenizer(), kind=kind)
    kinds = {
        one.name: one.tensor_type.name
        for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors
    }
    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_up_exps.weight"] == wanted
    # Rows of 80 are no multiple of Q8_0's 32.
    assert kinds["blk.0.ffn_down_exps.weight"] == wanted.replace("Q8_0", "F16")
    assert (
        kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    )
    file = GgufFile(tmp_path / "a.gguf")
    for name, values in foreign_tensors(spec, params):
        close = np.abs(values).max() * Q8_0_RELATIVE
        np.testing.assert_allclose(file.read(name), values, rtol=0, atol=close)


def test_rows_without_a_token_get_names(tmp_path: Path) -> None:
    file = GgufFile(written(tmp_path, "llama"))
    tokens = file.fields["tokenizer.ggml.tokens"]
    assert len(tokens) == file.config["vocab_size"] == len(set(tokens))
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    text = "the other cat's 12   hats\n"
    assert np.array_equal(file.tokenizer().encode(text), small_tokenizer().encode(text))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    spec = spec_for("mixtral")
    write_gguf(
        tmp_path / "a.gguf",
        spec,
        params_for(spec),
        small_tokenizer(),
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    file = GgufFile(tmp_path / "a.gguf")
    assert told[-1][1] == sum(one.stored_bytes for one in file.tensors.values())


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma2", {"tied_embeddings": False}, "tied_embeddings always"),
        ("gemma3", {"layer_pattern": ("sliding", "full")}, "every 6th"),
        ("gemma3", {"local_rope_theta": 500.0}, "local_rope_theta = 10000"),
        ("gemma3", {"attention_scale": 0.1}, "attention_scale = 0.25 in this size"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = true always"),
        ("qwen3", {"qkv_bias": True, "out_bias": True}, "no biases in attention"),
        ("qwen2", {"rope_scaling": RopeScaling(factor=8.0)}, "no llama3 rope_scaling"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"model {name} cannot be written .*{said}"):
        written(tmp_path, name, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("f16", 7e4, "holds 70000, and F16 ends at 65504"),
        ("f32", np.nan, "holds nan"),
        ("q8_0", np.inf, "holds inf"),
    ],
)
def test_a_weight_that_does_not_fit_is_named_and_nothing_left(
    kind: Any, value: float, said: str, tmp_path: Path
) -> None:
    spec = spec_for("llama")
    params = params_for(spec)
    params["layers.ffn.up"][1, 2, 3] = value
    with pytest.raises(CheckpointError, match=f"blk.1.ffn_up.weight {said}"):
        write_gguf(tmp_path / "a.gguf", spec, params, small_tokenizer(), kind=kind)
    assert not list(tmp_path.iterdir())


def test_a_window_that_llama_cpp_ignores_is_spoken_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, "gemma3")
    assert "window" not in capfd.readouterr().err
    written(tmp_path, "mistral")
    assert "no sliding window in llama models" in capfd.readouterr().err


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="llama.gguf exists"):
        written(tmp_path, "llama")
    assert path.read_text() == "mine"


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    spec = spec_for("llama")
    ours = train_bpe(["some text of our own " * 20], 300)
    with pytest.raises(ConfigError, match="cuts text as this one does .Split and Byte"):
        write_gguf(tmp_path / "a.gguf", spec, params_for(spec), ours)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    spec = spec_for("llama", vocab_size=260)
    tokenizer = small_tokenizer()
    said = f"has {tokenizer.vocab_size} tokens, and the model rows for 260"
    with pytest.raises(ConfigError, match=said):
        write_gguf(tmp_path / "a.gguf", spec, params_for(spec), tokenizer)


def test_marks_and_template_come_back(tmp_path: Path) -> None:
    spec = spec_for("llama")
    inner = small_tokenizer()
    marks = replace(
        inner.marks,
        bos_id=inner.eos_id,
        adds_bos=True,
        stop_ids=frozenset({inner.eos_id, 5}),
        chat_template="{{ messages[0].content }}",
        config={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    )
    tokenizer = Tokenizer.from_json(inner.to_json())
    tokenizer.marks = marks
    write_gguf(tmp_path / "a.gguf", spec, params_for(spec), tokenizer)
    back = GgufFile(tmp_path / "a.gguf").tokenizer().marks
    kept = ("bos_id", "eos_id", "adds_bos", "stop_ids", "chat_template")
    assert [getattr(back, key) for key in kept] == [getattr(marks, key) for key in kept]
