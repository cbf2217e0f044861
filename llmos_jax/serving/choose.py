"""Choose tokens by all that a request can ask for: `sampler`, with masks, biases and
likelihoods around it.

R rows, V vocabulary, E stops, A alternatives, W words of a mask, J biased tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.scheduling import (
    MOST_ALTERNATIVES,
    MOST_BIASES,
    Request,
    Room,
    Sampling,
    Variant,
)
from llmos_jax.serving.filters import Keep
from llmos_jax.serving.penalties import Counts, Penalties
from llmos_jax.serving.sampler import Draw, SamplingRows, sample

MOST_STOPS = 8
"""E: stop tokens of a request (a judgement: models have one to three)."""
_WORD = 32


class DrawRows(NamedTuple):
    """What is known of the tokens to be chosen; parts that a variant has not are
    None."""

    at_R: Any
    """int32: which row of features each is chosen by."""
    seat_R: Any
    position_R: Any
    """int32: where it goes; one outside of the pool marks padding."""
    limit_R: Any
    """int32: the most tokens of the sequence."""
    prompt_R: Any
    """int32: where its answer begins."""
    stop_RE: Any
    sampling: SamplingRows
    mask_RW: Any
    """uint32: bit t % 32 of word t // 32 allows token t."""
    bias_RJ: Any
    """int32 tokens and float32 biases; a token outside of the vocabulary is none."""


class Chosen(NamedTuple):
    """What was chosen; likelihoods by the model's own logits."""

    token_R: jax.Array
    logprob_R: jax.Array | None = None
    top_token_RA: jax.Array | None = None
    top_logprob_RA: jax.Array | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One token to be chosen, as the host knows it."""

    at: int
    seat: int
    position: int
    limit: int
    prompt: int
    request: Request
    mask: Any = None
    """What its grammar allows: uint32 [W]."""


def rows_of_choices(
    choices: Sequence[Choice], variant: Variant, size: int, room: Room
) -> DrawRows:
    """Lay out up to `size` choices as numpy arrays; the rest is padding.

    Args:
        choices: what is known.
        variant: what of it the program wants.
        size: R.
        room: the engine's sizes; a seat beyond marks padding.
    """
    R, V, count = size, room.vocab_size, len(choices)
    stop_RE = np.full((R, MOST_STOPS), -(2**31), np.int32)
    for row, one in enumerate(choices):
        stops = sorted(one.request.stop_ids)
        stop_RE[row, : len(stops)] = stops

    def column(values: Sequence[int], padding: int) -> np.ndarray:
        made = np.full((R,), padding, np.int32)
        made[:count] = values
        return made

    asks = [one.request.sampling for one in choices]
    return DrawRows(
        at_R=column([one.at for one in choices], 0),
        seat_R=column([one.seat for one in choices], room.seats),
        position_R=column([one.position for one in choices], 2**30),
        limit_R=column([one.limit for one in choices], 0),
        prompt_R=column([one.prompt for one in choices], 0),
        stop_RE=stop_RE,
        sampling=_sampling_rows(asks, variant, R),
        mask_RW=_masks(choices, R, V) if variant.masks else None,
        bias_RJ=_biases(asks, R, V) if variant.masks else None,
    )


def _sampling_rows(asks: Sequence[Sampling], variant: Variant, R: int) -> SamplingRows:
    def column(name: str, padding: float, dtype: Any) -> Any:
        made = np.full((R,), padding, dtype)
        made[: len(asks)] = [getattr(one, name) for one in asks]
        return made

    if not variant.draws:
        return SamplingRows(None, None, None)
    seed_R2: Any = np.zeros((R, 2), np.uint32)
    for row, one in enumerate(asks):
        seed_R2[row] = divmod(one.seed % 2**64, 2**32)
    penalties = None
    if variant.penalizes:
        penalties = Penalties(
            repetition_B=column("repetition_penalty", 1, np.float32),
            presence_B=column("presence_penalty", 0, np.float32),
            frequency_B=column("frequency_penalty", 0, np.float32),
        )
    return SamplingRows(
        draw=Draw(temperature_B=column("temperature", 0, np.float32), seed_B2=seed_R2),
        keep=Keep(
            top_k_B=column("top_k", 0, np.int32),
            top_p_B=column("top_p", 1, np.float32),
            min_p_B=column("min_p", 0, np.float32),
        ),
        penalties=penalties,
    )


def _masks(choices: Sequence[Choice], R: int, V: int) -> np.ndarray:
    mask_RW = np.full((R, -(-V // _WORD)), 2**32 - 1, np.uint32)
    for row, one in enumerate(choices):
        if one.mask is not None:
            mask_RW[row] = one.mask
    return mask_RW


def _biases(asks: Sequence[Sampling], R: int, V: int) -> tuple[np.ndarray, np.ndarray]:
    token_RJ = np.full((R, MOST_BIASES), V, np.int32)
    bias_RJ = np.zeros((R, MOST_BIASES), np.float32)
    for row, one in enumerate(asks):
        for place, (token, bias) in enumerate(one.logit_bias):
            token_RJ[row, place], bias_RJ[row, place] = token, bias
    return token_RJ, bias_RJ


def choose(
    variant: Variant, logits_RV: jax.Array, draw: DrawRows, counts: Counts | None
) -> Chosen:
    """Return a token for each row, or NOT_A_NUMBER, and what the variant tells."""
    logits_RV = logits_RV.astype(jnp.float32)
    allowed_RV = logits_RV
    if variant.masks:
        allowed_RV = _allowed(logits_RV, draw)
    token_R = sample(allowed_RV, draw.sampling, counts, draw.position_R)
    if not variant.tells:
        return Chosen(token_R)
    total_R1 = jax.nn.logsumexp(logits_RV, axis=1, keepdims=True)
    top_RA, top_token_RA = jax.lax.top_k(logits_RV, MOST_ALTERNATIVES)
    at_R1 = jnp.maximum(token_R, 0)[:, None]
    return Chosen(
        token_R,
        logprob_R=(jnp.take_along_axis(logits_RV, at_R1, axis=1) - total_R1)[:, 0],
        top_token_RA=top_token_RA,
        top_logprob_RA=top_RA - total_R1,
    )


def _allowed(logits_RV: jax.Array, draw: DrawRows) -> jax.Array:
    """Logits with biases, and none of what a mask forbids."""
    R, V = logits_RV.shape
    token_RJ, bias_RJ = draw.bias_RJ
    row_R1 = jnp.arange(R)[:, None]
    logits_RV = logits_RV.at[row_R1, token_RJ].add(bias_RJ, mode="drop")
    at_W = jnp.arange(_WORD, dtype=jnp.uint32)[None, None, :]
    bit_W32 = (draw.mask_RW[:, :, None] >> at_W) & 1
    is_allowed_RV = bit_W32.reshape(R, -1)[:, :V] > 0
    # A row that is no number stays one: its request fails, and no other.
    is_broken_R1 = ~jnp.isfinite(logits_RV.max(axis=1, keepdims=True))
    return jnp.where(is_allowed_RV | is_broken_R1, logits_RV, -jnp.inf)
