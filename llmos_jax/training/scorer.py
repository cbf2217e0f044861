"""Score text with a model in place, or two models against each other.

B sequences, T tokens, V vocabulary. Nothing here needs a training state: what a plan
for prefill gives is enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llmos_jax.data import TokenStream, evaluation_batches, num_evaluation_batches
from llmos_jax.errors import ConfigError
from llmos_jax.ir import Plan
from llmos_jax.lowering import (
    Program,
    batch_sharding,
    device_mesh,
    fetch,
    global_array,
    local_rows,
    lower,
    param_shardings,
    replicated,
)
from llmos_jax.models import Params, Skeleton
from llmos_jax.training.evaluate import Score, compare_step, score_step, total_score
from llmos_jax.training.step import Batch

Progress = Callable[[int, int], None]
"""Takes batches done and batches in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the rows of a plan's batches go."""

    plan: Plan
    mesh: Mesh

    @property
    def rows(self) -> list[int]:
        """Rows of each global batch that this process reads."""
        shape = (self.plan.workload.global_batch, self.plan.workload.seq_len)
        return local_rows(batch_sharding(self.plan, self.mesh), shape)

    def on_mesh(self, local: dict[str, Any], rows: list[int]) -> Batch:
        """Global device arrays of the rows that this process read."""
        sharding = batch_sharding(self.plan, self.mesh)
        count = self.plan.workload.global_batch
        return {
            name: global_array(value, rows, sharding, count)
            for name, value in local.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How a text is cut to be scored."""

    stride: int | None = None
    """Tokens from one window to the next; None: they lie end to end."""
    begin_id: int | None = None
    """What every window begins with, where the model wants a mark there."""
    document_mask: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A program that scores batches, and how to cut texts for it."""

    places: Places
    program: Program
    """(params, ..., batch with weights) -> sums."""
    windows: Windows

    def sums(
        self,
        tokens: TokenStream,
        *params: Params,
        limit: int | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield what the program makes of each batch of a text.

        Args:
            tokens: the text.
            params: of each model.
            limit: batches, spread over the text; None: all.
            on_progress: is told of every batch.
        """
        workload, rows = self.places.plan.workload, self.places.rows
        shape: dict[str, Any] = {
            "seq_len": workload.seq_len,
            "batch": workload.global_batch,
            "limit": limit,
            "stride": self.windows.stride,
        }
        total = num_evaluation_batches(tokens, **shape)
        found = evaluation_batches(
            tokens,
            rows=rows,
            begin_id=self.windows.begin_id,
            document_mask=self.windows.document_mask,
            **shape,
        )
        for done, batch in enumerate(found, start=1):
            made = self.program(*params, self.places.on_mesh(batch, rows))
            yield fetch(made)
            if on_progress is not None:
                on_progress(done, total)

    def score(
        self,
        params: Params,
        tokens: TokenStream,
        limit: int | None = None,
        on_progress: Progress | None = None,
    ) -> Score:
        """Score a text, all of it or `limit` batches spread over it."""
        return total_score(
            self.sums(tokens, params, limit=limit, on_progress=on_progress)
        )

    @property
    def param_shardings(self) -> dict[str, Any]:
        """Parameter path -> sharding on this mesh."""
        return param_shardings(self.places.plan, self.places.mesh)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a model's predictions are from a reference's, over a text."""

    kld: float
    """Mean over tokens of KL(reference || model), in nats."""
    same_top1: float
    """Share of tokens after which both would say the same."""
    score: Score
    """The model's."""
    reference: Score


def open_scorer(
    skeleton: Skeleton,
    plan: Plan,
    compute_dtype: str,
    windows: Windows,
    mesh: Mesh | None = None,
) -> Scorer:
    """Lower the program that scores a plan's batches, for the devices that are here."""
    step = score_step(skeleton, compute_dtype=compute_dtype, way=plan.way)
    return _lowered("score_step", step, plan, windows, mesh)


def open_comparison(
    skeleton: Skeleton,
    reference: Skeleton,
    plan: Plan,
    compute_dtype: str,
    windows: Windows,
) -> Scorer:
    """Lower the program that compares two models on a plan's batches; its `sums` take
    the parameters of both.

    Raises:
        ConfigError: the plan is a pipeline, which would need two.
    """
    if plan.mesh.stage > 1:
        raise ConfigError(
            f"evaluate.against cannot run on stage={plan.mesh.stage}: two models are "
            "two pipelines. Set plan.mesh.stage=1."
        )
    step = compare_step(skeleton, reference, compute_dtype=compute_dtype, way=plan.way)
    return _lowered("compare_step", step, plan, windows, None)


def _lowered(
    name: str,
    step: Callable[..., Any],
    plan: Plan,
    windows: Windows,
    mesh: Mesh | None,
) -> Scorer:
    mesh = device_mesh(plan) if mesh is None else mesh
    program = lower(name, step, plan, mesh, (), out_shardings=replicated(mesh))
    return Scorer(places=Places(plan=plan, mesh=mesh), program=program, windows=windows)


def distance(sums: Iterator[np.ndarray]) -> Distance:
    """Add up what `compare_step` gave for each batch, in float64."""
    kld, tokens, same, nats, right, their_nats, their_right = np.sum(
        [np.asarray(part, np.float64) for part in sums], axis=0
    )
    return Distance(
        kld=float(kld / tokens),
        same_top1=float(same / tokens),
        score=Score(nats=float(nats), tokens=int(tokens), correct=int(right)),
        reference=Score(
            nats=float(their_nats), tokens=int(tokens), correct=int(their_right)
        ),
    )


def said_now_and_then(
    say: Callable[[str], None],
    what: str,
    every_s: float = 10.0,
    things: str = "batches",
) -> Progress:
    """A Progress that writes a line every few seconds, and none for short work."""
    began = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every_s or done == total:
            return
        last = now
        left = math.ceil((now - began) / done * (total - done))
        say(f"{what}: {done} of {total} {things}, {left} s left")

    return tell
