"""Turn a config.json into a ModelSpec, or say which key stands in the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from llmos_jax.errors import ConfigError
from llmos_jax.interchange.families.rope import read_rope
from llmos_jax.interchange.families.table import FAMILIES, FIXED, SOFTCAPS, Family
from llmos_jax.interchange.families.window import read_window
from llmos_jax.ir import ModelSpec

Activation = Literal["silu", "gelu_tanh"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def spec_of(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Return the spec of a model that transformers would make from `config`.

    Args:
        config: a config.json; that of a Gemma 3 with vision gives its text model.
        name: of the spec.

    Raises:
        ConfigError: a key is missing, no such thing as a size, or asks for mathematics
            that our models do not have; it names the key and its value.
    """
    config = _text_config(config, name)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model {name}: model_type = {model_type!r} of its config.json is not one "
            f"that can be read: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    _refuse(config, family, name)
    known = Known({**family.defaults, **config}, name)
    D, N = known.size("hidden_size"), known.size("num_attention_heads")
    L = known.size("num_hidden_layers")
    H = known.size("head_dim", otherwise=D // N)
    rope = read_rope(known, model_type)
    window, pattern = read_window(known, family, L)
    biased = family.bias == "attention_bias" and known.flag("attention_bias")
    spec = ModelSpec(
        name=name,
        architecture=model_type,
        num_layers=L,
        embed_dim=D,
        num_heads=N,
        num_kv_heads=known.size("num_key_value_heads", otherwise=N),
        head_dim=H,
        vocab_size=known.size("vocab_size"),
        max_seq_len=known.size("max_position_embeddings"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        local_rope_theta=rope.local_theta,
        norm_eps=known.number("rms_norm_eps"),
        tied_embeddings=known.flag("tie_word_embeddings"),
        activation=_activation(known, family),
        qkv_bias=biased or family.bias == "qkv",
        out_bias=biased,
        attention_scale=_attention_scale(known, H),
        attention_softcap=known.maybe("attn_logit_softcapping"),
        logit_softcap=known.maybe("final_logit_softcapping"),
        sliding_window=window,
        layer_pattern=pattern,
        **_experts(known, model_type),
        **family.features,
    )
    return spec.check()


class Known:
    """A config's values, each checked as it is asked for."""

    def __init__(self, values: Mapping[str, Any], name: str):
        self.values = values
        self.name = name

    def wrong(self, key: str, wanted: str) -> ConfigError:
        """The error that says that `key` should be something else."""
        got = self.values.get(key)
        what = f"{key} = {got!r}" if key in self.values else f"no {key}"
        return ConfigError(
            f"model {self.name}: its config.json has {what}; wanted {wanted}."
        )

    def size(self, key: str, *, otherwise: int | None = None) -> int:
        """An integer of at least 1; `otherwise` where the value is null."""
        value = self.values.get(key)
        if value is None and otherwise is not None:
            value = otherwise
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a whole number of at least 1")
        return value

    def number(self, key: str) -> float:
        """A positive number."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.wrong(key, "a positive number")
        return float(value)

    def maybe(self, key: str) -> float | None:
        """A positive number, or None where the key is null or absent."""
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value


def _text_config(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A Gemma 3 with vision holds the text model's config inside its own."""
    if config.get("model_type") != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(
            f"model {name}: its config.json has model_type = 'gemma3' and no "
            "text_config, which would describe the text model."
        )
    outer = {
        key: config[key]
        for key in ("tie_word_embeddings", "quantization_config")
        if config.get(key) is not None
    }
    return {**text, **outer, "model_type": text.get("model_type", "gemma3_text")}


def _refuse(config: Mapping[str, Any], family: Family, name: str) -> None:
    fixed = {**FIXED, **family.fixed}
    if family.activation_key == "hidden_act":
        fixed |= {key: (None,) for key in (*SOFTCAPS, "query_pre_attn_scalar")}
    for key, harmless in fixed.items():
        value = config.get(key)
        if value in harmless:
            continue
        if key == "quantization_config":
            raise ConfigError(
                f"model {name}: its config.json has quantization_config = "
                f"{str(value)[:200]}: the weights are packed. Use the folder with "
                "float weights, or a GGUF file."
            )
        wanted = " or ".join(repr(value) for value in harmless if value is not None)
        raise ConfigError(
            f"model {name}: its config.json has {key} = {value!r}, which is not "
            f"supported; {f'only {wanted}' if wanted else 'the key must be absent'}."
        )


def _activation(known: Known, family: Family) -> Activation:
    key = family.activation_key
    value = known.values.get(key)
    if value is None:
        # Gemma's `hidden_act` is a legacy key ("gelu"), which says nothing.
        value = family.defaults.get(key, "silu")
    if value not in ACTIVATIONS:
        raise known.wrong(key, " or ".join(ACTIVATIONS))
    return ACTIVATIONS[value]


def _attention_scale(known: Known, H: int) -> float | None:
    scalar = known.maybe("query_pre_attn_scalar")
    return None if scalar is None or scalar == H else float(scalar**-0.5)


def _experts(known: Known, model_type: str) -> dict[str, Any]:
    """`family`, `ffn_dim` and what a router needs."""
    if model_type not in ("mixtral", "qwen3_moe"):
        return {"family": "llama", "ffn_dim": known.size("intermediate_size")}
    # Qwen's files say num_experts; transformers 5 writes num_local_experts.
    own = "num_experts" in known.values
    wide = model_type == "mixtral"
    return {
        "family": "moe",
        "ffn_dim": known.size("intermediate_size" if wide else "moe_intermediate_size"),
        "num_experts": known.size("num_experts" if own else "num_local_experts"),
        "experts_per_token": known.size("num_experts_per_tok"),
        "norm_topk_prob": wide or known.flag("norm_topk_prob"),
    }
