"""The names of tensors in GGUF and in Hugging Face files, and what differs in values.

Three things differ between the two beyond names. llama.cpp rotates neighbours where
Hugging Face rotates halves, so in its `llama` architecture the rows of q and k are
permuted; its Gemma norms are stored with 1 added; and it stacks all experts of a layer
in one tensor. SOURCE: llama.cpp's conversion/llama.py and gemma.py, and the tables of
the `gguf` package (constants.py, tensor_mapping.py).

Letters: N num_heads, K num_kv_heads, H head_dim.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""By Hugging Face's `model_type`."""

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotations' frequencies, which are no weights of the model."""

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ANY = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PLAIN = {**_ANY, "ffn_norm": "post_attention_layernorm"}
_GEMMA = {
    **_ANY,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROUTER = "ffn_gate_inp"
_MIXTRAL = ("block_sparse_moe.gate", {"gate": "w1", "down": "w2", "up": "w3"})
_QWEN = ("mlp.gate", {part: f"{part}_proj" for part in ("gate", "down", "up")})
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERTS = re.compile(r"ffn_(gate|up|down)_exps")
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d+)")  # Mixtral files before 2024-04


class Place(NamedTuple):
    """Where a Hugging Face tensor is in GGUF."""

    name: str
    expert: int | None = None
    """Index in a stack of them."""


def foreign_names(name: str, architecture: str, num_experts: int) -> list[str]:
    """Return Hugging Face's names of what a GGUF tensor holds, one per expert if it is
    a stack of them; its own name if it has no other, for a reader to stumble on."""
    top, _, suffix = name.rpartition(".")
    if top in _TOP:
        return [f"{_TOP[top]}.{suffix}"]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return [name]
    layer, part, suffix = match.groups()
    prefix = f"model.layers.{layer}."
    plain = _layer_names(architecture)
    if part in plain:
        return [f"{prefix}{plain[part]}.{suffix}"]
    router, parts = _expert_names(architecture)
    if part == _ROUTER:
        return [f"{prefix}{router}.{suffix}"]
    block = router.rpartition(".")[0]
    if stack := _EXPERTS.fullmatch(part):
        last = f"{parts[stack[1]]}.{suffix}"
        return [f"{prefix}{block}.experts.{e}.{last}" for e in range(num_experts)]
    if one := _ONE_EXPERT.fullmatch(part):
        return [f"{prefix}{block}.experts.{one[2]}.{parts[one[1]]}.{suffix}"]
    return [name]


def place_of(foreign_name: str, architecture: str) -> Place | None:
    """Return where a Hugging Face tensor goes in GGUF; None: nowhere."""
    top, _, suffix = foreign_name.rpartition(".")
    for ours, theirs in _TOP.items():
        if top == theirs:
            return Place(f"{ours}.{suffix}")
    match = _LAYER.fullmatch(foreign_name)
    if match is None:
        return None
    layer, part, suffix = match.groups()
    for ours, theirs in _layer_names(architecture).items():
        if part == theirs:
            return Place(f"blk.{layer}.{ours}.{suffix}")
    router, parts = _expert_names(architecture)
    if part == router:
        return Place(f"blk.{layer}.{_ROUTER}.{suffix}")
    block = router.rpartition(".")[0]
    expert = re.fullmatch(rf"{re.escape(block)}\.experts\.(\d+)\.(\w+)", part)
    for ours, theirs in parts.items():
        if expert and expert[2] == theirs:
            return Place(f"blk.{layer}.ffn_{ours}_exps.{suffix}", int(expert[1]))
    return None


def rotated_heads(name: str, architecture: str, heads: tuple[int, int]) -> int:
    """Return over how many heads a GGUF tensor's rows are permuted; 0: they are not.

    `heads` is (N, K).
    """
    match = _BLOCK.fullmatch(name)
    if architecture != "llama" or match is None:
        return 0
    return {"attn_q": heads[0], "attn_k": heads[1]}.get(match[2], 0)


def has_one_added(name: str, architecture: str) -> bool:
    """Whether a GGUF tensor is a norm that is stored as 1 + scale."""
    return architecture.startswith("gemma") and name.endswith("norm.weight")


def to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Turn llama.cpp's order of a rotation's rows (neighbours) into Hugging Face's
    (halves); [N * H, ...] in both."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo `to_halves`."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _layer_names(architecture: str) -> dict[str, str]:
    return _GEMMA if architecture.startswith("gemma") else _PLAIN


def _expert_names(architecture: str) -> tuple[str, dict[str, str]]:
    return _MIXTRAL if architecture == "llama" else _QWEN
