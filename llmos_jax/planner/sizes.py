"""Turn a ParamTable into the few sizes that cost and memory are made of.

Letters: D embed, F ffn, L layers, N query heads, K key/value heads, H head size, V
vocab, T tokens of a sequence.

Known lies: a module without these logical axes is taken for a transformer of Kaplan's
shape (arXiv 2001.08361, table 1): attention as wide as D, F = 4 D, 12 L D^2 parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmos_jax.ir.params import ParamTable
from llmos_jax.ir.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of one model; widths are whole, before any split."""

    layers: int
    embed: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    matmul_params: int
    """All parameters but the embedding table when untied: a lookup is no matmul."""

    @property
    def query_width(self) -> int:
        """N * H."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K * H, of keys or of values."""
        return self.kv_heads * self.head_dim


def sizes_of(table: ParamTable) -> Sizes:
    """Return the sizes of a model."""
    axes = table.axis_sizes()
    layers = axes.get("layers", 1)
    kaplan_width = round(math.sqrt(table.num_params / layers / 12))
    embed = axes.get("embed", max(1, kaplan_width))
    heads = axes.get("heads", 1)
    head_dim = axes.get("head_dim", max(1, embed // heads))
    return Sizes(
        layers=layers,
        embed=embed,
        ffn=axes.get("ffn", 4 * embed),
        heads=heads,
        kv_heads=axes.get("kv_heads", heads),
        head_dim=head_dim,
        vocab=axes.get("vocab", 0),
        matmul_params=table.num_params - _lookup_params(table),
    )


def model_flops(sizes: Sizes, workload: Workload) -> float:
    """Useful FLOPs of one step over all devices: no recompute.

    Forward: 2 N per token, and per layer 4 N H per token and key it sees: on average
    half of T under the causal mask, all of it when decoding. Training triples that: 6 N
    + 6 L N H T per token (scaling-book, transformers.md).
    """
    seen = workload.seq_len if workload.phase == "decode" else workload.seq_len / 2
    attention = 4 * sizes.layers * sizes.query_width * seen
    forward = workload.tokens * (2 * sizes.matmul_params + attention)
    return forward * (3 if workload.phase == "train" else 1)


def attention_flops(sizes: Sizes, workload: Workload) -> float:
    """The attention part of one causal forward pass, over all devices."""
    per_token = 4 * sizes.layers * sizes.query_width * workload.seq_len / 2
    return workload.tokens * per_token


def _lookup_params(table: ParamTable) -> int:
    """Parameters that are only looked up: the table of an untied model."""
    rows = [row for row in table.rows if "vocab" in row.axes]
    if len(rows) < 2:
        return 0
    return sum(row.size for row in rows if row.axes[0] == "vocab")
