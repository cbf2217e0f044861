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
from llmos_jax.models import Params, Skeleton, annotate, mesh_axes_of
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
        def part(features_BTD: jax.Array, batch: Batch) -> jax.Array:
            counted = _counted(model.logits(features_BTD), batch)
            return jnp.stack([counted[0], jnp.sum(batch["weights"]), counted[1]])

        return in_parts(part, skeleton, features_BTD, batch)

    def score(params: Params, batch: Batch) -> jax.Array:
        batch = in_token_order(batch)
        if way.mesh.stage > 1:
            return pipelined_sums(job, params, batch, sums)
        model = skeleton.bind(job.cast(params))
        return sums(model, features_of(model, batch, job), batch)

    return score


def compare_step(
    skeleton: Skeleton, reference: Skeleton, *, compute_dtype: str, way: Way = PLAIN
) -> Callable[[Params, Params, Batch], jax.Array]:
    """Return (params, reference's params, batch with weights) -> float32 [7].

    That is: nats of KL(reference || model), tokens, tokens where both have the same
    first choice; nats and correct tokens of the model, and of the reference. The two
    have one vocabulary; where one pads it, only what both have is compared.
    """
    jobs = [Job(one, way, how_of(way), compute_dtype) for one in (skeleton, reference)]
    V = min(skeleton.spec.vocab_size, reference.spec.vocab_size)

    def compare(params: Params, theirs: Params, batch: Batch) -> jax.Array:
        batch = in_token_order(batch)
        models = [
            job.skeleton.bind(job.cast(one)) for job, one in zip(jobs, (params, theirs))
        ]
        both = tuple(features_of(model, batch, job) for model, job in zip(models, jobs))

        def part(both: tuple[jax.Array, jax.Array], batch: Batch) -> jax.Array:
            ours_BTV, theirs_BTV = (
                jax.nn.log_softmax(model.logits(x_BTD)[..., :V].astype(jnp.float32))
                for model, x_BTD in zip(models, both)
            )
            kld_BT = jnp.sum(jnp.exp(theirs_BTV) * (theirs_BTV - ours_BTV), axis=-1)
            same_BT = jnp.argmax(ours_BTV, axis=-1) == jnp.argmax(theirs_BTV, axis=-1)
            weights_BT = batch["weights"]
            return jnp.stack(
                [
                    jnp.sum(kld_BT * weights_BT),
                    jnp.sum(weights_BT),
                    jnp.sum(same_BT.astype(jnp.float32) * weights_BT),
                    *_counted(ours_BTV, batch),
                    *_counted(theirs_BTV, batch),
                ]
            )

        return in_parts(part, skeleton, both, batch)

    return compare


def features_of(model: Any, batch: Batch, job: Job) -> jax.Array:
    """[B, T, D] before the head."""
    features_BTD: jax.Array = model.routed_features(
        batch["inputs"], batch.get("segments"), job.how
    )[0]
    return features_BTD


def _counted(logits_BTV: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Nats, and tokens guessed right."""
    losses_BT = token_losses(logits_BTV, batch["targets"])
    right_BT = (jnp.argmax(logits_BTV, axis=-1) == batch["targets"]).astype(jnp.float32)
    weights_BT = batch["weights"]
    return jnp.sum(losses_BT * weights_BT), jnp.sum(right_BT * weights_BT)


LOGITS_AT_ONCE = 1 << 28
"""Elements of all devices together: 1 GiB in float32, of Gemma's vocabulary 1024
tokens'."""


def in_parts(
    part: Callable[[Any, Batch], jax.Array],
    skeleton: Skeleton,
    features: Any,
    batch: Batch,
) -> jax.Array:
    """Sum `part` over pieces of the sequences, so that few logits exist at once.

    Where a mesh splits sequences each device has its piece already.
    """
    B, T = batch["targets"].shape
    if mesh_axes_of("seq", T):
        return part(features, batch)
    most = max(1, LOGITS_AT_ONCE // (B * skeleton.spec.vocab_size))
    t = max(size for size in range(1, T + 1) if T % size == 0 and size <= most)
    if t == T:
        return part(features, batch)

    # Whole on every device that has them: a slice of what is split would be exchanged.
    features = jax.tree.map(lambda x: annotate(x, "batch", "seq", "embed"), features)

    def piece(sums: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        cut = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, index * t, t, axis=1),
            (features, batch),
        )
        return sums + part(*cut), None

    like = jax.eval_shape(part, features, batch)
    zeros = jnp.zeros(like.shape, like.dtype)
    sums, _ = jax.lax.scan(piece, zeros, jnp.arange(T // t))
    return sums


def total_score(sums: Iterable[np.ndarray]) -> Score:
    """Add up what `score_step` gave for each batch, in float64."""
    nats, tokens, correct = np.sum(
        [np.asarray(part, np.float64) for part in sums], axis=0
    )
    return Score(nats=float(nats), tokens=int(tokens), correct=int(correct))
