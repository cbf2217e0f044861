"""Say how likely the ends of given sequences are under a model, row by row.

B rows, T tokens. Each row ends in tokens to be judged, whatever comes before is their
context; behind them lies padding, which no token before it sees. Rows of like length
share a batch, padded to a power of two, so that a handful of programs serve all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmos_jax.ir import Plan, Way
from llmos_jax.lowering import (
    Program,
    device_mesh,
    fetch,
    lower,
    param_shardings,
    replicated,
)
from llmos_jax.models import Params, Skeleton
from llmos_jax.training.evaluate import PLAIN, features_of, in_parts
from llmos_jax.training.loss import token_losses
from llmos_jax.training.pipeline import Job, pipelined_sums
from llmos_jax.training.scorer import Places, Progress
from llmos_jax.training.step import Batch, how_of, in_token_order

SHORTEST = 32
"""Tokens of the shortest program; a judgement: fewer save no time worth a compile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A sequence and how many of its last tokens are to be judged."""

    ids: Sequence[int]
    """At least one more than `count`: the first token follows nothing."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """What a model makes of the judged tokens of a sequence."""

    log_prob: float
    """Sum of their log-probabilities, in nats."""
    is_greedy: bool
    """Whether each is what the model would have said itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihoods:
    """A program that judges batches of B sequences of up to T + 1 tokens."""

    places: Places
    program: Program
    """(params, batch with weights) -> what `likelihood_step` says."""

    @property
    def batch_size(self) -> int:
        """B."""
        return self.places.plan.workload.global_batch

    @property
    def param_shardings(self) -> dict[str, Any]:
        """Parameter path -> sharding on this mesh."""
        return param_shardings(self.places.plan, self.places.mesh)

    def of(self, params: Params, asked: Sequence[Judged]) -> list[Likelihood]:
        """Judge up to B sequences in one step; fewer take as long."""
        rows, T = self.places.rows, self.places.plan.workload.seq_len
        whole = padded_batch(asked, self.batch_size, T)
        local = {name: x_BT[rows] for name, x_BT in whole.items()}
        sums_B2 = fetch(self.program(params, self.places.on_mesh(local, rows)))
        return [
            Likelihood(log_prob=-float(nats), is_greedy=bool(others == 0))
            for nats, others in sums_B2[: len(asked)]
        ]


@dataclass(slots=True, kw_only=True)
class Judge:
    """A model that judges any number of sequences of up to `max_length` + 1 tokens."""

    max_length: int
    open_at: Callable[[int], Likelihoods]
    """Opens the program for so many tokens a row."""
    read: Callable[[dict[str, Any]], Params]
    """Reads the parameters onto shardings."""
    params: Params | None = None
    """What was read; None before the first question."""
    _programs: dict[int, Likelihoods] = field(default_factory=dict)

    def judge(
        self, asked: Sequence[Judged], on_progress: Progress = lambda done, total: None
    ) -> list[Likelihood]:
        """Judge each sequence; the longest go first, so that want of memory shows."""
        found: list[tuple[int, Likelihood]] = []
        batches = self._batches(asked)
        for done, (program, part) in enumerate(batches, start=1):
            if self.params is None:
                self.params = self.read(program.param_shardings)
            answers = program.of(self.params, [asked[index] for index in part])
            found += zip(part, answers)
            on_progress(done, len(batches))
        return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]

    def padded(self, length: int) -> int:
        """Return a row's tokens in the program for so many: a power of two, or all that
        there may be."""
        power = 1 << (length - 1).bit_length()
        return min(max(power, SHORTEST), self.max_length)

    def _batches(self, asked: Sequence[Judged]) -> list[tuple[Likelihoods, list[int]]]:
        def length(index: int) -> int:
            return len(asked[index].ids) - 1

        order = sorted(range(len(asked)), key=length, reverse=True)
        batches = []
        for padded, alike in itertools.groupby(order, lambda i: self.padded(length(i))):
            if padded not in self._programs:
                self._programs[padded] = self.open_at(padded)
            program, rows = self._programs[padded], list(alike)
            B = program.batch_size
            batches += [
                (program, rows[start : start + B]) for start in range(0, len(rows), B)
            ]
        return batches


def open_likelihoods(
    skeleton: Skeleton, plan: Plan, compute_dtype: str, mesh: Mesh | None = None
) -> Likelihoods:
    """Lower the program that judges a plan's batches, for the devices that are here."""
    mesh = device_mesh(plan) if mesh is None else mesh
    program = lower(
        "likelihood_step",
        likelihood_step(skeleton, compute_dtype=compute_dtype, way=plan.way),
        plan,
        mesh,
        (),
        out_shardings=replicated(mesh),
    )
    return Likelihoods(places=Places(plan=plan, mesh=mesh), program=program)


def likelihood_step(
    skeleton: Skeleton, *, compute_dtype: str, way: Way = PLAIN
) -> Callable[[Params, Batch], jax.Array]:
    """Return (params, batch with weights) -> float32 [B, 2], of each row's tokens with
    weight 1: their nats, and how many are not the model's first choice."""
    job = Job(skeleton, way, how_of(way), compute_dtype)

    def sums(model: Any, features_BTD: jax.Array, batch: Batch) -> jax.Array:
        def part(features_BTD: jax.Array, batch: Batch) -> jax.Array:
            logits_BTV = model.logits(features_BTD)
            losses_BT = token_losses(logits_BTV, batch["targets"])
            is_other_BT = jnp.argmax(logits_BTV, axis=-1) != batch["targets"]
            both_BT2 = jnp.stack([losses_BT, is_other_BT.astype(jnp.float32)], axis=-1)
            return jnp.sum(both_BT2 * batch["weights"][:, :, None], axis=1)

        return in_parts(part, skeleton, features_BTD, batch)

    def judge(params: Params, batch: Batch) -> jax.Array:
        batch = in_token_order(batch)
        if way.mesh.stage > 1:
            return pipelined_sums(job, params, batch, sums)
        model = skeleton.bind(job.cast(params))
        return sums(model, features_of(model, batch, job), batch)

    return judge


def padded_batch(asked: Sequence[Judged], B: int, T: int) -> dict[str, np.ndarray]:
    """Return inputs and targets int32 [B, T]; weights float32, 1 for what is judged.

    Args:
        asked: at most B, of at most T + 1 tokens.
        B: rows of the batch; those that nothing is asked of are all padding.
        T: tokens of a row.
    """
    assert len(asked) <= B, "no more than a batch"
    inputs_BT, targets_BT = np.zeros((2, B, T), np.int32)
    weights_BT = np.zeros((B, T), np.float32)
    for row, one in enumerate(asked):
        known = len(one.ids) - 1
        assert 1 <= one.count <= known <= T, "a judged token has one before it"
        inputs_BT[row, :known] = one.ids[:-1]
        targets_BT[row, :known] = one.ids[1:]
        weights_BT[row, known - one.count : known] = 1.0
    return {"inputs": inputs_BT, "targets": targets_BT, "weights": weights_BT}
