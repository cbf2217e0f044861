"""The model as the serving loop knows it: three methods over parameters and a cache.

B sequences, T tokens, D model, V vocabulary.

`DecoderForward` goes through the decoder of models/ and runs on any platform. Another
object with the same methods may stand in its place where something faster is known.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from llmos_jax.errors import ConfigError
from llmos_jax.models import Params, Skeleton, empty_cache, empty_pages
from llmos_jax.models.fused import FusedDecoder, unsuited
from llmos_jax.telemetry import log

Cache = Any
"""A pytree of arrays with layers first and slots second."""

Weights = Any
"""Parameters as a model here wants them: a dict by path, or packed for its kernels."""

_PAGE = 64
_TPU_PAGE = 128
"""Tokens of a page: what the kernels take together (kernels/decode_attention)."""

KV_DTYPES = ("float32", "bfloat16", "int8")


class Forward(Protocol):
    """What the serving programs trace."""

    is_ragged: bool
    """Whether rows of one token each are as good as rows of many: a step may take
    whatever tokens of whatever sequences there are."""
    page_size: int
    """Tokens of a page of its cache."""

    def forward(
        self,
        params: Weights,
        tokens_BT: jax.Array,
        position_BT: jax.Array,
        slot_B: jax.Array | None,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Return features [B, T, D], and the cache with these tokens written.

        Args:
            params: as they are computed with.
            tokens_BT: int32.
            position_BT: int32, smaller than the cache's slots are long.
            slot_B: int32, which slots of the cache these sequences have, or which rows
                of its table, if it has one. One that lies outside of it marks a padding
                row, of which nothing is written; a single row of a cache without a
                table is never padding. None: row b has slot b.
            cache: keys and values of earlier tokens.
        """

    def normed(self, params: Weights, x_BTD: jax.Array) -> jax.Array:
        """Return features after the last norm: what embeddings are made of."""

    def logits(self, params: Weights, x_BTD: jax.Array) -> jax.Array:
        """Return [B, T, V] of features."""

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Return room for `batch` sequences of `slots` tokens."""

    def empty_pages(self, pages: int, page_size: int) -> Cache:
        """Return pages that no sequence has yet; its table is None."""


class DecoderForward:
    """The decoder of models/."""

    def __init__(self, skeleton: Skeleton, kv_dtype: str, *, rotate_keys: bool = False):
        self._skeleton = skeleton
        self.empty_cache = functools.partial(
            empty_cache, skeleton.spec, dtype=kv_dtype, rotate_keys=rotate_keys
        )
        self.empty_pages = functools.partial(
            empty_pages, skeleton.spec, dtype=kv_dtype, rotate_keys=rotate_keys
        )
        self.is_ragged = False
        self.page_size = _TPU_PAGE if jax.default_backend() == "tpu" else _PAGE

    def forward(
        self,
        params: Params,
        tokens_BT: jax.Array,
        position_BT: jax.Array,
        slot_B: jax.Array | None,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        model = self._skeleton.bind(params)
        if slot_B is None:
            return model.features(tokens_BT, position_BT, cache)
        if cache.table is not None:
            own = cache.table.at[slot_B].get(mode="fill", fill_value=-1)
            x_BTD, new = model.features(
                tokens_BT, position_BT, cache._replace(table=own)
            )
            return x_BTD, new._replace(table=cache.table)
        x_BTD, own = model.features(tokens_BT, position_BT, _taken(cache, slot_B))
        return x_BTD, _put(cache, own, slot_B)

    def logits(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        return self._skeleton.bind(params).logits(x_BTD)

    def normed(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        return x_BTD


def _taken(cache: Cache, slot_B: jax.Array) -> Cache:
    """The rows of some slots; padding rows see those of the last one."""
    if slot_B.shape == (1,):  # a slice is copied as a whole, gathered rows are not
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, slot_B[0], 1, axis=1), cache
        )
    return jax.tree.map(lambda x: jnp.take(x, slot_B, axis=1, mode="clip"), cache)


def _put(cache: Cache, own: Cache, slot_B: jax.Array) -> Cache:
    """The cache with these rows back in their slots; padding rows are dropped."""
    if slot_B.shape == (1,):
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(
                x, new, slot_B[0], axis=1
            ),
            cache,
            own,
        )
    return jax.tree.map(
        lambda x, new: x.at[:, slot_B].set(new, mode="drop"), cache, own
    )


def open_forward(
    skeleton: Skeleton,
    params: Weights,
    *,
    compute_dtype: str,
    kv_dtype: str | None,
    rotate_keys: bool = False,
    is_laid_out: bool = False,
) -> tuple[Forward, Weights]:
    """Return how a model runs here, and its parameters as that wants them.

    Args:
        skeleton: the model.
        params: in any dtype; those of a fused model are taken out of the dict.
        compute_dtype: "float32" or "bfloat16".
        kv_dtype: of cached keys and values; None: the compute dtype.
        rotate_keys: see models.cache; for int8.
        is_laid_out: the parameters are what this returned before.

    Raises:
        ConfigError: a dtype that no cache here has.
    """
    kept = kv_dtype or compute_dtype
    if kept not in KV_DTYPES:
        raise ConfigError(
            f"keys and values cannot be kept as {kept} here, only as one of "
            f"{', '.join(KV_DTYPES)}. Set serve.kv_dtype=int8 for the smallest."
        )
    if _is_fused(skeleton, compute_dtype, kept):
        fused = FusedDecoder(skeleton.spec, kept, rotate_keys=rotate_keys)
        return fused, params if is_laid_out else fused.pack(params)
    plain = DecoderForward(skeleton, kept, rotate_keys=rotate_keys)
    return plain, params if is_laid_out else skeleton.cast(params, compute_dtype)


def _is_fused(skeleton: Skeleton, compute_dtype: str, kv_dtype: str) -> bool:
    """Whether the C++ kernels run this model here; a line says why they cannot."""
    spec = skeleton.spec
    if spec.quantization is None or jax.default_backend() != "cpu":
        return False
    if compute_dtype != "float32" or kv_dtype == "bfloat16":
        return False
    reason = unsuited(spec)
    if reason is not None:
        _say_once(f"decoding runs in plain XLA, which is slower: {reason}")
    return reason is None


@functools.cache
def _say_once(line: str) -> None:
    log(line)
