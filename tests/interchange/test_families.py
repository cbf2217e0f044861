"""config.json to ModelSpec and back; what cannot be followed is refused by name."""

from __future__ import annotations

from dataclasses import replace

import hf_models
import pytest

from llmos_jax.config import load_model
from llmos_jax.errors import ConfigError
from llmos_jax.interchange import architecture_of, config_of, spec_of
from llmos_jax.ir import RopeScaling

NOT_MATHEMATICS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "initializer_range"),
    *("transformers_version", "use_cache", "architectures", "attention_dropout"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    *("_sliding_window_pattern", "pretraining_tp", "_name_or_path"),
    # layer_types says which layers these would make.
    *("max_window_layers", "sliding_window_pattern"),
}
ALL = list(hf_models.FAMILIES)


def plain(architecture: str, **more):
    """A config.json as transformers writes it, changed."""
    return {**hf_models.config(architecture).to_dict(), **more}


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("architecture", ALL)
def test_transformers_reads_back_the_same_config(architecture, kv_heads):
    theirs = hf_models.config(architecture, kv_heads)
    written = config_of(spec_of(theirs.to_dict(), "m"))
    back = type(theirs)(**written).to_dict()
    wanted = theirs.to_dict()
    keys = (wanted.keys() | back.keys()) - NOT_MATHEMATICS
    # Experts have their own width; the dense one is never used.
    keys -= {"intermediate_size"} if architecture == "qwen3_moe" else set()
    assert {key: back.get(key) for key in keys} == {
        key: wanted.get(key) for key in keys
    }


@pytest.mark.parametrize("architecture", ALL)
def test_a_spec_comes_back_from_its_config(architecture):
    spec = spec_of(plain(architecture), "m")
    assert spec_of(config_of(spec), "m") == spec
    assert spec.architecture == architecture_of(spec) == architecture


@pytest.mark.parametrize(
    ("architecture", "more", "pattern", "window"),
    [
        ("mistral", {}, (), 8),
        ("mistral", {"sliding_window": None}, (), None),
        ("qwen2", {}, ("full", "full", "sliding", "sliding"), 8),
        ("qwen2", {"use_sliding_window": False, "layer_types": None}, (), None),
        ("qwen2", {"max_window_layers": 0, "layer_types": None}, (), 8),
        ("gemma2", {}, ("sliding", "full"), 8),
        ("gemma3_text", {}, ("sliding", "sliding", "full"), 8),
        (
            "gemma3_text",
            {"layer_types": None, "sliding_window_pattern": 2},
            ("sliding", "full"),
            8,
        ),
    ],
)
def test_sliding_layers_are_those_of_transformers(architecture, more, pattern, window):
    spec = spec_of(plain(architecture, **more), "m")
    assert (spec.layer_pattern, spec.sliding_window) == (pattern, window)


def test_older_files_say_the_same_of_rotation():
    older = plain("llama", rope_theta=500000.0, max_position_embeddings=4096)
    del older["rope_parameters"]
    older["rope_scaling"] = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    spec = spec_of(older, "m")
    assert spec.rope_theta == 500000.0
    assert spec.rope_scaling == RopeScaling(factor=8.0, original_max_seq_len=4096)


def test_older_gemma3_files_scale_global_layers_alone():
    older = plain("gemma3_text", rope_scaling={"factor": 8.0, "rope_type": "linear"})
    del older["rope_parameters"]
    spec = spec_of(older, "m")
    assert spec.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert (spec.rope_theta, spec.local_rope_theta) == (1e6, 1e4)


def test_a_gemma3_with_vision_gives_its_text_model_and_its_defaults():
    hub = {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152},
    }
    spec = spec_of(hub, "gemma-3-4b")
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 4, 256)
    assert (spec.vocab_size, spec.tied_embeddings) == (262208, True)
    assert spec.attention_scale is None and spec.architecture == "gemma3_text"


@pytest.mark.parametrize(
    ("architecture", "more", "named"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor = None"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": "wide"}, "hidden_size = 'wide'"),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers = None"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("qwen2", {"sliding_window": None}, "sliding_window = None"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma2", {"sliding_window_pattern": 6}, "sliding_window_pattern = 6"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ("llama", {"model_type": "mamba"}, "model_type = 'mamba'"),
    ],
)
def test_what_we_cannot_follow_is_refused_with_key_and_value(architecture, more, named):
    with pytest.raises(ConfigError, match=named):
        spec_of(plain(architecture, **more), "m")


def test_gemmas_legacy_activation_key_says_nothing():
    assert spec_of(plain("gemma2", hidden_act="gelu"), "m").activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("tiny", "llama"),
        ("llama3_1_8b", "llama"),
        ("qwen3_0_6b", "qwen3"),
        ("mixtral_8x7b", "mixtral"),
        ("qwen3_30b_a3b", "qwen3_moe"),
    ],
)
def test_a_model_of_ours_is_written_as_the_plainest_family(name, architecture):
    spec = load_model(name)
    assert replace(spec, architecture="") == spec
    assert architecture_of(spec) == architecture


def test_features_that_no_family_has_are_named(tiny):
    with pytest.raises(ConfigError, match="norm_offset = True"):
        config_of(replace(tiny, norm_offset=True))
    with pytest.raises(ConfigError, match="llama.*no qk_norm = True"):
        config_of(replace(tiny, architecture="llama", qk_norm=True))
