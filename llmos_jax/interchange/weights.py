"""The weight map: which foreign tensors make each of our parameters.

V vocabulary, D model, N query heads, K key/value heads, H head size, F feed-forward, E
experts. An entry is data: our path, Hugging Face's name and the order of the axes on
both sides, in which a group of letters is one axis that runs over all of them. Ours are
stacked over layers (and experts), which the foreign name has in braces.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llmos_jax.ir import ModelSpec


class Entry(NamedTuple):
    """One of our parameters, and where it comes from."""

    path: str
    name: str
    """A template with {layer} and {expert} where there is one tensor for each."""
    ours: str
    """Axes of one layer's (and expert's) part."""
    theirs: tuple[str, ...]
    """Axes of one tensor, slowest first."""

    def name_of(self, layer: int = 0, expert: int = 0) -> str:
        """The foreign tensor of a layer and expert."""
        return self.name.format(layer=layer, expert=expert)

    def stack(self, spec: ModelSpec) -> tuple[int, ...]:
        """Sizes of our leading axes: layers, experts."""
        axes = {"{layer}": spec.num_layers, "{expert}": spec.num_experts}
        return tuple(size for brace, size in axes.items() if brace in self.name)

    def shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """Of our parameter."""
        sizes = sizes_of(spec)
        return (*self.stack(spec), *(sizes[letter] for letter in self.ours))

    def foreign_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """Of one foreign tensor."""
        sizes = sizes_of(spec)
        return tuple(
            math.prod(sizes[letter] for letter in group) for group in self.theirs
        )


def sizes_of(spec: ModelSpec) -> dict[str, int]:
    """Letter -> size."""
    return {
        "V": spec.vocab_size,
        "D": spec.embed_dim,
        "N": spec.num_heads,
        "K": spec.num_kv_heads,
        "H": spec.head_dim,
        "F": spec.ffn_dim,
        "E": spec.num_experts,
    }


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."

_EMBED = (Entry("embed.table", "model.embed_tokens.weight", "VD", ("V", "D")),)
_HEAD = (Entry("head.kernel", "lm_head.weight", "DV", ("V", "D")),)
_ATTEND = (
    Entry("layers.attention.q", _ATTENTION + "q_proj.weight", "DNH", ("NH", "D")),
    Entry("layers.attention.k", _ATTENTION + "k_proj.weight", "DKH", ("KH", "D")),
    Entry("layers.attention.v", _ATTENTION + "v_proj.weight", "DKH", ("KH", "D")),
    Entry("layers.attention.o", _ATTENTION + "o_proj.weight", "NHD", ("D", "NH")),
)
_QKV_BIAS = (
    Entry("layers.attention.q_bias", _ATTENTION + "q_proj.bias", "NH", ("NH",)),
    Entry("layers.attention.k_bias", _ATTENTION + "k_proj.bias", "KH", ("KH",)),
    Entry("layers.attention.v_bias", _ATTENTION + "v_proj.bias", "KH", ("KH",)),
)
_OUT_BIAS = (Entry("layers.attention.o_bias", _ATTENTION + "o_proj.bias", "D", ("D",)),)
_QK_NORM = (
    Entry("layers.attention.q_norm.scale", _ATTENTION + "q_norm.weight", "H", ("H",)),
    Entry("layers.attention.k_norm.scale", _ATTENTION + "k_norm.weight", "H", ("H",)),
)


def _norm(path: str, name: str) -> Entry:
    return Entry(path + ".scale", name + ".weight", "D", ("D",))


_FINAL_NORM = (_norm("final_norm", "model.norm"),)
_NORMS = (
    _norm("layers.attention_norm", _LAYER + "input_layernorm"),
    _norm("layers.ffn_norm", _LAYER + "post_attention_layernorm"),
)
# The same name for another norm: Gemma's stands behind attention, inside the residual.
_GEMMA_NORMS = (
    _norm("layers.attention_norm", _LAYER + "input_layernorm"),
    _norm("layers.attention_out_norm", _LAYER + "post_attention_layernorm"),
    _norm("layers.ffn_norm", _LAYER + "pre_feedforward_layernorm"),
    _norm("layers.ffn_out_norm", _LAYER + "post_feedforward_layernorm"),
)


def _feed_forward(gate: str, up: str, down: str) -> tuple[Entry, ...]:
    return (
        Entry("layers.ffn.gate", _LAYER + gate + ".weight", "DF", ("F", "D")),
        Entry("layers.ffn.up", _LAYER + up + ".weight", "DF", ("F", "D")),
        Entry("layers.ffn.down", _LAYER + down + ".weight", "FD", ("D", "F")),
    )


def _router(name: str) -> tuple[Entry, ...]:
    return (Entry("layers.ffn.router", _LAYER + name + ".weight", "DE", ("E", "D")),)


_DENSE = _feed_forward("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_MIXTRAL = _router("block_sparse_moe.gate") + _feed_forward(
    *(f"block_sparse_moe.experts.{{expert}}.w{number}" for number in (1, 3, 2))
)
_QWEN3_MOE = _router("mlp.gate") + _feed_forward(
    *(f"mlp.experts.{{expert}}.{name}_proj" for name in ("gate", "up", "down"))
)


def weight_map(spec: ModelSpec, architecture: str) -> tuple[Entry, ...]:
    """Return an entry for each parameter of `spec`, LoRA's factors apart.

    Args:
        spec: of the model.
        architecture: the `model_type` whose names are wanted.
    """
    ffn = _DENSE
    if spec.num_experts:
        ffn = _MIXTRAL if architecture == "mixtral" else _QWEN3_MOE
    return (
        *_EMBED,
        *(_GEMMA_NORMS if spec.post_norms else _NORMS),
        *_ATTEND,
        *(_QKV_BIAS if spec.qkv_bias else ()),
        *(_OUT_BIAS if spec.out_bias else ()),
        *(_QK_NORM if spec.qk_norm else ()),
        *ffn,
        *_FINAL_NORM,
        *(() if spec.tied_embeddings else _HEAD),
    )
