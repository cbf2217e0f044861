"""A quantized decoder as five calls a layer, for one CPU.

B sequences, T tokens, m = B T rows, D model, K inputs of a matrix, H head size, L
layers, S cache slots.

On a CPU a decode step reads every weight once and does little else, so what surrounds
the products must not cost anything: each layer is norm, q k v in one product; rotation,
cache and attention; output and residual; norm, gate and up in one product with the
activation behind it; down and residual. Weights of all layers lie in one buffer each,
packed for the kernels (kernels/int8_matmul/cpu.py), and a loop over layers passes the
layer's number: nothing is sliced or copied.

What it computes is what `Decoder` does with the same parameters; a test holds the two
against each other for every family.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.ir import ModelSpec
from llmos_jax.kernels.attention import Score
from llmos_jax.kernels.decode_attention import cpu as attention
from llmos_jax.kernels.int8_matmul import cpu as int8
from llmos_jax.models.cache import KVCache, empty_cache, empty_pages
from llmos_jax.models.layers import capped
from llmos_jax.models.packed import FusedParams, Packing, packed
from llmos_jax.models.rope import local_angles, rotary_angles
from llmos_jax.models.skeleton import Params

UNLIMITED = np.iinfo(np.int32).max
"""The window of a layer that sees all tokens."""


Angles = tuple[jax.Array, jax.Array]
"""Cos and sin, float32 [..., H/2]."""


class Tokens(NamedTuple):
    """The rows that go through a layer."""

    angles: Angles
    """[m, H/2]"""
    slot_m: jax.Array
    position_m: jax.Array


def unsuited(spec: ModelSpec) -> str | None:
    """Why a model does not run this way here; None if it does.

    Raises:
        ConfigError: LLMOS_CPU_KERNELS is neither 0 nor 1.
    """
    how = spec.quantization
    if how is None or how.weights == "float8" or spec.num_experts or spec.lora:
        return f"{spec.name} is not a dense model in int8 or int4"
    if not int8.suits():
        return "this is not one CPU device"
    return int8.unavailable() or attention.unavailable()


class FusedDecoder:
    """The forward pass of serving (see serving.forward), fused."""

    def __init__(
        self, spec: ModelSpec, kv_dtype: str = "float32", *, rotate_keys: bool = False
    ):
        """Fuse a model that `unsuited` has nothing against.

        Args:
            spec: the model.
            kv_dtype: of cached keys and values: float32 or int8.
            rotate_keys: see models.cache.
        """
        assert unsuited(spec) is None, unsuited(spec)
        self.spec = spec
        self.empty_cache = functools.partial(
            empty_cache, spec, dtype=kv_dtype, rotate_keys=rotate_keys
        )
        self.empty_pages = functools.partial(
            empty_pages, spec, dtype=kv_dtype, rotate_keys=rotate_keys
        )
        self.is_ragged = True
        self.page_size = attention.PAGE
        how = spec.quantization
        assert how is not None
        self._activations = how.activations
        windows = [
            spec.sliding_window if slides else UNLIMITED for slides in spec.is_sliding
        ]
        self._windows = np.asarray(windows, np.int32)
        self._slides = np.asarray(spec.is_sliding)

    def pack(self, params: Params) -> FusedParams:
        """Lay parameters out for the kernels, taking each out of `params` as it goes:
        no two copies of a model are in memory."""
        return packed(self.spec, params)

    def forward(
        self,
        params: FusedParams,
        tokens_BT: jax.Array,
        position_BT: jax.Array,
        slot_B: jax.Array | None,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """Return what `logits` takes [B, T, D], and the cache with these tokens.

        Args:
            params: from `pack`.
            tokens_BT: int32 token ids.
            position_BT: int32 positions, consecutive in a sequence.
            slot_B: which sequences of the cache these are, or which rows of its table,
                if it has one; None: the first B. Rows of one that lies outside are
                padding.
            cache: of earlier tokens.
        """
        spec = self.spec
        B, T = tokens_BT.shape
        slots = jnp.arange(B, dtype=jnp.int32) if slot_B is None else slot_B
        slot_m = jnp.repeat(slots, T, total_repeat_length=B * T)
        position_m = position_BT.reshape(-1)
        angles = _flat(rotary_angles(position_BT, spec))
        of_sliding = local_angles(position_BT, spec)
        local = angles if of_sliding is None else _flat(of_sliding)

        def layer(
            carry: tuple[jax.Array, KVCache], at: tuple[jax.Array, ...]
        ) -> tuple[tuple[jax.Array, KVCache], None]:
            index, window, slides = at
            turned = angles
            if of_sliding is not None:
                turned = jax.tree.map(
                    lambda near, far: jnp.where(slides, near, far), local, angles
                )
            rows = Tokens(turned, slot_m, position_m)
            return self._layer(params.layers, *carry, index, window, rows), None

        x_mD = self._embedded(params, tokens_BT.reshape(-1))
        index_L = jnp.arange(spec.num_layers, dtype=jnp.int32)
        (x_mD, cache), _ = jax.lax.scan(
            layer,
            (x_mD, cache),
            (index_L, jnp.asarray(self._windows), jnp.asarray(self._slides)),
        )
        return x_mD.reshape(B, T, -1), cache

    def logits(self, params: FusedParams, x_BTD: jax.Array) -> jax.Array:
        """Return float32 [B, T, V]."""
        B, T, D = x_BTD.shape
        x_mD = x_BTD.reshape(B * T, D)
        if isinstance(params.head, int8.Packed):
            made = int8.project(
                x_mD,
                params.head,
                jnp.int32(0),
                activations=self._activations,
                norm_LK=params.final_norm,
                epsilon=self.spec.norm_eps,
            )
        else:
            made = _normed(x_mD, params.final_norm[0], self.spec.norm_eps) @ params.head
        return capped(made.reshape(B, T, -1), self.spec.logit_softcap)

    def normed(self, params: FusedParams, x_BTD: jax.Array) -> jax.Array:
        """Return features after the last norm."""
        x_mD = x_BTD.reshape(-1, x_BTD.shape[-1])
        normed_mD = _normed(x_mD, params.final_norm[0], self.spec.norm_eps)
        return normed_mD.reshape(x_BTD.shape)

    def _embedded(self, params: FusedParams, tokens_m: jax.Array) -> jax.Array:
        if params.table is None:
            x_mD = _rows_of(params.head, tokens_m)
        elif isinstance(params.table, tuple):
            values, scale = params.table
            x_mD = values[tokens_m].astype(jnp.float32) * scale[tokens_m][:, None]
        else:
            x_mD = params.table[tokens_m]
        scale = self.spec.embed_dim**0.5 if self.spec.scaled_embeddings else 1.0
        return x_mD * jnp.float32(scale)

    def _layer(
        self,
        p: Packing,
        x_mD: jax.Array,
        cache: KVCache,
        index: jax.Array,
        window: jax.Array,
        rows: Tokens,
    ) -> tuple[jax.Array, KVCache]:
        """One layer of one model: five calls."""
        spec, small = self.spec, p.small
        project = functools.partial(
            int8.project,
            layer=index,
            activations=self._activations,
            epsilon=spec.norm_eps,
        )
        qkv_mC = project(
            x_mD, p.qkv, norm_LK=small["attention_norm"], bias_LN=small.get("qkv_bias")
        )
        cos_mh, sin_mh = rows.angles
        out_mC, arrays = attention.attend_rows(
            qkv_mC,
            cos_mh,
            sin_mh,
            _of(small.get("q_norm"), index),
            _of(small.get("k_norm"), index),
            rows.slot_m,
            rows.position_m,
            cache.arrays,
            index,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            score=Score(softcap=spec.attention_softcap, scale=spec.attention_scale),
            norm_eps=spec.norm_eps,
            rotate_keys=cache.rotate_keys,
            window=window,
            table_BM=cache.table,
        )
        k, v, *scales = arrays
        cache = cache._replace(k=k, v=v)
        if scales:
            cache = cache._replace(k_scale=scales[0], v_scale=scales[1])
        make = functools.partial(project, out_mC, p.out, bias_LN=small.get("o_bias"))
        x_mD = self._added(x_mD, make, small.get("attention_out_norm"), index)
        h_mF = project(x_mD, p.into, norm_LK=small["ffn_norm"])
        make = functools.partial(project, h_mF, p.down)
        return self._added(x_mD, make, small.get("ffn_out_norm"), index), cache

    def _added(
        self,
        x_mD: jax.Array,
        make: Callable[..., jax.Array],
        norm_LD: jax.Array | None,
        index: jax.Array,
    ) -> jax.Array:
        """The residual stream with what a block makes, normed first if it is."""
        if norm_LD is None:
            return make(residual_mN=x_mD)
        return int8.add_normed(make(), norm_LD, x_mD, index, self.spec.norm_eps)


def _of(x: jax.Array | None, index: jax.Array) -> jax.Array | None:
    return None if x is None else x[index]


def _flat(angles: Angles) -> Angles:
    cos, sin = angles
    return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])


def _normed(x_mD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    mean_square = jnp.mean(jnp.square(x_mD), axis=-1, keepdims=True)
    return x_mD * jax.lax.rsqrt(mean_square + epsilon) * scale_D[None, :]


def _rows_of(head: int8.Packed, tokens_m: jax.Array) -> jax.Array:
    """Rows of a tied table, out of the panels that it is packed in as a head."""
    panel, place = tokens_m // int8.PANEL, tokens_m % int8.PANEL
    lines = head.panels.reshape(-1, head.inputs // 2, int8.PANEL, 2)
    rows = jax.lax.bitcast_convert_type(lines[panel, :, place, :], jnp.int8)
    rows = rows.reshape(len(tokens_m), head.inputs)
    return rows.astype(jnp.float32) * head.scale[0][tokens_m][:, None]
