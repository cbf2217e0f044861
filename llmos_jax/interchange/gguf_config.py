"""Turn a GGUF file's metadata into the config.json of the same model.

The keys are those of `transformers` 5 (`rope_parameters`, `layer_types`). What GGUF
leaves to the architecture is filled in as llama.cpp does (src/llama-model.cpp): Gemma's
window pattern, its local rotation and its scale of attention. What cannot be said in a
config.json is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmos_jax.errors import CheckpointError
from llmos_jax.interchange.gguf_header import GgufHeader
from llmos_jax.interchange.gguf_names import ARCHITECTURES, ROPE_FACTORS
from llmos_jax.interchange.gguf_rope import scaling_of_divisors

GEMMA_PERIODS = {"gemma2": 2, "gemma3": 6}
"""Every so many layers one sees everything; the others slide."""
GEMMA_LOCAL_THETA = 10000.0
"""Base of the rotation in Gemma 3's sliding layers."""
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the one size in which heads of the residual's width set the scale."""
_KINDS = {int: "whole number", float: "number", str: "name"}
_ATTENTION_NUMBERS = {
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
    "unk_token_id": "tokenizer.ggml.unknown_token_id",
}


def config_of_gguf(
    path: Path, header: GgufHeader, read_divisors: Callable[[], np.ndarray]
) -> dict[str, Any]:
    """Return the config.json that the metadata of `path` amounts to.

    Args:
        path: for errors.
        header: of the file.
        read_divisors: returns the tensor `rope_freqs.weight`, if there is one.

    Raises:
        CheckpointError: of another architecture, or a field that is needed is missing,
            of the wrong type, or says what no config.json can.
    """
    return _Metadata(path, header, read_divisors).config()


def gemma_query_scale(
    architecture: str, layers: int, width: int, heads: int, head_dim: int
) -> int:
    """Return by the inverse root of what llama.cpp scales a Gemma's scores."""
    return width // heads if layers == _GEMMA_27B.get(architecture) else head_dim


class _Metadata:
    def __init__(
        self,
        path: Path,
        header: GgufHeader,
        read_divisors: Callable[[], np.ndarray],
    ):
        self._path = path
        self._fields: Mapping[str, Any] = header.fields
        self._tensors = header.tensors
        self._read_divisors = read_divisors
        self._arch = header.fields.get("general.architecture", "")

    def config(self) -> dict[str, Any]:
        if self._arch not in ARCHITECTURES.values():
            raise self._error(
                f"is of the architecture {self._arch!r}; those that can be read are "
                f"{', '.join(dict.fromkeys(ARCHITECTURES.values()))}."
            )
        if "token_embd.weight" not in self._tensors:
            raise self._error("has no tensor token_embd.weight, the table of tokens.")
        if self._size("block_count") > len(self._tensors):
            raise self._error(
                f"says {self._arch}.block_count = {self._size('block_count')}, and has "
                f"{len(self._tensors)} tensors."
            )
        config = {
            "model_type": self._model_type(),
            "hidden_size": self._size("embedding_length"),
            "num_hidden_layers": self._size("block_count"),
            "intermediate_size": self._size("feed_forward_length"),
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "vocab_size": self._tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in self._tensors,
            **{ours: self._size(key) for ours, key in _ATTENTION_NUMBERS.items()},
        }
        config["head_dim"] = self._head_dim(config)
        for ours, key in _TOKENS.items():
            if key in self._fields:
                config[ours] = self._fields[key]
        name = self._fields.get("general.name")
        if isinstance(name, str) and name:
            config["_name_or_path"] = name
        config.update(self._experts())
        if self._arch.startswith("gemma"):
            return config | self._gemma(config)
        return config | self._plain(config)

    def _model_type(self) -> str:
        if self._arch == "llama":
            if self._get("expert_count", int, 0):
                return "mixtral"
            return (
                "mistral" if self._get("attention.sliding_window", int, 0) else "llama"
            )
        return {ours: theirs for theirs, ours in ARCHITECTURES.items()}[self._arch]

    def _head_dim(self, config: dict[str, Any]) -> int:
        plain = config["hidden_size"] // config["num_attention_heads"]
        rotated = self._get("rope.dimension_count", int)
        head_dim = self._get("attention.key_length", int, plain)
        values = self._get("attention.value_length", int, head_dim)
        if values != head_dim:
            raise self._error(
                f"has keys of {head_dim} dimensions per head and values of {values}; "
                "they must be alike."
            )
        if rotated not in (None, head_dim):
            raise self._error(
                f"rotates {rotated} of the {head_dim} dimensions of a head "
                "(rope.dimension_count); models here rotate all."
            )
        return head_dim

    def _experts(self) -> dict[str, Any]:
        count = self._get("expert_count", int, 0)
        if not count:
            return {}
        chosen = self._size("expert_used_count")
        if self._arch == "llama":
            return {"num_local_experts": count, "num_experts_per_tok": chosen}
        width = self._size("expert_feed_forward_length")
        return {
            "num_experts": count,
            "num_experts_per_tok": chosen,
            "moe_intermediate_size": width,
            # llama.cpp's qwen3moe always makes the chosen experts' weights sum to 1.
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def _plain(self, config: dict[str, Any]) -> dict[str, Any]:
        extra: dict[str, Any] = {
            "hidden_act": "silu",
            "rope_parameters": self._rope(),
        }
        if self._arch != "qwen2":  # which always has them on q, k and v
            extra["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        if self._arch == "llama":
            extra["mlp_bias"] = "blk.0.ffn_gate.bias" in self._tensors
        if window := self._get("attention.sliding_window", int, 0):
            extra["sliding_window"] = window
        elif config["model_type"] in ("mistral", "mixtral"):
            extra["sliding_window"] = None
        if window and config["model_type"].startswith("qwen"):
            extra |= {"use_sliding_window": True, "max_window_layers": 0}
        return extra

    def _gemma(self, config: dict[str, Any]) -> dict[str, Any]:
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        window = self._get("attention.sliding_window", int, 0)
        usual = GEMMA_PERIODS[self._arch]
        period = self._get("attention.sliding_window_pattern", int, usual)
        full = [
            not window or not period or (at + 1) % period == 0 for at in range(layers)
        ]
        rope = self._rope()
        if self._arch == "gemma3":
            theta = self._number("rope.freq_base_swa", GEMMA_LOCAL_THETA)
            local = {"rope_type": "default", "rope_theta": theta}
            rope = {"full_attention": rope, "sliding_attention": local}
        scale = gemma_query_scale(
            self._arch, layers, config["hidden_size"], heads, config["head_dim"]
        )
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": rope,
            "attention_bias": False,
            "sliding_window": window or None,
            "layer_types": [
                f"{'full' if one else 'sliding'}_attention" for one in full
            ],
            "query_pre_attn_scalar": scale,
            "attn_logit_softcapping": self._get("attn_logit_softcapping", float),
            "final_logit_softcapping": self._get("final_logit_softcapping", float),
        }

    def _rope(self) -> dict[str, Any]:
        theta = self._number("rope.freq_base", 10000.0)
        kind = self._get("rope.scaling.type", str, "none")
        rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
        if kind == "linear":
            rope |= {"rope_type": kind, "factor": self._number("rope.scaling.factor")}
        elif kind != "none":
            raise self._error(
                f"slows its rotation by the rule {kind!r} (rope.scaling.type); the "
                "rules linear and llama3 can be read."
            )
        if ROPE_FACTORS not in self._tensors:
            return rope
        divisors = self._read_divisors()
        if np.all(divisors == 1):
            return rope
        original = self._get("rope.scaling.original_context_length", int)
        scaling = None
        if kind == "none" and np.all(divisors >= 1) and np.all(np.isfinite(divisors)):
            scaling = scaling_of_divisors(divisors, theta, original)
        if scaling is None:
            raise self._error(
                f"divides its rotation's frequencies by {ROPE_FACTORS}, and these "
                "divisors do not follow Llama 3's rule, the only one that can be read."
            )
        return {
            "rope_theta": theta,
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        """An optional field; an error if it is of another type."""
        found = self._fields.get(f"{self._arch}.{key}")
        if found is None:
            return default
        unusable = isinstance(found, float) and not math.isfinite(found)
        if type(found) is not kind or unusable:
            raise self._error(
                f"says {self._arch}.{key} = {found!r:.80}; a {_KINDS[kind]} is needed."
            )
        return found

    def _size(self, key: str) -> int:
        found = self._get(key, int, 0)
        if found < 1:
            raise self._error(
                f"says {self._arch}.{key} = {found or None}; a whole number of at "
                "least 1 is needed."
            )
        return found

    def _number(self, key: str, default: float | None = None) -> float:
        found = self._get(key, float, default)
        if found is None or found <= 0:
            raise self._error(
                f"says {self._arch}.{key} = {found}; a positive number is needed."
            )
        return found

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {what}")
