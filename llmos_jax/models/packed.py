"""Turn a quantized model's parameters into what the fused decoder's kernels read.

L layers, K inputs of a matrix, N outputs, D model, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.ir import ModelSpec
from llmos_jax.kernels.int8_matmul import cpu as int8
from llmos_jax.models.skeleton import Params

Take = Callable[[str], np.ndarray]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("qkv", "out", "into", "down", "small"),
    meta_fields=(),
)
@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The weights of all layers, as the kernels read them."""

    qkv: int8.Packed
    out: int8.Packed
    into: int8.Packed
    """Gate and up."""
    down: int8.Packed
    small: dict[str, jax.Array]
    """Norms and biases [L, ...], each as what it multiplies by or adds."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "final_norm", "table", "head"),
    meta_fields=(),
)
@dataclass(frozen=True, slots=True, kw_only=True)
class FusedParams:
    """All that the forward pass reads."""

    layers: Packing
    final_norm: jax.Array
    """[1, D]"""
    table: Any
    """(values, scale) or float [V, D]; None: the head's panels are it."""
    head: Any
    """Packed, or a float matrix [D, V]."""


def packed(spec: ModelSpec, params: Params) -> FusedParams:
    """Lay parameters out for the kernels.

    Takes each out of `params` as it goes, so that no two copies of a model are in
    memory.
    """
    how = spec.quantization
    assert how is not None

    def take(path: str) -> np.ndarray:
        return np.asarray(params.pop(path))

    def together(*paths: str, gate: str = "none") -> int8.Packed:
        """Matrices of each layer side by side, packed."""
        parts = [_flat(path, take) for path in paths]
        layers = [
            (
                np.concatenate([values[i] for values, _ in parts], axis=-1),
                np.concatenate([scale[i] for _, scale in parts], axis=-1),
            )
            for i in range(spec.num_layers)
        ]
        return int8.pack(layers, kind=how.weights, gate=cast(int8.Gate, gate))

    small = _small(spec, take, params)
    table, head = _table_and_head(spec, take, params)
    return FusedParams(
        layers=Packing(
            qkv=together(*(f"layers.attention.{name}" for name in "qkv")),
            out=together("layers.attention.o"),
            into=together("layers.ffn.gate", "layers.ffn.up", gate=spec.activation),
            down=together("layers.ffn.down"),
            small=small,
        ),
        final_norm=_multiplier(spec, take("final_norm.scale"))[None],
        table=table,
        head=head,
    )


def _flat(path: str, take: Take) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of all layers as [L, K, N] (half of K for int4), and its scale."""
    values, scale = take(f"{path}.values"), take(f"{path}.scale")
    ends_in_embed = path.endswith((".o", ".down"))
    num_outside = 1 if ends_in_embed or ".ffn." in path else 2
    L, N = values.shape[0], int(np.prod(values.shape[values.ndim - num_outside :]))
    groups = scale.shape[1 : scale.ndim - num_outside]
    return values.reshape(L, -1, N), scale.reshape(L, *groups, N)


def _small(spec: ModelSpec, take: Take, params: Params) -> dict[str, jax.Array]:
    """Norms as multipliers, and biases, float32 [L, ...]."""
    norms = {
        "attention_norm": "attention_norm",
        "ffn_norm": "ffn_norm",
        "attention_out_norm": "attention_out_norm",
        "ffn_out_norm": "ffn_out_norm",
        "q_norm": "attention.q_norm",
        "k_norm": "attention.k_norm",
    }
    found = {
        name: _multiplier(spec, take(f"layers.{path}.scale"))
        for name, path in norms.items()
        if f"layers.{path}.scale" in params
    }
    L = spec.num_layers
    if spec.qkv_bias:
        biases = [
            take(f"layers.attention.{name}_bias").reshape(L, -1) for name in "qkv"
        ]
        found["qkv_bias"] = jnp.asarray(np.concatenate(biases, axis=1), jnp.float32)
    if spec.out_bias:
        found["o_bias"] = jnp.asarray(take("layers.attention.o_bias"), jnp.float32)
    return found


def _multiplier(spec: ModelSpec, scale: np.ndarray) -> jax.Array:
    return jnp.asarray(scale.astype(np.float32) + np.float32(spec.norm_offset))


def _table_and_head(spec: ModelSpec, take: Take, params: Params) -> tuple[Any, Any]:
    """The table to look up in, and the head; of a tied model the head alone."""
    is_small = "embed.table.values" in params
    if spec.tied_embeddings and is_small:
        values, scale = take("embed.table.values"), take("embed.table.scale")
        return None, int8.pack([(values.T, scale)], kind="int8")
    if is_small:
        table: Any = (
            jnp.asarray(take("embed.table.values")),
            jnp.asarray(take("embed.table.scale")),
        )
    else:
        table = jnp.asarray(take("embed.table"), jnp.float32)
    if spec.tied_embeddings:
        return table, table.T
    if "head.kernel.values" in params:
        values, scale = take("head.kernel.values"), take("head.kernel.scale")
        return table, int8.pack([(values, scale)], kind="int8")
    return table, jnp.asarray(take("head.kernel"), jnp.float32)
