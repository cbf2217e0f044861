"""Score a classifier on labelled texts: accuracy, macro F1, the confusion matrix.

B sequences, C classes. What is summed is a matrix of counts, on the host, so that
figures are exact and the same on any mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmos_jax.data.labelled import LabelledSide, evaluation_rows
from llmos_jax.lowering import fetch
from llmos_jax.models import Params
from llmos_jax.training.scorer import Places, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """What a classifier made of labelled texts."""

    counts: np.ndarray
    """int64 [C, C]: texts by their class and by the class they were taken for."""
    nats: float
    """Sum of -log p of the right class."""

    @property
    def texts(self) -> int:
        """How many were scored."""
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Mean nats per text."""
        return self.nats / self.texts

    @property
    def accuracy(self) -> float:
        """Share of texts taken for what they are."""
        return float(np.trace(self.counts)) / self.texts

    @property
    def f1(self) -> list[float | None]:
        """F1 of each class: 2 right / (texts of it + texts taken for it); None for one
        that no text is of and none was taken for."""
        of, taken = self.counts.sum(axis=1), self.counts.sum(axis=0)
        both = of + taken
        return [
            None if both[c] == 0 else float(2 * self.counts[c, c] / both[c])
            for c in range(len(of))
        ]

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that occur, in texts or in answers (as scikit-learn's
        `f1_score(average="macro")`)."""
        known = [f1 for f1 in self.f1 if f1 is not None]
        return sum(known) / len(known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a classifier says of some texts."""

    index: np.ndarray
    """int64 [n]: which texts."""
    log_probs: np.ndarray
    """float32 [n, C]."""
    labels: np.ndarray
    """int32 [n]; -1 where nobody said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScorer:
    """A program that scores labelled batches, for each of a few lengths."""

    places: Places
    program: Callable[[Params, dict[str, Any]], Any]
    """(params, batch) -> log-probabilities [B, C] on every device."""

    def judged(
        self,
        params: Params,
        side: LabelledSide,
        on_progress: Progress | None = None,
        limit: int | None = None,
    ) -> Iterator[Judged]:
        """Yield what the model says of all texts of a side, batch by batch.

        Every process gets all of them. `limit`: batches at most.
        """
        workload, rows = self.places.plan.workload, self.places.rows
        batches = evaluation_rows(
            side, seq_len=workload.seq_len, batch=workload.global_batch
        )
        done = 0
        for number, whole in enumerate(batches, start=1):
            if limit is not None and number > limit:
                return
            index = whole.pop("index")[:, 0]
            local = {name: x[np.asarray(rows)] for name, x in whole.items()}
            log_probs = fetch(self.program(params, self.places.on_mesh(local, rows)))
            counts = index >= 0
            done += int(counts.sum())
            yield Judged(
                index=index[counts],
                log_probs=np.asarray(log_probs)[counts],
                labels=whole["labels"][:, 0][counts],
            )
            if on_progress is not None:
                on_progress(done, len(side))

    def score(
        self,
        params: Params,
        side: LabelledSide,
        limit: int | None = None,
        on_progress: Progress | None = None,
    ) -> ClassScore:
        """Score all texts of a side whose label is known."""
        return total_class_score(self.judged(params, side, on_progress, limit))


def total_class_score(judged: Iterator[Judged]) -> ClassScore:
    """Add up what a model said of labelled texts."""
    counts, nats = np.zeros((1, 1), np.int64), 0.0
    for part in judged:
        C = part.log_probs.shape[1]
        if len(counts) != C:
            counts = np.zeros((C, C), np.int64)
        is_known = part.labels >= 0
        labels, log_probs = part.labels[is_known], part.log_probs[is_known]
        np.add.at(counts, (labels, np.argmax(log_probs, axis=1)), 1)
        chosen = np.take_along_axis(log_probs, labels[:, None], axis=1)
        nats -= float(chosen.sum(dtype=np.float64))
    return ClassScore(counts=counts, nats=nats)
