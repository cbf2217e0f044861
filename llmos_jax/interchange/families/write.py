"""Turn a ModelSpec into the config.json that transformers 5 loads."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from llmos_jax.errors import ConfigError
from llmos_jax.interchange.families.read import ACTIVATIONS, spec_of
from llmos_jax.interchange.families.rope import write_rope
from llmos_jax.interchange.families.table import FAMILIES
from llmos_jax.interchange.families.window import pattern_of, write_window
from llmos_jax.ir import ModelSpec, RopeScaling

_PLAINEST_FIRST = (
    "llama mistral qwen2 qwen3 mixtral qwen3_moe gemma2 gemma3_text".split()
)


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the config.json of a model; token ids and dtype are the writer's to add.

    Raises:
        ConfigError: no family has these features, or not the one it is said to be of.
    """
    return _config(spec, architecture_of(spec))


def architecture_of(spec: ModelSpec) -> str:
    """Return the `model_type`: the spec's own, or the plainest that has its features.

    Raises:
        ConfigError: it has features that this family lacks, or that none has.
    """
    wanted = [spec.architecture] if spec.architecture else _PLAINEST_FIRST
    lost = {name: _lost(spec, name) for name in wanted if name in FAMILIES}
    if not lost:
        raise ConfigError(
            f"model {spec.name}: architecture = {spec.architecture!r} is not one that "
            f"can be written: {', '.join(FAMILIES)}."
        )
    nearest = min(lost, key=lambda name: len(lost[name]))
    if lost[nearest]:
        raise ConfigError(
            f"model {spec.name} cannot be written as Hugging Face's {nearest}, which "
            f"has no {'; no '.join(lost[nearest])}."
        )
    return nearest


def _lost(spec: ModelSpec, name: str) -> list[str]:
    """The features of a spec that do not come back from its config.json."""
    wanted = _plain(spec)
    try:
        back = _plain(spec_of(_config(spec, name), spec.name))
    except ConfigError as problem:
        return [str(problem).rstrip(".")]
    return [
        f"{field.name} = {getattr(wanted, field.name)!r}"
        for field in fields(spec)
        if getattr(wanted, field.name) != getattr(back, field.name)
    ]


def _plain(spec: ModelSpec) -> ModelSpec:
    """The same mathematics, said in one way."""
    slides = spec.is_sliding
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        scaling = RopeScaling(kind="linear", factor=scaling.factor)
    theta = spec.local_rope_theta
    if not any(slides) or (theta == spec.rope_theta and scaling is None):
        theta = None
    scale = spec.attention_scale
    return replace(
        spec,
        rope_scaling=scaling,
        local_rope_theta=theta,
        attention_scale=None if scale == spec.head_dim**-0.5 else scale,
        sliding_window=spec.sliding_window if any(slides) else None,
        layer_pattern=pattern_of(slides) if any(slides) else (),
        norm_topk_prob=spec.norm_topk_prob or not spec.num_experts,
        name="",
        family="",
        source="",
        architecture="",
        lora=None,
    )


def _config(spec: ModelSpec, name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": name,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embed_dim,
        "intermediate_size": spec.ffn_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_seq_len,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "rope_parameters": write_rope(spec, nested=name == "gemma3_text"),
        family.activation_key: activation[spec.activation],
        **write_window(spec, family),
    }
    if family.bias == "attention_bias":
        config["attention_bias"] = spec.qkv_bias
    if "norm_offset" in family.features:
        config |= _gemma(spec)
    if spec.num_experts:
        config |= _experts(spec, name)
    return config


def _gemma(spec: ModelSpec) -> dict[str, Any]:
    scale = spec.attention_scale
    scalar = spec.head_dim if scale is None else round(scale**-2)
    return {
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": spec.attention_softcap,
        "final_logit_softcapping": spec.logit_softcap,
    }


def _experts(spec: ModelSpec, name: str) -> dict[str, Any]:
    keys: dict[str, Any] = {"num_experts_per_tok": spec.experts_per_token}
    if name == "mixtral":
        return {**keys, "num_local_experts": spec.num_experts}
    return {
        **keys,
        "num_experts": spec.num_experts,
        "moe_intermediate_size": spec.ffn_dim,
        "norm_topk_prob": spec.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
