"""Tiny models of every architecture that GGUF files are read and written for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmos_jax.data import Tokenizer
from llmos_jax.interchange import weight_map
from llmos_jax.interchange.gguf_write import write_gguf
from llmos_jax.ir import ModelSpec, RopeScaling

VOCAB = 320
_SIZES: dict[str, Any] = {
    "family": "llama",
    "num_layers": 2,
    "embed_dim": 64,
    "ffn_dim": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_seq_len": 128,
    "norm_eps": 2.0**-17,  # exact in float32, as GGUF keeps it
}
_GEMMA = {
    "activation": "gelu_tanh",
    "norm_offset": True,
    "post_norms": True,
    "scaled_embeddings": True,
    "tied_embeddings": True,
    "sliding_window": 8,
    "rope_theta": 10000.0,
}
_MOE = {"family": "moe", "num_experts": 4, "experts_per_token": 2}
_LLAMA3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
)

SPECS = {
    "llama": {"architecture": "llama", "tied_embeddings": True},
    "llama3": {
        "architecture": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3,
        "head_dim": 64,
    },
    "llama_linear": {
        "architecture": "llama",
        "rope_scaling": RopeScaling(kind="linear", factor=4.0),
    },
    "mistral": {"architecture": "mistral", "sliding_window": 16},
    "mixtral": {"architecture": "mixtral", **_MOE},
    "qwen2": {"architecture": "qwen2", "qkv_bias": True},
    "qwen3": {"architecture": "qwen3", "qk_norm": True, "head_dim": 32},
    "qwen3_moe": {"architecture": "qwen3_moe", "qk_norm": True, **_MOE},
    "gemma2": {
        "architecture": "gemma2",
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
        "layer_pattern": ("sliding", "full"),
        **_GEMMA,
    },
    "gemma3": {
        "architecture": "gemma3_text",
        "qk_norm": True,
        "num_layers": 7,
        "layer_pattern": ("sliding",) * 5 + ("full",),
        "local_rope_theta": 10000.0,
        **_GEMMA,
        "rope_theta": 1000000.0,
        "rope_scaling": RopeScaling(kind="linear", factor=8.0),
    },
}


def spec_for(name: str, **changes: Any) -> ModelSpec:
    """A tiny model of SPECS, changed."""
    return ModelSpec(name=name, **{**_SIZES, **SPECS[name], **changes}).check()


def params_for(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 parameters by path."""
    from llmos_jax.interchange import architecture_of

    rng = np.random.default_rng(seed)
    return {
        entry.path: rng.standard_normal(entry.shape(spec), np.float32) / 8
        for entry in weight_map(spec, architecture_of(spec))
    }


def small_tokenizer(size: int = VOCAB - 16) -> Tokenizer:
    """A byte-level BPE that cuts text as GPT-2's does."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the cat and the other cats sat there " * 9], trainer)
    return Tokenizer(inner)


def written(folder: Path, name: str, **changes: Any) -> Path:
    """A file of a tiny model, float32."""
    spec = spec_for(name, **changes)
    path = folder / f"{name}.gguf"
    write_gguf(path, spec, params_for(spec), small_tokenizer(), kind="f32")
    return path


def hand_written(
    path: Path,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    architecture: str = "llama",
) -> Path:
    """A file that the `gguf` package writes: a llama's metadata (N = 4, K = 2, H = 16),
    `edit`ed, and tensors, packed already."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    edit(writer)
    table = np.zeros((VOCAB, 64), np.float32), gguf.GGMLQuantizationType.F32
    for name, (packed, kind) in {"token_embd.weight": table, **(tensors or {})}.items():
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
