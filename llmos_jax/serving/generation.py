"""Continue prompts, one or many at once, with a KV cache.

Prompts are padded to a power of two and slots of the cache have a length that is one,
so a session of prompts compiles a handful of programs; seeds, temperatures and the
like are data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmos_jax.errors import ConfigError
from llmos_jax.models import Params, Skeleton
from llmos_jax.scheduling import Sampling
from llmos_jax.serving.forward import open_forward
from llmos_jax.serving.runner import Runner, power_of_two
from llmos_jax.serving.session import FinishReason, Hear, Request, Session
from llmos_jax.serving.step import DecodeState, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was generated, and how fast (decode steps alone, compilation left out)."""

    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    tokens_per_s: float


class Generator:
    """A model with parameters in place, ready to continue prompts."""

    def __init__(
        self,
        skeleton: Skeleton,
        params: Params,
        *,
        compute_dtype: str,
        kv_dtype: str | None = None,
        rotate_keys: bool = False,
        max_batch: int = 8,
    ):
        """Get ready; programs compile when they are first needed.

        Args:
            skeleton: the model.
            params: its parameters, in any dtype.
            compute_dtype: "float32" or "bfloat16".
            kv_dtype: of cached keys and values; None: the compute dtype.
            rotate_keys: spread what a key's dimension has too much of over all, before
                an int8 cache rounds it (models.cache).
            max_batch: sequences that run at once, at most.

        Raises:
            ConfigError: a dtype that no cache here has, or no sequence at all.
        """
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}; it must be at least 1.")
        self._spec = skeleton.spec
        self._max_batch = max_batch
        model, weights = open_forward(
            skeleton,
            params,
            compute_dtype=compute_dtype,
            kv_dtype=kv_dtype,
            rotate_keys=rotate_keys,
        )
        self._runner = Runner(model, weights, vocab_size=self._spec.vocab_size)
        self._state: DecodeState | None = None

    def complete(
        self,
        prompt_ids: np.ndarray,
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int] = frozenset(),
        on_token: Callable[[int], bool | None] | None = None,
    ) -> Completion:
        """Generate up to `max_tokens` after one prompt.

        Args:
            prompt_ids: [T] token ids, T >= 1.
            max_tokens: at least 1.
            sampling: how to choose each token.
            stop_ids: end before emitting one of these.
            on_token: called with each token soon after it is known; True ends the
                answer there. Where nobody listens, more steps run at a time.

        Raises:
            ConfigError: nothing to continue, no room in the model's context, or a
                parameter outside its range.
            LlmosError: the model's logits are no numbers.
        """
        return self.complete_all(
            [prompt_ids],
            [sampling],
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            on_token=on_token and (lambda _, token: on_token(token)),
        )[0]

    def complete_all(
        self,
        prompts: Sequence[np.ndarray],
        samplings: Sequence[Sampling],
        *,
        max_tokens: int | Sequence[int],
        stop_ids: frozenset[int] = frozenset(),
        on_token: Hear | None = None,
    ) -> list[Completion]:
        """Generate after many prompts; each gets the tokens that it would get alone.

        Args:
            prompts: [T] token ids each, T >= 1.
            samplings: of each prompt.
            max_tokens: of every answer, or of each; at least 1.
            stop_ids: an answer ends before one of these.
            on_token: called with (index of the prompt, token); True ends that answer.

        Raises:
            ConfigError: as `complete`.
            LlmosError: as `complete`.
        """
        if isinstance(max_tokens, int):
            max_tokens = [max_tokens] * len(prompts)
        asked = zip(prompts, samplings, max_tokens, strict=True)
        requests = [
            Request(
                index=index,
                prompt=self._checked(prompt, most),
                row=Row(len(prompt), len(prompt) + most, stop_ids, sampling.check()),
            )
            for index, (prompt, sampling, most) in enumerate(asked)
        ]
        if not requests:
            return []
        state = self._room_for(requests)
        self._state = Session(self._runner, state, requests, on_token).run()
        return [_completion(request) for request in requests]

    def _checked(self, prompt_ids: np.ndarray, max_tokens: int) -> np.ndarray:
        """The prompt, or ConfigError where it cannot be continued so far."""
        prompt = np.asarray(prompt_ids, np.int32)
        limit, V = self._spec.max_seq_len, self._spec.vocab_size
        if len(prompt) < 1:
            raise ConfigError("the prompt is empty; give at least one token.")
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1.")
        if len(prompt) + max_tokens > limit:
            raise ConfigError(
                f"{len(prompt)} prompt tokens and max_tokens = {max_tokens} exceed "
                f"the model's context of {limit}. Ask for at most "
                f"{max(limit - len(prompt), 0)}, or shorten the prompt."
            )
        if prompt.min() < 0 or prompt.max() >= V:
            raise ConfigError(
                f"the prompt has token ids from {prompt.min()} to {prompt.max()}; the "
                f"model knows 0 to {V - 1}. Encode it with the model's tokenizer."
            )
        return prompt

    def _room_for(self, requests: Sequence[Request]) -> DecodeState:
        """Give away the state of the last call if it suits, or else a new one."""
        slots = min(power_of_two(len(requests)), self._max_batch)
        tokens = max(request.row.limit for request in requests)
        length = self._runner.slot_length(tokens, self._spec.max_seq_len)
        state, self._state = self._state, None
        if state is not None and state.pool.shape == (slots, length):
            return state
        del state  # its memory first
        return self._runner.empty_state(slots, length)


def _completion(request: Request) -> Completion:
    assert request.reason is not None, "a request was left without an answer"
    return Completion(
        token_ids=tuple(request.tokens),
        prompt_tokens=len(request.prompt),
        finish_reason=request.reason,
        tokens_per_s=request.tokens_per_s,
    )
