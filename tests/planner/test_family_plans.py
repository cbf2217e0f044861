"""Models of every family that can be read are planned, for TPUs, at real sizes."""

from __future__ import annotations

import pytest

from llmos_jax import models
from llmos_jax.errors import NoFeasiblePlan
from llmos_jax.interchange import spec_of
from llmos_jax.ir import Pins, Workload
from llmos_jax.planner import plan

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(model_type, D, F, L, N, K, H, V, **more):
    return {
        "model_type": model_type,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "vocab_size": V,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        **more,
    }


SLIDING = ["sliding_attention"]
FULL = ["full_attention"]
CONFIGS = {
    "llama": config(
        "llama", 4096, 14336, 32, 32, 8, 128, 128256, rope_parameters=LLAMA3_ROPE
    ),
    "mistral": config(
        "mistral", 4096, 14336, 32, 32, 8, 128, 32000, sliding_window=4096
    ),
    "mixtral": config(
        "mixtral", 4096, 14336, 32, 32, 8, 128, 32000,
        num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
    ),
    "qwen2": config("qwen2", 3584, 18944, 28, 28, 4, 128, 152064),
    "qwen3": config("qwen3", 4096, 12288, 36, 32, 8, 128, 151936),
    "qwen3_moe": config(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151936,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "gemma2": config(
        "gemma2", 3584, 14336, 42, 16, 8, 256, 256000,
        query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, sliding_window=4096,
        layer_types=(SLIDING + FULL) * 21,
    ),
    "gemma3_text": config(
        "gemma3_text", 5376, 21504, 62, 32, 16, 128, 262208,
        query_pre_attn_scalar=168, sliding_window=1024,
        layer_types=((SLIDING * 5 + FULL) * 11)[:62],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "linear", "factor": 8.0, "rope_theta": 1e6,
            },
        },
    ),
}  # fmt: skip
TOPOLOGIES = ["v5p:4x4x4", "v6e:8x16"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_planned_for_training_and_decoding(family, topology):
    spec = spec_of(CONFIGS[family], family)
    table = models.param_table(spec)
    assert table.num_params == spec.num_params
    for work in (
        Workload(global_batch=256, seq_len=8192),
        Workload(phase="decode", global_batch=128, seq_len=8192),
    ):
        made = plan(table, topology, work, spec.family)
        assert made.mesh.num_devices == made.topology.num_devices
        assert made.predicted.peak_hbm_bytes < made.topology.hbm_bytes_per_device


def test_windows_make_attention_cheaper():
    """A window of 4096 in sequences of 32768: most keys are never seen."""
    windowed = spec_of(CONFIGS["mistral"], "mistral")
    whole = spec_of({**CONFIGS["mistral"], "sliding_window": None}, "mistral")
    work = Workload(global_batch=64, seq_len=32768)
    near, far = (
        plan(spec, "v5p:4x4x4", work, "llama", Pins(mesh={"fsdp": 64}))
        for spec in (windowed, whole)
    )
    assert near.predicted.step_s < 0.8 * far.predicted.step_s


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ({"context": 4}, "context: layers see 4096 tokens"),
        ({"stage": 2, "fsdp": 32}, "stage: layers repeat a pattern of 2"),
    ],
)
def test_what_windows_cannot_do_is_refused_with_a_reason(mesh, said):
    spec = spec_of(CONFIGS["gemma2"], "gemma2")
    with pytest.raises(NoFeasiblePlan) as caught:
        plan(
            spec,
            "v5p:4x4x4",
            Workload(global_batch=64, seq_len=8192),
            "llama",
            Pins(mesh=mesh),
        )
    assert said in str(caught.value)
