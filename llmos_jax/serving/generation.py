"""Continue one prompt, token by token, with a KV cache.

T prompt tokens, S cache slots. The prompt is padded to a power of two and the cache to
a multiple of 128, so a session of prompts compiles a handful of programs. Padding is
harmless: it lies after the prompt, no query sees it, and decoding overwrites it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.errors import ConfigError
from llmos_jax.models import KVCache, Params, Skeleton, empty_cache
from llmos_jax.serving.sampler import Sampling, sample

FinishReason = Literal["stop", "length"]
_CACHE_MULTIPLE = 128
_SMALLEST_PROMPT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was generated, and how fast (decode steps alone, compilation left out)."""

    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    tokens_per_s: float


class Generator:
    """A model with parameters in place, ready to continue prompts."""

    def __init__(self, skeleton: Skeleton, params: Params, *, compute_dtype: str):
        self._skeleton = skeleton
        self._dtype = jnp.dtype(compute_dtype)
        self._params = skeleton.cast(params, compute_dtype)
        self._programs: dict[Sampling, tuple[Callable, Callable]] = {}

    def complete(
        self,
        prompt_ids: np.ndarray,
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int] = frozenset(),
        on_token: Callable[[int], None] = lambda token: None,
    ) -> Completion:
        """Generate up to `max_tokens` after the prompt.

        Args:
            prompt_ids: [T] token ids, T >= 1.
            max_tokens: at least 1.
            sampling: how to choose each token.
            stop_ids: end before emitting one of these.
            on_token: called with each token as it is known.

        Raises:
            ConfigError: nothing to continue, or no room in the model's context.
        """
        limit = self._skeleton.spec.max_seq_len
        self._check(len(prompt_ids), max_tokens, limit)
        tokens: list[int] = []
        times = [0.0]
        finish: FinishReason = "length"
        for token in self._stream(prompt_ids, max_tokens, sampling):
            times.append(time.perf_counter())
            if token in stop_ids:
                finish = "stop"
                break
            tokens.append(token)
            on_token(token)
            if len(tokens) == max_tokens:
                break
        # The first token is the prefill's; the second may compile: neither is a rate.
        steady = times[2:]
        rate = (len(steady) - 1) / (steady[-1] - steady[0]) if len(steady) > 1 else 0.0
        return Completion(
            token_ids=tuple(tokens),
            prompt_tokens=len(prompt_ids),
            finish_reason=finish,
            tokens_per_s=rate,
        )

    def _check(self, prompt_tokens: int, max_tokens: int, limit: int) -> None:
        if prompt_tokens < 1:
            raise ConfigError("the prompt is empty; give at least one token.")
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1.")
        if prompt_tokens + max_tokens > limit:
            raise ConfigError(
                f"{prompt_tokens} prompt tokens and max_tokens = {max_tokens} exceed "
                f"the model's context of {limit}. Ask for at most "
                f"{max(limit - prompt_tokens, 0)}, or shorten the prompt."
            )

    def _stream(
        self, prompt_ids: np.ndarray, max_tokens: int, sampling: Sampling
    ) -> Iterator[int]:
        prefill, decode = self._compiled_for(sampling)
        T = len(prompt_ids)
        padded = max(_SMALLEST_PROMPT, 1 << (T - 1).bit_length())
        slots = -(-max(padded, T + max_tokens) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
        cache = empty_cache(self._skeleton.spec, 1, slots, self._dtype)
        tokens_BT = np.zeros((1, padded), np.int32)
        tokens_BT[0, :T] = prompt_ids
        root = jax.random.key(sampling.seed)
        token_B, cache = prefill(self._params, tokens_BT, np.int32(T), cache, root)
        yield int(token_B[0])
        for position in range(T, T + max_tokens - 1):
            token_B, cache = decode(
                self._params, token_B, np.int32(position), cache, root
            )
            yield int(token_B[0])

    def _compiled_for(self, sampling: Sampling) -> tuple[Callable, Callable]:
        if sampling not in self._programs:
            self._programs[sampling] = _programs(self._skeleton, sampling)
        return self._programs[sampling]


def _programs(skeleton: Skeleton, sampling: Sampling) -> tuple[Callable, Callable]:
    """The jitted (prefill, decode) of one way to sample; both donate the cache."""

    def prefill(
        params: Params,
        tokens_BT: jax.Array,
        T: jax.Array,
        cache: KVCache,
        root: jax.Array,
    ) -> tuple[jax.Array, KVCache]:
        model = skeleton.bind(params)
        position_BT = jnp.arange(tokens_BT.shape[1])[None, :]
        x_BTD, cache = model.features(tokens_BT, position_BT, cache)
        last_B1D = jax.lax.dynamic_slice_in_dim(x_BTD, T - 1, 1, axis=1)
        logits_BV = model.logits(last_B1D)[:, 0, :]
        return sample(logits_BV, jax.random.fold_in(root, T), sampling), cache

    def decode(
        params: Params,
        token_B: jax.Array,
        position: jax.Array,
        cache: KVCache,
        root: jax.Array,
    ) -> tuple[jax.Array, KVCache]:
        model = skeleton.bind(params)
        position_B1 = jnp.broadcast_to(position, (token_B.shape[0], 1))
        x_B1D, cache = model.features(token_B[:, None], position_B1, cache)
        logits_BV = model.logits(x_B1D)[:, 0, :]
        return sample(
            logits_BV, jax.random.fold_in(root, position + 1), sampling
        ), cache

    return jax.jit(prefill, donate_argnums=3), jax.jit(decode, donate_argnums=3)
