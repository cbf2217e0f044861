"""Programs that run where nothing of ours is: StableHLO, as jax.export writes it.

Two of them serve a model: `prefill` reads a chunk of one sequence's prompt, `decode` a
token of every sequence. Both are given the parameters by path, tokens and positions,
and a cache of contiguous slots, and return logits and the cache. They use plain XLA
operations alone, so that one file runs on CPUs, TPUs and GPUs.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.models import KVCache, Skeleton
from llmos_jax.serving.forward import DecoderForward

PLATFORMS = ("cpu", "tpu", "cuda")
_PLAIN = Target("portable", 2)
"""Nobody's kernels are for it, so plain operations are chosen."""


class Portable(NamedTuple):
    """An exported program and how to call it."""

    name: str
    code: bytes
    does: str
    arguments: dict[str, str]
    cache: dict[str, str]


def portable_programs(
    skeleton: Skeleton,
    params: Mapping[str, Any],
    *,
    kv_dtype: str,
    seats: int,
    context: int,
    chunk: int,
) -> list[Portable]:
    """Export `prefill` and `decode`.

    Args:
        skeleton: the model.
        params: arrays, or shapes and dtypes, by path.
        kv_dtype: of the cache.
        seats: sequences of the cache.
        context: slots of each.
        chunk: tokens that prefill reads.
    """
    model = DecoderForward(skeleton, kv_dtype)
    made = jax.eval_shape(lambda: model.empty_cache(seats, context))
    cache = {
        name: x
        for name in ("k", "v", "k_scale", "v_scale")
        if (x := getattr(made, name)) is not None
    }
    like = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}

    def prefill(
        params: Any,
        cache: Any,
        tokens_1T: Any,
        position_1T: Any,
        seat_1: Any,
        at_1: Any,
    ) -> Any:
        x_1TD, new = model.forward(
            params, tokens_1T, position_1T, seat_1, KVCache(**cache)
        )
        last_11D = x_1TD[:, at_1[0]][:, None]
        return model.logits(params, last_11D)[:, 0], _plain(new, cache)

    def decode(params: Any, cache: Any, tokens_B1: Any, position_B1: Any) -> Any:
        x_B1D, new = model.forward(
            params, tokens_B1, position_B1, None, KVCache(**cache)
        )
        return model.logits(params, x_B1D)[:, 0], _plain(new, cache)

    one = _ids(1, chunk)
    prefill_arguments = {
        "tokens": one,
        "position": one,
        "seat": _ids(1),
        "at": _ids(1),
    }
    decode_arguments = {"tokens": _ids(seats, 1), "position": _ids(seats, 1)}
    return [
        _exported(
            *("prefill", prefill, like, cache, prefill_arguments),
            does="writes a chunk of one sequence's tokens, at their positions, into "
            "its seat of the cache; returns (float logits [1, V] after token `at` of "
            "the chunk, cache)",
        ),
        _exported(
            *("decode", decode, like, cache, decode_arguments),
            does="writes one token of every seat, at its position, into the cache; "
            "returns (float logits [seats, V] after it, cache)",
        ),
    ]


def _exported(
    name: str, program: Any, params: Any, cache: Any, arguments: Any, *, does: str
) -> Portable:
    with lowered_for(_PLAIN):
        made = jax.export.export(
            jax.jit(program, donate_argnums=1), platforms=PLATFORMS
        )(params, cache, *arguments.values())
    return Portable(
        name=name,
        code=bytes(made.serialize()),
        does=does,
        arguments={"params": "dict", "cache": "dict"}
        | {key: _said(x) for key, x in arguments.items()},
        cache={key: _said(x) for key, x in cache.items()},
    )


def _plain(cache: Any, like: Any) -> dict[str, jax.Array]:
    return {name: getattr(cache, name) for name in like}


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _said(x: Any) -> str:
    return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"
