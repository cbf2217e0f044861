"""Send a text through a model layer by layer, and measure what its matrices take.

B sequences, T tokens, D model, K summed inputs of a matrix. A pass may change a layer
before the text goes on through it, so that the next layer is measured on what it will
really take. In memory are the activations of all sequences, and one layer in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmos_jax.compression.matrices import LAYERS, MATRICES, layer
from llmos_jax.models import Params, Skeleton, observed_by

OBSERVED = frozenset(matrix.takes for matrix in MATRICES)


class Moments(NamedTuple):
    """What matrices take, over a text."""

    products_KK: jax.Array
    """Sum over tokens of x x', float32."""
    largest_K: jax.Array
    """The largest magnitude of each input, float32."""


Seen = dict[str, Moments]
"""By Matrix.takes."""


class Rows(NamedTuple):
    """Some sequences on their way through the layers."""

    x_BTD: jax.Array
    segment_BT: jax.Array | None
    counts_BT: jax.Array
    """bool; which tokens are measured: padding is not."""


class Walk:
    """A text on its way through a model."""

    def __init__(
        self,
        skeleton: Skeleton,
        params: Params,
        batches: Iterable[dict[str, np.ndarray]],
    ):
        """Look the text up in the table of embeddings.

        Args:
            skeleton: the model, in floating point.
            params: its parameters; those of layers may be changed on the way.
            batches: as data.evaluation_batches gives them.
        """
        self._kinds = skeleton.spec.is_sliding
        self._outer = {
            path: x for path, x in params.items() if not path.startswith(LAYERS)
        }
        self._embed, self._step = _programs(skeleton)
        first = layer(params, 0)
        self.rows = [
            Rows(
                x_BTD=self._embed(self._outer, first, batch["inputs"]),
                segment_BT=_on_device(batch.get("segments")),
                counts_BT=jnp.asarray(batch["weights"] > 0),
            )
            for batch in batches
        ]
        self.num_tokens = int(sum(rows.counts_BT.sum() for rows in self.rows))

    def measure(self, layer: Params, index: int) -> Seen:
        """What the matrices of a layer take.

        Args:
            layer: its parameters, by path without `layers.`.
            index: which it is.
        """
        found = [self._run(layer, index, rows)[1] for rows in self.rows]
        return functools.reduce(_added, found)

    def go_on(self, layer: Params, index: int) -> None:
        """Send the text through a layer."""
        self.rows = [
            rows._replace(x_BTD=self._run(layer, index, rows)[0]) for rows in self.rows
        ]

    def _run(self, layer: Params, index: int, rows: Rows) -> tuple[jax.Array, Seen]:
        alike = len(set(self._kinds)) == 1
        is_sliding = None if alike else jnp.asarray(self._kinds[index])
        found: tuple[jax.Array, Seen] = self._step(self._outer, layer, rows, is_sliding)
        return found


def _on_device(x: np.ndarray | None) -> jax.Array | None:
    return None if x is None else jnp.asarray(x)


@functools.lru_cache(maxsize=4)
def _programs(skeleton: Skeleton) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(outer, layer, tokens) -> x; (outer, layer, rows, is_sliding) -> (x, seen)."""

    def bound(outer: Params, layer: Params) -> Any:
        """The model with a single layer."""
        params = outer | {LAYERS + path: x[None] for path, x in layer.items()}
        return skeleton.bind(skeleton.cast(params, "float32"))

    @jax.jit
    def embed(outer: Params, layer: Params, tokens_BT: jax.Array) -> jax.Array:
        x_BTD: jax.Array = bound(outer, layer).embedded(tokens_BT)
        return x_BTD

    @jax.jit
    def step(
        outer: Params, layer: Params, rows: Rows, is_sliding: jax.Array | None
    ) -> tuple[jax.Array, Seen]:
        seen: Seen = {}

        def observe(name: str, x: jax.Array) -> None:
            if name in OBSERVED and name not in seen:
                seen[name] = _moments(x, rows.counts_BT)

        model = bound(outer, layer)
        graph, state = model.stack
        block = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
        sight = model.sight(rows.x_BTD.shape[:2], None, rows.segment_BT)
        with observed_by(observe):
            x_BTD, _ = block(rows.x_BTD, sight, None, is_sliding)
        return x_BTD, seen

    return embed, step


def _moments(x: jax.Array, counts_BT: jax.Array) -> Moments:
    """Of activations [B, T, *inside]."""
    x_mK = x.reshape(counts_BT.size, -1)
    x_mK = jnp.where(counts_BT.reshape(-1, 1), x_mK, jnp.float32(0))
    return Moments(
        products_KK=jnp.matmul(x_mK.T, x_mK, precision="highest"),
        largest_K=jnp.max(jnp.abs(x_mK), axis=0),
    )


def _added(one: Seen, other: Seen) -> Seen:
    return {
        name: Moments(
            products_KK=one[name].products_KK + other[name].products_KK,
            largest_K=jnp.maximum(one[name].largest_K, other[name].largest_K),
        )
        for name in one
    }
