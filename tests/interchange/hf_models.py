"""Tiny random models of every family, made and saved by transformers itself."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

WINDOW = 8
LAYERS = 4
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "head_dim": 16,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LATE = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
_GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": _LLAMA3, "attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", _LATE),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e6,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


def config(architecture: str, kv_heads: int = 2, **more: Any) -> Any:
    """A transformers config; `more` overrides."""
    name, special = FAMILIES[architecture]
    values = {**_SIZES, "num_key_value_heads": kv_heads, **special, **more}
    return getattr(transformers, name)(**values)


def model(architecture: str, kv_heads: int = 2, **more: Any) -> Any:
    """A float32 model in which every parameter is random, norms and biases too."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        config(architecture, kv_heads, **more), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def save(made: Any, folder: Path, **more: Any) -> Path:
    """Save it as anyone would."""
    with contextlib.redirect_stderr(io.StringIO()):
        made.save_pretrained(folder, **more)
    return folder
