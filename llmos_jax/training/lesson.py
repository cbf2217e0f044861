"""Learn from what a teacher says of every next token, beside the text.

After "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531):
loss = weight T^2 KL(teacher_T || student_T) + (1 - weight) (that of the next token),
where p_T is softmax(logits / T) and T^2 keeps gradients as large whatever T is (section
2 there). Weight and T move in a straight line over the run: functions of the step, so
a run that goes on learns the same. Logits of both models exist for few tokens at a
time, and the backward pass makes the student's again.

Of kept answers (answers.py) there are the k likeliest tokens and what lies beneath
them, which is compared as if it were one more token. Its mass under another T than 1
is read off three points of log sum p^b, b = 1/T, over the tokens beneath: b of 0 is
their number, those of 1/2 and 1 are kept. The curve is convex; the parabola through
the points is an estimate between them, the straight line beyond 1 a lower bound.

B sequences, T tokens, V vocabulary, D model, k kept tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmos_jax.config.schema import DistillSection
from llmos_jax.ir import Way
from llmos_jax.models import (
    Params,
    Pass,
    Skeleton,
    annotate,
    annotated_by,
    ways_of,
)
from llmos_jax.models.annotate import Sharder
from llmos_jax.training.loss import token_losses

Batch = dict[str, jax.Array]
Losses = dict[str, jax.Array]
Guide = Callable[[Any, jax.Array, Batch], tuple[jax.Array, Losses]]
"""(student, its features [B, T, D], batch) -> the loss, and its parts by name."""

LESSON_LOSSES = ("ce_loss", "kd_loss")
KEPT = ("teacher_ids", "teacher_log_p", "teacher_rest")
"""What batches carry of kept answers: int32 and float16 [B, T, k], float32 [B, T, 2]
(log sum p and log sum p^(1/2) over the tokens that are not kept)."""

LOGITS_AT_ONCE = 1 << 25
"""Of one device and one model: 128 MiB in float32. A judgement: small beside weights
and moments, and products stay large."""

LEAST_REST = 1e-6
"""The student's mass beneath the kept tokens counts as at least this much: it is found
as 1 - sum, and float32 knows 1 to 1e-7."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherModel:
    """A model as it is looked at while a student's step is traced."""

    skeleton: Skeleton
    compute_dtype: str
    sharder: Sharder | None = None
    """Knows its rules; None: the surrounding lowering's."""

    @contextlib.contextmanager
    def _rules(self) -> Iterator[None]:
        if self.sharder is None:
            yield
            return
        with annotated_by(self.sharder):
            yield

    def look(
        self, params: Params, batch: Batch, how: Pass
    ) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """Features [B, T, D] before its head, and what makes logits of some."""
        with self._rules():
            model = self.skeleton.bind(self.skeleton.cast(params, self.compute_dtype))
            features_BTD, _ = model.routed_features(
                batch["inputs"], batch.get("segments"), how
            )

        def logits(x_BTD: jax.Array) -> jax.Array:
            with self._rules():
                found: jax.Array = model.logits(x_BTD)
                return found

        return jax.lax.stop_gradient(features_BTD), logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """How a step learns from a teacher."""

    asked: DistillSection
    steps: int
    """Of the run, for the schedules."""
    teacher: TeacherModel | None = None
    """In the step; None: batches carry its kept answers."""
    vocab_size: int | None = None
    """Tokens that teacher and student both have, where one is padded; None: all."""

    def settings(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weight and the temperature of a step, float32."""
        share = jnp.minimum(
            step.astype(jnp.float32) / jnp.float32(max(self.steps - 1, 1)),
            jnp.float32(1),
        )
        asked = self.asked

        def on_the_way(first: float, last: float | None) -> jax.Array:
            end = first if last is None else last
            return jnp.float32(first) + jnp.float32(end - first) * share

        return (
            on_the_way(asked.weight, asked.final_weight),
            on_the_way(asked.temperature, asked.final_temperature),
        )

    def guide(self, step: jax.Array, way: Way, params: Params | None) -> Guide:
        """What a step is guided by; `params` are those of a teacher in the step."""
        weight, temperature = self.settings(step)

        def guided(
            student: Any, features_BTD: jax.Array, batch: Batch
        ) -> tuple[jax.Array, Losses]:
            look: Callable[[jax.Array], jax.Array] | None = None
            theirs: jax.Array | None = None
            if self.teacher is not None:
                assert params is not None, "a teacher in the step has parameters"
                how = Pass(unroll=way.unrolled, exchange=way.context_exchange)
                theirs, look = self.teacher.look(params, batch, how)
            ce, kd = _losses(
                student, features_BTD, batch, theirs, look, temperature, self.vocab_size
            )
            loss = weight * kd + (1 - weight) * ce
            return loss, {"ce_loss": ce, "kd_loss": kd}

        return guided


def _losses(
    student: Any,
    features_BTD: jax.Array,
    batch: Batch,
    theirs_BTD: jax.Array | None,
    look: Callable[[jax.Array], jax.Array] | None,
    temperature: jax.Array,
    vocab_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Means over all tokens, weighted where the batch has weights: of the next token's
    loss, and of T^2 KL."""
    targets_BT = batch["targets"]
    B, T = targets_BT.shape
    parts = {name: batch[name] for name in ("targets", "weights", *KEPT)
             if name in batch}  # fmt: skip
    parts["ours"] = annotate(features_BTD, "batch", "seq", "embed")
    if theirs_BTD is not None:
        parts["theirs"] = annotate(theirs_BTD, "batch", "seq", "embed")

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(part: Batch) -> tuple[jax.Array, jax.Array]:
        ours_BtV = student.logits(part["ours"]).astype(jnp.float32)
        ce_Bt = token_losses(ours_BtV, part["targets"])
        if look is not None:
            theirs_BtV = look(part["theirs"]).astype(jnp.float32)
            kd_Bt = divergence(ours_BtV, theirs_BtV, temperature)
        else:
            ids, log_p, rest = (part[name] for name in KEPT)
            both_have_BtV = ours_BtV[..., :vocab_size]
            kd_Bt = kept_divergence(both_have_BtV, ids, log_p, rest, temperature)
        both = jnp.stack([ce_Bt, kd_Bt])
        if "weights" in part:
            both = both * part["weights"][None]
        return both[0].sum(), both[1].sum()

    def add(
        sums: tuple[jax.Array, jax.Array], part: Batch
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        ce, kd = piece(part)
        return (sums[0] + ce, sums[1] + kd), None

    count = num_pieces(B, T, student.spec.vocab_size)
    zero = jnp.zeros((), jnp.float32)
    pieces = {name: in_pieces(x, count) for name, x in parts.items()}
    (ce, kd), _ = jax.lax.scan(add, (zero, zero), pieces)
    return ce / targets_BT.size, kd / targets_BT.size


def num_pieces(B: int, T: int, V: int) -> int:
    """Pieces of the tokens of each device, so that few logits exist at once."""
    contexts = ways_of("seq", T)
    of_one = B * V / (ways_of("batch", B) * ways_of("vocab", V))
    t = T // contexts
    most = max(1, int(LOGITS_AT_ONCE // of_one))
    return t // max(size for size in range(1, t + 1) if t % size == 0 and size <= most)


def in_pieces(x: jax.Array, count: int) -> jax.Array:
    """[B, T, ...] as [count, B, T / count, ...]; every device cuts its own tokens."""
    B, T, *rest = x.shape
    contexts = ways_of("seq", T)
    cut = x.reshape(B, contexts, count, T // (contexts * count), *rest)
    return jnp.moveaxis(cut, 2, 0).reshape(count, B, T // count, *rest)


def divergence(
    ours_BTV: jax.Array, theirs_BTV: jax.Array, temperature: jax.Array
) -> jax.Array:
    """T^2 KL(theirs || ours) [B, T] of float32 logits, in nats; where one vocabulary is
    padded, over the tokens that both have."""
    V = min(ours_BTV.shape[-1], theirs_BTV.shape[-1])
    ours_BTV, theirs_BTV = (
        jax.nn.log_softmax(x_BTV[..., :V] / temperature)
        for x_BTV in (ours_BTV, theirs_BTV)
    )
    kl_BT = jnp.sum(jnp.exp(theirs_BTV) * (theirs_BTV - ours_BTV), axis=-1)
    return jnp.square(temperature) * kl_BT


def kept_divergence(
    ours_BTV: jax.Array,
    ids_BTk: jax.Array,
    log_p_BTk: jax.Array,
    rest_BT2: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """`divergence` from kept answers; equal to it where all tokens are kept.

    Args:
        ours_BTV: float32 logits.
        ids_BTk: the teacher's likeliest tokens.
        log_p_BTk: their log-probabilities at T = 1.
        rest_BT2: see KEPT.
        temperature: T.
    """
    V, k = ours_BTV.shape[-1], ids_BTk.shape[-1]
    b = 1 / temperature
    ours_BTk = jnp.take_along_axis(jax.nn.log_softmax(ours_BTV * b), ids_BTk, axis=-1)
    theirs_BTk = log_p_BTk.astype(jnp.float32) * b
    if k >= V:
        theirs_BTk = jax.nn.log_softmax(theirs_BTk)
        kl_BTk = jnp.exp(theirs_BTk) * (theirs_BTk - ours_BTk)
        return jnp.square(temperature) * jnp.sum(kl_BTk, axis=-1)
    beneath_BT1 = rest_mass(rest_BT2, V - k, b)[..., None]
    theirs_BTm = jax.nn.log_softmax(jnp.concatenate([theirs_BTk, beneath_BT1], -1))
    left_BT1 = 1 - jnp.sum(jnp.exp(ours_BTk), axis=-1, keepdims=True)
    left_BT1 = jnp.log(jnp.maximum(left_BT1, jnp.float32(LEAST_REST)))
    ours_BTm = jnp.concatenate([ours_BTk, left_BT1], axis=-1)
    kl_BT = jnp.sum(jnp.exp(theirs_BTm) * (theirs_BTm - ours_BTm), axis=-1)
    return jnp.square(temperature) * kl_BT


def rest_mass(rest_BT2: jax.Array, count: int, b: jax.Array) -> jax.Array:
    """log sum p^b [B, T] over the `count` tokens that are not kept: see the module."""
    at_0 = jnp.log(jnp.float32(count))
    at_1, at_half = rest_BT2[..., 0], rest_BT2[..., 1]
    curve = 2 * (at_1 - 2 * at_half + at_0)
    slope = at_1 - at_0 - curve
    inside = at_0 + slope * b + curve * b * b
    beyond = at_1 + (at_1 - at_half) * 2 * (b - 1)
    return jnp.where(b <= 1, inside, beyond)
