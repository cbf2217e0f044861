"""ModelSpec: the numbers that make one model of a family.

Letters as in sharding_rules/axes.toml: D embed_dim, F ffn_dim, L num_layers, N
num_heads, K num_kv_heads, H head_dim, V vocab_size. A spec holds sizes and constants of
the mathematics; it knows nothing of chips, batches or dtypes of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos_jax.errors import ConfigError
from llmos_jax.ir.artefact import Artefact


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1 frequency scaling (Meta's llama-models, `apply_scaling`, 2024-07)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(Artefact):
    """One decoder-only transformer: RMSNorm, RoPE, grouped queries, SwiGLU.

    With experts, `ffn_dim` is the width of each expert.
    """

    name: str
    family: str
    num_layers: int
    embed_dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k before rotation (Qwen3)."""
    num_experts: int = 0
    """Feed-forward blocks a router chooses from; 0: one dense block."""
    experts_per_token: int = 0
    norm_topk_prob: bool = True
    """Whether the chosen experts' weights are made to sum to 1."""
    source: str = ""

    def check(self) -> ModelSpec:
        """Return self, or raise ConfigError for sizes that make no model."""
        for key in (
            "num_layers embed_dim ffn_dim num_heads num_kv_heads head_dim vocab_size "
            "max_seq_len"
        ).split():
            if getattr(self, key) < 1:
                raise ConfigError(
                    f"model {self.name}: {key} is {getattr(self, key)}; "
                    "it must be at least 1."
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model {self.name}: num_heads = {self.num_heads} is not a multiple "
                f"of num_kv_heads = {self.num_kv_heads}; each KV head serves a whole "
                "number of query heads."
            )
        if not 0 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"model {self.name}: experts_per_token = {self.experts_per_token} of "
                f"num_experts = {self.num_experts}; a token takes at most all of them."
            )
        if self.num_experts and not self.experts_per_token:
            raise ConfigError(
                f"model {self.name}: {self.num_experts} experts and "
                "experts_per_token = 0; a token needs at least one."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model {self.name}: head_dim = {self.head_dim} is odd; "
                "RoPE rotates pairs."
            )
        return self

    @property
    def num_params(self) -> int:
        """Parameters in closed form: embeddings, attention, SwiGLU and norms."""
        D, F, H = self.embed_dim, self.ffn_dim, self.head_dim
        attention = D * H * (2 * self.num_heads + 2 * self.num_kv_heads)
        attention += 2 * H * self.qk_norm
        ffn = 3 * D * F * max(1, self.num_experts) + D * self.num_experts
        layer = attention + ffn + 2 * D
        tables = 1 if self.tied_embeddings else 2
        return self.num_layers * layer + tables * self.vocab_size * D + D
