"""Ask a model for its logits on a few lines of text: the same before and after.

B sequences, T tokens, V vocabulary. A conversion that loads, runs and answers otherwise
is the one that nobody notices (a rotation not permuted, a norm without its 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.data import Tokenizer
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.models import Params, Skeleton

TEXT = (
    "The committee met on a rainy Tuesday in March 1987 and, after three hours, agreed "
    "on nothing: 14 members wanted a bridge, 9 a ferry. def area(w, h): return w * h. "
    "Und wer nicht fragt, bleibt dumm. The capital of France is Paris; that of Japan is"
)
"""Prose, numbers, code and another language: what tokens of many kinds come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How near the logits of two models are."""

    tokens: int
    max_difference: float
    """Of any logit."""
    largest: float
    """Of the first one's logits, without its sign."""
    same_top1: float
    """Share of tokens after which both would say the same."""


def probe(
    skeleton: Skeleton, params: Params, tokenizer: Tokenizer, dtype: str
) -> np.ndarray:
    """Return float32 logits [T, V] of TEXT.

    Args:
        skeleton: the model.
        params: whole, on the CPU.
        tokenizer: the model's.
        dtype: to compute in: the same for two models that are to be compared.
    """
    ids = tokenizer.encode_prompt(TEXT)[: skeleton.spec.max_seq_len]

    @jax.jit
    def logits(params: Params, tokens_BT: jax.Array) -> jax.Array:
        model = skeleton.bind(skeleton.cast(params, dtype))
        logits_BTV: jax.Array = model(tokens_BT)
        return logits_BTV.astype(jnp.float32)

    with lowered_for(Target("cpu", 1)):
        return np.asarray(logits(params, ids[None].astype(np.int32))[0])


def likeness(one: np.ndarray, other: np.ndarray) -> Likeness:
    """Compare two models' logits [T, V]; rows that pad a vocabulary are left out."""
    V = min(one.shape[1], other.shape[1])
    one, other = one[:, :V], other[:, :V]
    same = one.argmax(axis=1) == other.argmax(axis=1)
    return Likeness(
        tokens=len(one),
        max_difference=float(np.abs(one - other).max()),
        largest=float(np.abs(one).max()),
        same_top1=float(same.mean()),
    )
