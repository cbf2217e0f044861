"""Make tokens that were seen or said less likely, from counts of a pool of tokens.

B sequences, S places of the pool, V vocabulary.

Counts are not a state of their own: a dispatch counts its rows' tokens in the pool
when it starts and carries them through its steps. So nothing has to be reset when a
slot changes hands, and batches without penalties have no counts at all.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Penalties(NamedTuple):
    """float32 per row; none with (1, 0, 0)."""

    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array


class Counts(NamedTuple):
    """Which tokens a sequence has so far."""

    seen_BV: jax.Array
    """bool: in the prompt or in the answer."""
    said_BV: jax.Array
    """int32: how many times in the answer."""


def count(
    pool_BS: jax.Array, prompt_B: jax.Array, position_B: jax.Array, vocab_size: int
) -> Counts:
    """Count the tokens before `position_B`; an answer begins at `prompt_B`."""
    B, S = pool_BS.shape
    place_BS = jnp.broadcast_to(jnp.arange(S)[None, :], (B, S))
    row_BS = jnp.broadcast_to(jnp.arange(B)[:, None], (B, S))
    is_known_BS = place_BS < position_B[:, None]
    is_said_BS = is_known_BS & (place_BS >= prompt_B[:, None])
    # What is not known yet, or is no token, lies outside and is dropped.
    token_BS = jnp.where(is_known_BS & (pool_BS >= 0), pool_BS, vocab_size)
    at_BS = (row_BS, token_BS)
    return Counts(
        seen_BV=jnp.zeros((B, vocab_size), bool).at[at_BS].set(True, mode="drop"),
        said_BV=jnp.zeros((B, vocab_size), jnp.int32)
        .at[at_BS]
        .add(is_said_BS.astype(jnp.int32), mode="drop"),
    )


def counted(counts: Counts, token_B: jax.Array) -> Counts:
    """Count one more token of each row; a negative one is none."""
    B, V = counts.said_BV.shape
    at_B = (jnp.arange(B), jnp.where(token_B < 0, V, token_B))
    return Counts(
        seen_BV=counts.seen_BV.at[at_B].set(True, mode="drop"),
        said_BV=counts.said_BV.at[at_B].add(1, mode="drop"),
    )


def penalized(logits_BV: jax.Array, penalties: Penalties, counts: Counts) -> jax.Array:
    """Return logits after the repetition penalty (CTRL, arXiv 1909.05858, section 4.1,
    in the form that lowers negative logits too), frequency and presence penalties."""
    repetition_B1 = penalties.repetition_B[:, None]
    lowered_BV = jnp.where(
        logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1
    )
    logits_BV = jnp.where(counts.seen_BV, lowered_BV, logits_BV)
    said_BV = counts.said_BV.astype(jnp.float32)
    return (
        logits_BV
        - penalties.frequency_B[:, None] * said_BV
        - penalties.presence_B[:, None] * (said_BV > 0).astype(jnp.float32)
    )
