"""Top-k, top-p and min-p keep what their definitions and Hugging Face's keep."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.serving.filters import CANDIDATES, Keep, deepest_kept

V = 1000
FILTERS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (CANDIDATES, 0.9, 0.0),
    (CANDIDATES + 1, 1.0, 0.0),
    (600, 0.95, 0.0),
    (V + 5, 1.0, 0.0),
    (0, 0.01, 0.0),
    (0, 0.5, 0.0),
    (0, 0.99, 0.0),
    (40, 0.7, 0.0),
    (0, 1.0, 0.1),
    (300, 0.9, 0.02),
]
STEEPNESS = [0.1, 1.0, 5.0]
"""Of logits: nearly all of 1000 tokens, hundreds, or a few reach top_p."""
search = jax.jit(deepest_kept)


def logits_of(steepness: float, count: int) -> np.ndarray:
    rng = np.random.default_rng(int(steepness * 10))
    return (rng.normal(size=(count, V)) * steepness).astype(np.float32)


def kept_by(logits_BV: np.ndarray, filters: list[tuple[int, float, float]]):
    top_k, top_p, min_p = zip(*filters, strict=True)
    keep = Keep(
        top_k_B=jnp.asarray(top_k, jnp.int32),
        top_p_B=jnp.asarray(top_p, jnp.float32),
        min_p_B=jnp.asarray(min_p, jnp.float32),
    )
    depth_BV = jnp.asarray(logits_BV.max(axis=1, keepdims=True) - logits_BV)
    return np.asarray(depth_BV <= search(depth_BV, keep)[:, None])


def defined(logits_V: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """A token stays if the tokens above it weigh less than the target."""
    weight_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
    above_VV = logits_V[None, :] > logits_V[:, None]
    kept_V = above_VV.sum(axis=1) < (top_k or V)
    weight_V = np.where(kept_V, weight_V, 0)
    before_V = np.where(above_VV, weight_V[None, :], 0).sum(axis=1)
    if top_p < 1:
        kept_V &= before_V < top_p * weight_V.sum()
    return kept_V & (weight_V >= min_p)


@pytest.mark.parametrize("steepness", STEEPNESS)
def test_rows_keep_what_their_own_filters_define(steepness: float) -> None:
    logits_BV = logits_of(steepness, len(FILTERS))
    kept_BV = kept_by(logits_BV, FILTERS)
    for row, filters in enumerate(FILTERS):
        wanted_V = defined(logits_BV[row], *filters)
        np.testing.assert_array_equal(kept_BV[row], wanted_V, err_msg=str(filters))


@pytest.mark.parametrize("steepness", STEEPNESS)
def test_rows_keep_what_hugging_face_keeps(steepness: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits_BV = logits_of(steepness, len(FILTERS))
    kept_BV = kept_by(logits_BV, FILTERS)
    for row, (top_k, top_p, min_p) in enumerate(FILTERS):
        scores = torch.tensor(logits_BV[row : row + 1])
        if top_k:
            scores = transformers.TopKLogitsWarper(top_k)(None, scores)
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
        scores = transformers.MinPLogitsWarper(min_p)(None, scores)
        np.testing.assert_array_equal(kept_BV[row], torch.isfinite(scores)[0].numpy())


@pytest.mark.parametrize("filters", [(3, 1.0, 0.0), (0, 0.3, 0.0), (200, 0.1, 0.0)])
def test_equal_logits_stay_together(filters: tuple[int, float, float]) -> None:
    assert kept_by(np.zeros((1, V), np.float32), [filters]).all()


def test_tokens_that_cannot_be_are_never_kept_by_top_p() -> None:
    logits_BV = np.full((1, V), -np.inf, np.float32)
    logits_BV[0, :300] = 0.0
    kept_V = kept_by(logits_BV, [(0, 0.999, 0.0)])[0]
    np.testing.assert_array_equal(kept_V, np.arange(V) < 300)
