"""Turn a ParamTable into the few sizes that cost and memory are made of.

Letters: D embed, F ffn, L layers, N query heads, K key/value heads, H head size, V
vocab, E experts, T tokens of a sequence.

Known lies: a module without these logical axes is taken for a transformer of Kaplan's
shape (arXiv 2001.08361, table 1): attention as wide as D, F = 4 D, 12 L D^2 parameters.
A weight of another form is one product with its first dimension summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmos_jax.ir.params import ParamRow, ParamTable
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.stored import (
    SCALE_BYTES,
    FewBits,
    dtype_bytes,
    few_bits_of,
    quantization_of,
    weights_in,
    without_scales,
)

FFN_IN = ("ffn_gate", "ffn_up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Tokens times one weight, in every layer that has it; sizes before any split."""

    tensor: str
    """What it makes: a name in ir.TENSORS, `head`, or `other`."""
    summed: int
    made: int
    summed_axis: str | None
    """Logical axis of the summed dimension, and of the one made; None: never split."""
    made_axis: str | None
    layers: int = 1
    experts: int = 1
    chosen: int = 1
    """Copies of the weight that one token goes through, of `experts`."""
    few_bits: FewBits | None = None
    """How the weight is kept and multiplied; None: as the workload says."""

    @property
    def active(self) -> int:
        """Parameters one token goes through, over all layers."""
        return self.layers * self.chosen * self.summed * self.made


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of one model; widths are whole, before any split."""

    layers: int
    embed: int
    ffn: int
    """Of one expert, where there are experts."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    logits: int
    """Numbers that a prediction is made of: tokens, or the classes of a classifier."""
    matmul_params: int
    """Parameters a token is multiplied with: not an untied embedding table, which is a
    lookup, nor the experts that were not chosen."""
    experts: int = 0
    """Experts a token chooses among; 0: none."""
    experts_per_token: int = 0
    normed_heads: bool = False
    """Whether q and k are normalised (Qwen3)."""
    window: int | None = None
    """Tokens that a sliding layer sees; None: no layer slides."""
    sliding: int = 0
    """Layers that slide."""
    period: int = 1
    """Layers after which their pattern begins again: a pipeline cuts between."""
    is_frozen: bool = False
    """Whether most weights have no gradient (LoRA)."""
    is_quantized: bool = False
    """Whether matrices are kept, and multiplied, in few bits."""
    products: tuple[Product, ...] = ()

    def __hash__(self) -> int:
        """Cheap, for remembering; equality sees all fields."""
        return hash((self.layers, self.embed, self.matmul_params))

    @property
    def query_width(self) -> int:
        """N * H."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K * H, of keys or of values."""
        return self.kv_heads * self.head_dim

    def cached_bytes(self, kv_dtype: str) -> float:
        """Bytes of the keys and values of one token in one layer, scales included."""
        scale = SCALE_BYTES if kv_dtype == "int8" else 0
        return 2 * self.kv_heads * (self.head_dim * dtype_bytes(kv_dtype) + scale)

    def keys_seen(self, tokens: int, block: int = 0) -> float:
        """Keys that a query of a causal sequence sees, on average over its tokens and
        over layers: half of them, in a sliding layer at most the window.

        Args:
            tokens: of the sequence.
            block: keys that a kernel makes scores of at once; those of blocks that are
                seen in part count whole.
        """
        extra = min(block, tokens)
        full = (tokens + extra) / 2
        if self.window is None or self.window >= tokens:
            return full
        W = self.window
        near = min(full, W - W * W / (2 * tokens) + extra)
        return (self.sliding * near + (self.layers - self.sliding) * full) / self.layers


def sizes_of(table: ParamTable) -> Sizes:
    """Return the sizes of a model."""
    axes = without_scales(table).axis_sizes()
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
        logits=axes.get("classes", axes.get("vocab", 0)),
        matmul_params=table.active_params - _lookup_params(table),
        experts=axes.get("experts", 0),
        experts_per_token=_chosen(table) if "experts" in axes else 0,
        normed_heads=table.spec is not None and table.spec.qk_norm,
        window=None if table.spec is None else table.spec.sliding_window,
        sliding=0 if table.spec is None else sum(table.spec.is_sliding),
        period=1 if table.spec is None else table.spec.layer_period,
        is_frozen=any(row.is_frozen for row in table.rows),
        is_quantized=quantization_of(table) is not None,
        products=_products(table),
    )


def model_flops(sizes: Sizes, workload: Workload) -> float:
    """Useful FLOPs of one step over all devices: no recompute.

    Forward: 2 N per token, and per layer 4 N H per token and key it sees: on average
    half of T, under the causal mask as over the life of a sequence that is decoded.
    Training triples that: 6 N + 6 L N H T per token (scaling-book, transformers.md);
    frozen weights have no gradient, which leaves 4 N.
    """
    products = 2 * sizes.matmul_params * workload.tokens
    attention = attention_flops(sizes, workload)
    if workload.phase != "train":
        return products + attention
    return products * (2 if sizes.is_frozen else 3) + attention * 3


def attention_flops(sizes: Sizes, workload: Workload) -> float:
    """The attention part of one causal forward pass, over all devices."""
    keys = sizes.keys_seen(workload.seq_len)
    per_token = 4 * sizes.layers * sizes.query_width * keys
    return workload.tokens * per_token


def _products(table: ParamTable) -> tuple[Product, ...]:
    """One product per weight that tokens are multiplied with, in the table's order."""
    found: list[Product] = []
    chosen = _chosen(table)
    few_bits = few_bits_of(table)
    for row in without_scales(table).rows:
        kept = [
            (axis, size)
            for axis, size in zip(row.axes, row.shape, strict=True)
            if axis not in ("layers", "experts")
        ]
        if len(kept) < 2 or _is_lookup(row, table) or _is_beside(row):
            continue
        ends_in_embed = kept[-1][0] == "embed"
        cut = len(kept) - 1 if ends_in_embed else 1
        if row.axes[0] == "vocab":  # the tied table, used a second time as the head
            kept, cut = kept[::-1], 1
        summed, made = kept[:cut], kept[cut:]
        experts = _size(row, "experts")
        tensor = _tensor(summed[0][0], made[0][0])
        taken = {product.tensor for product in found}
        if tensor == "ffn_up" and "ffn_up" in taken:
            tensor = "ffn_gate"
        if tensor == "key" and "key" in taken:
            tensor = "value"
        found.append(
            Product(
                tensor=tensor,
                summed=math.prod(size for _, size in summed) * weights_in(row),
                made=math.prod(size for _, size in made),
                summed_axis=summed[0][0],
                made_axis=made[0][0],
                layers=_size(row, "layers"),
                experts=experts,
                chosen=chosen if "experts" in row.axes else 1,
                few_bits=few_bits.get(row.path),
            )
        )
    return tuple(found)


def _tensor(summed: str | None, made: str | None) -> str:
    """The tensor that a product over `summed` makes along `made`."""
    if made == "embed":
        return {"heads": "out", "ffn": "ffn_out"}.get(summed or "", "other")
    names = {"heads": "query", "kv_heads": "key", "ffn": "ffn_up", "vocab": "head"}
    return names.get(made or "", "other")


def _chosen(table: ParamTable) -> int:
    """Experts one token goes through; all of them when nobody says."""
    if table.spec is not None and table.spec.num_experts:
        return table.spec.experts_per_token
    return table.axis_sizes().get("experts", 1)


def _size(row: ParamRow, axis: str) -> int:
    return row.shape[row.axes.index(axis)] if axis in row.axes else 1


def _is_beside(row: ParamRow) -> bool:
    """Whether a row is no weight of a product: LoRA's factors are too thin to count by
    themselves, a bias is added."""
    return None in row.axes or row.path.endswith("_bias")


def _lookup_params(table: ParamTable) -> int:
    """Parameters that are only looked up: the table of an untied model."""
    return sum(row.size for row in table.rows if _is_lookup(row, table))


def _is_lookup(row: ParamRow, table: ParamTable) -> bool:
    tables = [row for row in without_scales(table).rows if "vocab" in row.axes]
    has_other_head = len(tables) > 1 or "classes" in table.axis_sizes()
    return row in tables and row.axes[0] == "vocab" and has_other_head
