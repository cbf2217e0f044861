"""A GGUF file looks like the Hugging Face folder of the same model."""

from __future__ import annotations

import json
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_models import VOCAB, hand_written, written

from llmos_jax.errors import CheckpointError
from llmos_jax.interchange.gguf_file import GgufFile
from llmos_jax.interchange.gguf_names import to_halves, to_neighbours
from llmos_jax.interchange.gguf_rope import rope_divisors
from llmos_jax.ir import RopeScaling

MODELS = Path("~/.cache/llmos-models").expanduser()
# What transformers writes into every config, and GGUF knows nothing of.
_NOT_MATHEMATICS = {
    "_model_name_or_path",
    "_sliding_window_pattern",
    "attention_dropout",
    "dtype",
    "initializer_range",
    "pretraining_tp",
    "transformers_version",
    "use_bidirectional_attention",
    "use_cache",
}
_UP = "blk.0.ffn_up.weight"


def _real(name: str) -> tuple[GgufFile, Path]:
    folder = MODELS / name
    if not (folder / "hf" / "model.safetensors").is_file():
        pytest.skip(
            f"no {folder}/hf; `tools/get-model {name}` and transformers make it"
        )
    return GgufFile(folder / "model.gguf"), folder / "hf"


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_the_config_is_the_one_that_transformers_makes(name: str) -> None:
    file, folder = _real(name)
    wanted = json.loads((folder / "config.json").read_text())
    found = file.config
    assert found.pop("_name_or_path") == file.fields["general.name"]
    assert found == {
        key: value for key, value in wanted.items() if key not in _NOT_MATHEMATICS
    }


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_every_tensor_is_bit_equal_to_transformers(name: str) -> None:
    from safetensors import safe_open

    file, folder = _real(name)
    with safe_open(folder / "model.safetensors", "numpy") as wanted:
        assert set(wanted.keys()) == set(file.tensors)
        for tensor, facts in file.tensors.items():
            # Of the 262144 rows of Gemma's table, the first and last 4096.
            cuts = [slice(None)]
            if facts.shape[0] > 50000:
                cuts = [slice(4096), slice(facts.shape[0] - 4096, None)]
            stored = wanted.get_slice(tensor)
            assert tuple(stored.get_shape()) == facts.shape
            for rows in cuts:
                got = file.read(tensor, rows)
                assert got.dtype == np.dtype(facts.dtype)
                assert got.tobytes() == stored[rows].tobytes(), tensor


@pytest.mark.parametrize(
    "kind",
    "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split(),
)
def test_packed_rows_are_those_of_the_gguf_package(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    packed = rng.integers(0, 120, (48, 512 // block * size), np.uint8)
    tensors = {_UP: (packed, Kind[kind])}
    file = GgufFile(hand_written(tmp_path / "a.gguf", tensors=tensors))
    name = "model.layers.0.mlp.up_proj.weight"
    whole = gguf.dequantize(packed, Kind[kind])
    assert file.tensors[name] == ((48, 512), "float32", packed.nbytes)
    np.testing.assert_array_equal(file.read(name), whole)
    np.testing.assert_array_equal(file.read(name, slice(7, 31)), whole[7:31])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_tensors_keep_their_type(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 64), np.float32)
    packed = gguf.quantize(values, Kind[kind])
    file = GgufFile(
        hand_written(tmp_path / "a.gguf", tensors={_UP: (packed, Kind[kind])})
    )
    got = file.read("model.layers.0.mlp.up_proj.weight", slice(1, 5))
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert got.dtype.name == names[kind]
    assert got.tobytes() == packed[1:5].tobytes()


def test_a_type_that_nobody_can_unpack_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {_UP: (np.zeros((2, 64), np.int8), Kind.I8)}
    with pytest.raises(CheckpointError, match=f"a.gguf.*{_UP} is packed as I8"):
        GgufFile(hand_written(tmp_path / "a.gguf", tensors=tensors))


def test_rotated_rows_of_llama_come_back_in_halves(tmp_path: Path) -> None:
    halves = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    neighbours = halves.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    assert np.array_equal(to_neighbours(halves, 4), neighbours)
    assert np.array_equal(to_halves(neighbours, 4), halves)
    tensors = {"blk.0.attn_q.weight": (neighbours, Kind.F32)}
    file = GgufFile(hand_written(tmp_path / "a.gguf", tensors=tensors))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(file.read(name), halves)
    for start, stop in [(0, 0), (3, 5), (15, 17), (5, 60), (16, 32)]:
        assert np.array_equal(file.read(name, slice(start, stop)), halves[start:stop])


def test_qwen_rows_stay_as_they_are(tmp_path: Path) -> None:
    q = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    tensors = {"blk.0.attn_q.weight": (q, Kind.F32)}
    path = hand_written(tmp_path / "a.gguf", tensors=tensors, architecture="qwen2")
    assert np.array_equal(
        GgufFile(path).read("model.layers.0.self_attn.q_proj.weight"), q
    )


def test_gemma_norms_lose_the_one_that_was_added(tmp_path: Path) -> None:
    stored = np.linspace(0.5, 3, 64, dtype=np.float32)
    tensors = {"output_norm.weight": (stored, Kind.F32)}
    path = hand_written(tmp_path / "a.gguf", tensors=tensors, architecture="gemma2")
    got = GgufFile(path).read("model.norm.weight")
    assert np.array_equal(got, stored - np.float32(1))


def test_a_stack_of_experts_is_read_one_by_one(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).standard_normal((3, 96, 64), np.float32)

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_expert_count(3)
        writer.add_expert_used_count(2)

    tensors = {"blk.0.ffn_up_exps.weight": (stack, Kind.F32)}
    file = GgufFile(hand_written(tmp_path / "a.gguf", edit, tensors))
    assert file.config["model_type"] == "mixtral"
    for expert in range(3):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w3.weight"
        assert file.tensors[name].shape == (96, 64)
        assert np.array_equal(file.read(name, slice(9, 40)), stack[expert, 9:40])


def test_an_unknown_tensor_keeps_its_name(tmp_path: Path) -> None:
    tensors = {"blk.0.surprise.weight": (np.zeros((2, 2), np.float32), Kind.F32)}
    file = GgufFile(hand_written(tmp_path / "a.gguf", tensors=tensors))
    assert "blk.0.surprise.weight" in file.tensors


@pytest.mark.parametrize(
    ("theta", "head_dim", "scaling"),
    [
        (5e5, 128, {"factor": 8.0}),  # Llama 3.1
        (5e5, 64, {"factor": 32.0}),  # Llama 3.2
        (1e4, 64, {"factor": 2.0, "low_freq_factor": 1.5, "high_freq_factor": 6.25}),
    ],
)
def test_llama3_scaling_is_recovered_from_its_divisors(
    theta: float, head_dim: int, scaling: dict[str, float], tmp_path: Path
) -> None:
    given = RopeScaling(**scaling)  # type: ignore[arg-type]
    divisors = rope_divisors(given, theta, head_dim)

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_freq_base(theta)
        writer.add_key_length(head_dim)

    tensors = {"rope_freqs.weight": (divisors, Kind.F32)}
    file = GgufFile(hand_written(tmp_path / "a.gguf", edit, tensors))
    assert file.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": given.factor,
        "low_freq_factor": given.low_freq_factor,
        "high_freq_factor": given.high_freq_factor,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in file.tensors


def test_divisors_of_another_rule_are_refused(tmp_path: Path) -> None:
    divisors = np.linspace(1, 9, 8, dtype=np.float32) ** 2
    tensors = {"rope_freqs.weight": (divisors, Kind.F32)}
    with pytest.raises(CheckpointError, match="a.gguf divides .* Llama 3's rule"):
        GgufFile(hand_written(tmp_path / "a.gguf", tensors=tensors))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.block_count", None, "llama.block_count = None"),
        ("llama.block_count", 1 << 30, "block_count = 1073741824, and has 1 tensors"),
        ("llama.attention.head_count_kv", [2, 4], r"head_count_kv = \[2, 4\]"),
        ("llama.rope.dimension_count", 8, "rotates 8 of the 16 dimensions"),
        ("llama.attention.value_length", 8, "values of 8"),
        ("llama.rope.scaling.type", "yarn", "by the rule 'yarn'"),
        ("general.architecture", "mamba", "architecture 'mamba'"),
        ("split.count", 3, "one of 3 parts .*llama-gguf-split --merge"),
    ],
)
def test_what_no_config_can_say_is_refused(
    key: str, value: Any, said: str, tmp_path: Path
) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)

    with pytest.raises(CheckpointError, match=f"a.gguf .*{said}"):
        GgufFile(hand_written(tmp_path / "a.gguf", edit))


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"PK\x03\x04", "begins with b'PK"),
        (b"GGUF" + struct.pack("<I", 1), "of version 1"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian .*gguf-convert-endian"),
    ],
)
def test_another_kind_of_file_is_refused(
    start: bytes, said: str, tmp_path: Path
) -> None:
    path = hand_written(tmp_path / "a.gguf")
    path.write_bytes(start + path.read_bytes()[len(start) :])
    with pytest.raises(CheckpointError, match=f"a.gguf .*{said}"):
        GgufFile(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.gguf cannot be read: No such file"):
        GgufFile(tmp_path / "none.gguf")


def test_a_truncated_file_is_refused_with_its_tensor(tmp_path: Path) -> None:
    path = written(tmp_path, "llama")
    data = path.read_bytes()
    path.write_bytes(data[:-64])
    with pytest.raises(CheckpointError, match=r"llama.gguf .* tensor output_norm"):
        GgufFile(path)


def test_a_file_that_shrinks_once_open_is_refused(tmp_path: Path) -> None:
    path = hand_written(tmp_path / "a.gguf")
    file = GgufFile(path)
    with path.open("r+b") as shorter:
        shorter.truncate(path.stat().st_size - VOCAB * 4)
    with pytest.raises(CheckpointError, match="a.gguf ends inside tensor token_embd"):
        file.read("model.embed_tokens.weight")


def test_every_shortened_header_is_refused(tmp_path: Path) -> None:
    data = hand_written(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, 500, 3):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut.gguf"):
            GgufFile(path)


def test_a_changed_byte_never_breaks_more_than_the_file(tmp_path: Path) -> None:
    data = bytearray(hand_written(tmp_path / "a.gguf").read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "changed.gguf"
    refused = 0
    for at in rng.integers(0, 500, 300):
        changed = data.copy()
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            GgufFile(path)
        except CheckpointError as problem:
            refused += "changed.gguf" in str(problem)
    assert refused > 100


def test_threads_read_the_same(tmp_path: Path) -> None:
    file = GgufFile(written(tmp_path, "mixtral"))
    names = list(file.tensors) * 4
    alone = {name: file.read(name).tobytes() for name in file.tensors}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(file.read, names))
    assert all(one.tobytes() == alone[name] for name, one in zip(names, together))


def test_a_few_rows_need_little_memory(tmp_path: Path) -> None:
    packed = np.zeros((65536, 64 // 32 * 34), np.uint8)
    tensors = {_UP: (packed, Kind.Q8_0)}
    file = GgufFile(hand_written(tmp_path / "a.gguf", tensors=tensors))
    whole = 65536 * 64 * 4
    tracemalloc.start()
    file.read("model.layers.0.mlp.up_proj.weight", slice(1000, 1064))
    _, few = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    file.read("model.layers.0.mlp.up_proj.weight")
    _, all_rows = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert few < 1 << 20
    assert all_rows < whole + (32 << 20)
