"""Turn a ModelSpec into the metadata of a GGUF file, as llama.cpp's converter has it.

llama.cpp knows some numbers of an architecture by heart. A model whose numbers differ
would load there and say something else, so it is refused here by name. One exception:
the window of a Mistral is written, and llama.cpp (as its own converter) lets every
token see everything; texts no longer than the window are the same.
"""

from __future__ import annotations

from typing import Any

from llmos_jax.errors import ConfigError
from llmos_jax.interchange.families import architecture_of
from llmos_jax.interchange.gguf_config import (
    GEMMA_LOCAL_THETA,
    GEMMA_PERIODS,
    gemma_query_scale,
)
from llmos_jax.interchange.gguf_names import ARCHITECTURES
from llmos_jax.ir import ModelSpec


def gguf_architecture(spec: ModelSpec) -> str:
    """Return GGUF's name of a model's architecture.

    Raises:
        ConfigError: llama.cpp has no such model; the message names the field.
    """
    architecture = ARCHITECTURES[architecture_of(spec)]
    for what in _lost(spec, architecture):
        raise ConfigError(
            f"model {spec.name} cannot be written as GGUF's {architecture}, which has "
            f"{what}. Write a Hugging Face folder."
        )
    return architecture


def fields_of_spec(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """Return metadata by key, but for tokenizer and file type; floats become float32
    in the file, whole numbers uint32."""
    fields: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_seq_len,
        "embedding_length": spec.embed_dim,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.ffn_dim,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.dimension_count": spec.head_dim,
        "rope.freq_base": float(spec.rope_theta),
        **_optional_fields(spec, architecture),
    }
    return {
        "general.type": "model",
        "general.name": spec.name,
        **{f"{architecture}.{key}": value for key, value in fields.items()},
    }


def _optional_fields(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if spec.num_experts:
        fields["expert_count"] = spec.num_experts
        fields["expert_used_count"] = spec.experts_per_token
    if architecture == "qwen3moe":
        fields["expert_feed_forward_length"] = spec.ffn_dim
    if any(spec.is_sliding) and spec.sliding_window is not None:
        fields["attention.sliding_window"] = spec.sliding_window
    if spec.attention_softcap is not None:
        fields["attn_logit_softcapping"] = float(spec.attention_softcap)
    if spec.logit_softcap is not None:
        fields["final_logit_softcapping"] = float(spec.logit_softcap)
    if spec.rope_scaling is not None and spec.rope_scaling.kind == "linear":
        fields["rope.scaling.type"] = "linear"
        fields["rope.scaling.factor"] = float(spec.rope_scaling.factor)
    elif spec.rope_scaling is not None:
        # llama.cpp needs only the divisors; the number lets them be read back.
        length = spec.rope_scaling.original_max_seq_len
        fields["rope.scaling.original_context_length"] = length
    return fields


def _lost(spec: ModelSpec, architecture: str) -> list[str]:
    """What llama.cpp would do otherwise."""
    return [
        *(_lost_gemma if architecture in GEMMA_PERIODS else _lost_plain)(
            spec, architecture
        ),
        *_lost_anywhere(spec, architecture),
    ]


def _lost_anywhere(spec: ModelSpec, architecture: str) -> list[str]:
    lost = []
    if (spec.qkv_bias or spec.out_bias) and architecture not in ("llama", "qwen2"):
        lost.append("no biases in attention")
    if spec.num_experts and not spec.norm_topk_prob:
        lost.append("norm_topk_prob = true always")
    llama3 = spec.rope_scaling is not None and spec.rope_scaling.kind == "llama3"
    if llama3 and architecture != "llama":
        lost.append("no llama3 rope_scaling")
    return lost


def _lost_plain(spec: ModelSpec, architecture: str) -> list[str]:
    lost = []
    if spec.attention_scale not in (None, spec.head_dim**-0.5):
        lost.append(f"no attention_scale = {spec.attention_scale:g}")
    if any(spec.is_sliding) and not all(spec.is_sliding):
        lost.append("no layers that slide beside others that do not")
    return lost


def _lost_gemma(spec: ModelSpec, architecture: str) -> list[str]:
    lost = []
    period = GEMMA_PERIODS[architecture]
    slides = tuple(bool((at + 1) % period) for at in range(spec.num_layers))
    # Without a window there is nothing to slide over, which only gemma3 can say.
    if spec.is_sliding != slides and (any(spec.is_sliding) or architecture == "gemma2"):
        lost.append(f"sliding layers but for every {period}th (layer_pattern)")
    local = spec.local_rope_theta or spec.rope_theta
    if architecture == "gemma3" and any(slides) and local != GEMMA_LOCAL_THETA:
        lost.append(f"local_rope_theta = {GEMMA_LOCAL_THETA:g}, not {local:g}")
    scale = gemma_query_scale(
        architecture, spec.num_layers, spec.embed_dim, spec.num_heads, spec.head_dim
    )
    ours = spec.attention_scale or spec.head_dim**-0.5
    if abs(ours * scale**0.5 - 1) > 1e-6:
        lost.append(f"attention_scale = {scale**-0.5:g} in this size, not {ours:g}")
    if architecture == "gemma2" and not spec.tied_embeddings:
        lost.append("tied_embeddings always")
    return lost
