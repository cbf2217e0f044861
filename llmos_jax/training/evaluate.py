"""Score text under a model: total negative log-likelihood, token by token.

B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.ir import Way
from llmos_jax.models import Params, Skeleton
from llmos_jax.training.loss import token_losses
from llmos_jax.training.pipeline import Job, pipelined_sums
from llmos_jax.training.step import Batch, how_of, in_token_order

PLAIN = Way()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Sums over a text: nats, tokens predicted, tokens guessed right."""

    nats: float
    tokens: int
    correct: int

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of tokens whose most likely guess was right."""
        return self.correct / self.tokens

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits this model needs per byte of the raw text."""
        return self.nats / math.log(2) / num_bytes


def score_step(
    skeleton: Skeleton, *, compute_dtype: str, way: Way = PLAIN
) -> Callable[[Params, Batch], jax.Array]:
    """Return (params, batch with weights) -> float32 [3]: nats, tokens, correct."""
    job = Job(skeleton, way, how_of(way), compute_dtype)

    def sums(model: Any, features_BTD: jax.Array, batch: Batch) -> jax.Array:
        logits_BTV = model.logits(features_BTD)
        losses_BT = token_losses(logits_BTV, batch["targets"])
        guesses_BT = jnp.argmax(logits_BTV, axis=-1)
        right_BT = (guesses_BT == batch["targets"]).astype(jnp.float32)
        weights_BT = batch["weights"]
        return jnp.stack(
            [
                jnp.sum(losses_BT * weights_BT),
                jnp.sum(weights_BT),
                jnp.sum(right_BT * weights_BT),
            ]
        )

    def score(params: Params, batch: Batch) -> jax.Array:
        batch = in_token_order(batch)
        if way.mesh.stage > 1:
            return pipelined_sums(job, params, batch, sums)
        model = skeleton.bind(job.cast(params))
        features_BTD, _ = model.routed_features(
            batch["inputs"], batch.get("segments"), job.how
        )
        return sums(model, features_BTD, batch)

    return score


def total_score(sums: Iterable[np.ndarray]) -> Score:
    """Add up what `score_step` gave for each batch, in float64."""
    nats, tokens, correct = np.sum(
        [np.asarray(part, np.float64) for part in sums], axis=0
    )
    return Score(nats=float(nats), tokens=int(tokens), correct=int(correct))
