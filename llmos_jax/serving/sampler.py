"""Choose the next token of each sequence from its logits, each by its own parameters.

B sequences, V vocabulary, n blocks of M tokens, C candidates.

Parameters are arrays with one value per row, so one program serves every temperature
and seed. What no row of a batch asks for is left out of the program: the parts of
`SamplingRows` are None then, and a greedy batch compiles to an argmax.

The vocabulary is looked at in blocks of about sqrt(V): the maximum, the sum and the
draw of a row are first those of its blocks, then one within a block: an argmax over
all of V is slow on a CPU, and a draw needs a random number for each token it looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.scheduling import NOT_A_NUMBER, Sampling
from llmos_jax.serving.filters import Keep, deepest_kept
from llmos_jax.serving.penalties import Counts, Penalties, penalized


class Needs(NamedTuple):
    """What the program of a batch holds; each combination is another program."""

    draws: bool
    filters: bool
    penalizes: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> Needs:
        """What at least one of the rows needs."""
        return cls(
            draws=any(one.draws for one in samplings),
            filters=any(one.filters for one in samplings),
            penalizes=any(one.penalizes for one in samplings),
        )


class Draw(NamedTuple):
    """Chance: how much of it, and from where."""

    temperature_B: jax.Array
    """float32; 0 is greedy."""
    seed_B2: jax.Array
    """uint32: the high and low half of the seed."""


class SamplingRows(NamedTuple):
    """`Sampling` of B rows; a part that no row needs is None."""

    draw: Draw | None
    keep: Keep | None
    penalties: Penalties | None


def rows_of(samplings: Sequence[Sampling], needs: Needs | None = None) -> SamplingRows:
    """Lay out the parameters of B rows as arrays.

    Args:
        samplings: of each row, checked.
        needs: what the program holds; None: what these rows need.
    """
    needs = needs or Needs.of(samplings)

    def column(name: str, dtype: type) -> jax.Array:
        return jnp.asarray(np.array([getattr(one, name) for one in samplings], dtype))

    seeds = np.array([one.seed % 2**64 for one in samplings], np.uint64)
    halves = np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], axis=1)
    return SamplingRows(
        draw=Draw(
            temperature_B=column("temperature", np.float32),
            seed_B2=jnp.asarray(halves.astype(np.uint32)),
        )
        if needs.draws
        else None,
        keep=Keep(
            top_k_B=column("top_k", np.int32),
            top_p_B=column("top_p", np.float32),
            min_p_B=column("min_p", np.float32),
        )
        if needs.filters
        else None,
        penalties=Penalties(
            repetition_B=column("repetition_penalty", np.float32),
            presence_B=column("presence_penalty", np.float32),
            frequency_B=column("frequency_penalty", np.float32),
        )
        if needs.penalizes
        else None,
    )


def sample(
    logits_BV: jax.Array,
    rows: SamplingRows,
    counts: Counts | None,
    position_B: jax.Array,
) -> jax.Array:
    """Return int32 [B]: a token for each row, or NOT_A_NUMBER.

    A row's token depends on its own logits, parameters, counts and position alone: its
    random numbers are those of (seed, position), wherever in a batch it stands.

    Args:
        logits_BV: of any float dtype.
        rows: how to choose.
        counts: tokens so far; needed with penalties.
        position_B: int32, where in its sequence the token will stand.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if rows.penalties is not None:
        assert counts is not None, "penalties need counts"
        logits_BV = penalized(logits_BV, rows.penalties, counts)
    logits_BnM = _in_blocks(logits_BV)
    token_B, best_B = _most_likely(logits_BnM)
    if rows.draw is not None:
        drawn_B = _drawn(logits_BnM, best_B, rows.draw, rows.keep, position_B)
        token_B = jnp.where(rows.draw.temperature_B > 0, drawn_B, token_B)
    return jnp.where(jnp.isfinite(best_B), token_B, NOT_A_NUMBER)


def _in_blocks(logits_BV: jax.Array) -> jax.Array:
    """[B, n, M]; what fills up the last block is never chosen."""
    B, V = logits_BV.shape
    M = 1 << (V.bit_length() // 2)
    n = -(-V // M)
    padded = jnp.pad(logits_BV, ((0, 0), (0, n * M - V)), constant_values=-jnp.inf)
    return padded.reshape(B, n, M)


def _most_likely(logits_BnM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first token with the largest logit, and that logit (NaN, if one is)."""
    best_Bn = logits_BnM.max(axis=2)
    block_B = jnp.argmax(best_Bn, axis=1)
    within_B = jnp.argmax(_block(logits_BnM, block_B), axis=1)
    return _token(logits_BnM, block_B, within_B), best_Bn.max(axis=1)


def _drawn(
    logits_BnM: jax.Array,
    best_B: jax.Array,
    draw: Draw,
    keep: Keep | None,
    position_B: jax.Array,
) -> jax.Array:
    """Draw a block by what its tokens weigh together, then one of its tokens.

    Both draws add Gumbel noise to the logarithms of the weights and take the largest
    (arXiv 1611.00712, section 3.1). The product of both probabilities is the token's.
    """
    B, n, M = logits_BnM.shape
    temperature_B = jnp.where(draw.temperature_B > 0, draw.temperature_B, 1.0)
    # How far below the best: >= 0, whatever the logits and however small temperatures.
    depth_BnM = (best_B[:, None, None] - logits_BnM) / temperature_B[:, None, None]
    if keep is not None:
        kept_B = deepest_kept(depth_BnM.reshape(B, n * M), keep)
        depth_BnM = jnp.where(
            depth_BnM <= kept_B[:, None, None], depth_BnM, jnp.float32(jnp.inf)
        )
    noise_BnM = _noise(draw.seed_B2, position_B, n + M)
    mass_Bn = jnp.exp(-depth_BnM).sum(axis=2)
    block_B = jnp.argmax(jnp.log(mass_Bn) + noise_BnM[:, :n], axis=1)
    within_B = jnp.argmax(noise_BnM[:, n:] - _block(depth_BnM, block_B), axis=1)
    return _token(logits_BnM, block_B, within_B)


def _noise(seed_B2: jax.Array, position_B: jax.Array, count: int) -> jax.Array:
    """Gumbel noise [B, count] of each row's seed and position."""

    def of_row(seed_2: jax.Array, position: jax.Array) -> jax.Array:
        root = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(root, position), (count,))

    return jax.vmap(of_row)(seed_B2, position_B)


def _block(x_BnM: jax.Array, block_B: jax.Array) -> jax.Array:
    """Each row's own block, [B, M]."""
    return jnp.take_along_axis(x_BnM, block_B[:, None, None], axis=1)[:, 0]


def _token(logits_BnM: jax.Array, block_B: jax.Array, within_B: jax.Array) -> jax.Array:
    return (block_B * logits_BnM.shape[2] + within_B).astype(jnp.int32)
