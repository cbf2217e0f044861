"""The families: one row for each `model_type`.

Defaults are those of transformers 5.23's configuration classes, which apply where a
config.json lacks the key (as the hub's Gemma 3 files lack most of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is special to a `model_type`."""

    model_class: str
    """As config.json's `architectures` names it."""
    defaults: Mapping[str, Any]
    """Of keys that config.json may lack."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelSpec that every member has."""
    activation_key: str = "hidden_act"
    bias: Literal["none", "qkv", "attention_bias"] = "none"
    """Biases of attention: on q, k and v always (Qwen2), or as `attention_bias`
    says on q, k, v and the output."""
    window: Literal["none", "every", "late", "alternate"] = "none"
    """Which layers slide: all; from `max_window_layers` on; or all but every
    `sliding_window_pattern`-th. `layer_types` overrules the last two."""
    window_flag: bool = False
    """Whether there is a window only with `use_sliding_window`."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that transformers ignores here, or we cannot follow, and the values that
    are no matter."""


_LLAMA_SIZES = {"num_key_value_heads": None, "head_dim": None}
_QWEN = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "attention_bias": False,
}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_GEMMA_FEATURES = {"norm_offset": True, "post_norms": True, "scaled_embeddings": True}
_MISTRAL = {
    **_LLAMA_SIZES,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
_OFF = (None, False)
_NO_BIAS = {"attention_bias": _OFF}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        model_class="LlamaForCausalLM",
        defaults={
            **_LLAMA_SIZES,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "attention_bias": False,
        },
        bias="attention_bias",
        fixed={"sliding_window": (None,)},
    ),
    "mistral": Family(
        model_class="MistralForCausalLM",
        defaults={**_MISTRAL, "rms_norm_eps": 1e-6, "sliding_window": 4096},
        window="every",
        fixed=_NO_BIAS,
    ),
    "mixtral": Family(
        model_class="MixtralForCausalLM",
        defaults={
            **_MISTRAL,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_theta": 1000000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        window="every",
        fixed=_NO_BIAS,
    ),
    "qwen2": Family(
        model_class="Qwen2ForCausalLM",
        defaults={**_QWEN, "num_key_value_heads": 32, "head_dim": None},
        bias="qkv",
        window="late",
        window_flag=True,
    ),
    "qwen3": Family(
        model_class="Qwen3ForCausalLM",
        defaults={**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
        features={"qk_norm": True},
        bias="attention_bias",
        window="late",
        window_flag=True,
    ),
    "qwen3_moe": Family(
        model_class="Qwen3MoeForCausalLM",
        defaults={
            **_QWEN,
            "num_key_value_heads": 4,
            "head_dim": None,
            "moe_intermediate_size": 768,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        features={"qk_norm": True},
        bias="attention_bias",
        window="every",
        window_flag=True,
        fixed={"decoder_sparse_step": (None, 1), "mlp_only_layers": (None, [])},
    ),
    "gemma2": Family(
        model_class="Gemma2ForCausalLM",
        defaults={
            **_GEMMA,
            "max_position_embeddings": 8192,
            "vocab_size": 256000,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "sliding_window_pattern": 2,
        },
        features=_GEMMA_FEATURES,
        activation_key="hidden_activation",
        bias="attention_bias",
        window="alternate",
        fixed={"sliding_window_pattern": (None, 2)},
    ),
    "gemma3_text": Family(
        model_class="Gemma3ForCausalLM",
        defaults={
            **_GEMMA,
            "max_position_embeddings": 131072,
            "vocab_size": 262208,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "sliding_window_pattern": 6,
        },
        features={**_GEMMA_FEATURES, "qk_norm": True},
        activation_key="hidden_activation",
        bias="attention_bias",
        window="alternate",
        # transformers reads the key and never caps Gemma 3's scores.
        fixed={"attn_logit_softcapping": (None,)},
    ),
}

FIXED: Mapping[str, tuple[Any, ...]] = {
    "mlp_bias": _OFF,
    "partial_rotary_factor": (None, 1, 1.0),
    "use_bidirectional_attention": _OFF,
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "clip_qkv": (None,),
    "logit_scale": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
}
"""Keys of any family that change the mathematics, and the values that do not."""

SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
"""Read in families with GeGLU; elsewhere they must be absent."""
