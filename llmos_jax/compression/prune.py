"""Turn a model into a really smaller one: fewer layers, heads, channels.

B sequences, T tokens. Many shapes have the asked number of parameters. The planner says
what a decode step of each costs; the most promising, of every way to become smaller,
are cut in memory and tried on the calibration text; the one that predicts it best is
the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.compression.cut import Kept, cut, kept, lost
from llmos_jax.compression.importance import Progress, Studied, study
from llmos_jax.compression.masks import check_prunable
from llmos_jax.compression.shapes import Shape, check_shapes, shapes
from llmos_jax.config.schema import PruneSection
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Params, Skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the planner says of a model."""

    bytes_: int | None = None
    """Of its weights as they are served."""
    step_s: float | None = None
    """Of a decode step."""
    problem: str | None = None
    """Why it cannot be served, then without the others."""


TRIED = 2
"""Batches of the calibration text that shapes are tried on, spread over it: 4096 tokens
by default. A judgement: losses of shapes differ by tenths of a nat."""

Predict = Callable[[ModelSpec], Cost]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A shape, and what is known of it."""

    shape: Shape
    kept: Kept
    params: int
    lost: float
    """How much of what counts goes (compression.cut.lost)."""
    cost: Cost
    loss: float | None = None
    """Mean nats a token of the calibration text once it is cut."""

    def to_json(self) -> dict[str, Any]:
        """As a row of the report."""
        step_s, problem = self.cost.step_s, self.cost.problem
        row = asdict(self.shape) | {
            "params": self.params,
            "bytes": self.cost.bytes_,
            "decode_ms": None if step_s is None else 1e3 * step_s,
            "importance_lost": self.lost,
            "loss": self.loss,
        }
        if self.loss is None:
            row["not_tried"] = problem or "others promised more"
        return row

    def explain(self) -> str:
        """In one line."""
        sizes = ", ".join(f"{name} {x}" for name, x in asdict(self.shape).items())
        ms = "" if self.cost.step_s is None else f", {1e3 * self.cost.step_s:.2f} ms"
        loss = "" if self.loss is None else f": loss {self.loss:.3f}"
        return f"{sizes} ({self.params / 1e6:.1f}M{ms}){loss}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A smaller model, and those that it was chosen from."""

    skeleton: Skeleton
    params: Params
    candidates: list[Candidate]
    """The chosen one first, then by loss, then by what they lose."""
    before: Cost
    """Of the whole model."""
    loss_before: float
    """Of the whole model on the calibration text."""
    calibration_tokens: int

    @property
    def chosen(self) -> Candidate:
        """What was made."""
        return self.candidates[0]

    def figures(self) -> dict[str, Any]:
        """As part of the report."""
        best = self.chosen
        return {
            "shape": asdict(best.shape),
            "decode_ms": best.to_json()["decode_ms"],
            "decode_ms_before": self.before.step_s and 1e3 * self.before.step_s,
            "calibration_loss": best.loss,
            "calibration_loss_before": self.loss_before,
            "calibration_tokens": self.calibration_tokens,
            "candidates": [one.to_json() for one in self.candidates],
            "kept": best.kept.explain(),
        }


def prune(
    source: Skeleton,
    params: Params,
    asked: PruneSection,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    multiple: int,
    predict: Predict,
    on_progress: Progress = lambda done, total: None,
    on_candidate: Callable[[Candidate], None] = lambda candidate: None,
) -> Pruned:
    """Make a smaller model.

    Args:
        source: the model, in floating point.
        params: its parameters, on one device; they keep their dtypes.
        asked: share of the parameters, what may shrink, pins.
        batches: of a calibration text, as data.evaluation_batches gives them.
        multiple: of widths.
        predict: what the planner says of a model.
        on_progress: is told of every layer that is studied.
        on_candidate: is shown every shape that was tried.

    Raises:
        ConfigError: the model cannot be pruned so.
    """
    check_prunable(source.spec)
    check_shapes(source.spec, asked)
    found = shapes(source.spec, asked, multiple)
    batches = list(batches)
    some = batches[:: -(-len(batches) // TRIED)]
    studied = study(source, params, batches, on_progress)
    candidates = [_candidate(source.spec, shape, studied, predict) for shape in found]
    tried: list[Candidate] = []
    best: tuple[Skeleton, Params] | None = None
    for candidate in promising(candidates, source.spec, asked.candidates):
        made = cut(source, params, studied, candidate.shape, candidate.kept)
        candidate = replace(candidate, loss=text_loss(*made, some))
        on_candidate(candidate)
        if not tried or _loss(candidate) < min(map(_loss, tried)):
            best = made
        tried.append(candidate)
    assert best is not None, "shapes() gives at least one"
    shown = {candidate.shape for candidate in tried}
    rest = [candidate for candidate in candidates if candidate.shape not in shown]
    return Pruned(
        skeleton=best[0],
        params=best[1],
        candidates=sorted(tried, key=_loss)
        + sorted(rest, key=lambda candidate: candidate.lost),
        before=predict(source.spec),
        loss_before=text_loss(source, params, some),
        calibration_tokens=studied.num_tokens,
    )


def _loss(candidate: Candidate) -> float:
    assert candidate.loss is not None
    return candidate.loss


def _candidate(
    spec: ModelSpec, shape: Shape, studied: Studied, predict: Predict
) -> Candidate:
    made, chosen = shape.of(spec), kept(studied.importance, shape)
    return Candidate(
        shape=shape,
        kept=chosen,
        params=made.num_params,
        lost=lost(studied.importance, chosen),
        cost=predict(made),
    )


def promising(
    candidates: Sequence[Candidate], spec: ModelSpec, count: int
) -> list[Candidate]:
    """The best of every way to become smaller, then the second best, up to `count`.

    A way is which sizes shrink; ways, and the shapes of one, come in the order of how
    little of what counts they lose. Shapes that cannot be served are left out, unless
    none can.
    """
    served = [one for one in candidates if one.cost.problem is None] or candidates
    ways: dict[frozenset[str], list[Candidate]] = {}
    for candidate in sorted(served, key=lambda one: one.lost):
        ways.setdefault(candidate.shape.shrinks(spec), []).append(candidate)
    rounds = zip_longest(*ways.values())
    return [one for some in rounds for one in some if one is not None][:count]


def text_loss(
    skeleton: Skeleton, params: Params, batches: Iterable[dict[str, np.ndarray]]
) -> float:
    """Mean nats a token of a text, in float32."""
    step = _losses(skeleton)
    sums = [step(params, batch) for batch in batches]
    nats, tokens = np.sum([np.asarray(one, np.float64) for one in sums], axis=0)
    return float(nats / tokens)


def _losses(skeleton: Skeleton) -> Callable[[Params, dict[str, np.ndarray]], jax.Array]:
    """(params, batch) -> nats and tokens, float32 [2]; one sequence at a time, so that
    the logits of no more are in memory."""

    def one(model: Any, row: dict[str, jax.Array]) -> jax.Array:
        features_1TD, _ = model.routed_features(
            row["inputs"][None], row["segments"][None] if "segments" in row else None
        )
        logits_TV = model.logits(features_1TD)[0]
        chosen_T = jnp.take_along_axis(logits_TV, row["targets"][:, None], axis=1)[:, 0]
        nats_T = jax.nn.logsumexp(logits_TV, axis=1) - chosen_T
        weights_T = row["weights"].astype(jnp.float32)
        return jnp.stack([jnp.sum(nats_T * weights_T), jnp.sum(weights_T)])

    @jax.jit
    def losses(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        model = skeleton.bind(skeleton.cast(params, "float32"))
        found_B2 = jax.lax.map(functools.partial(one, model), batch)
        return jnp.sum(found_B2, axis=0)

    return losses
