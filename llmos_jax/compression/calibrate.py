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
NORMS = ("attention_norm", "attention_out_norm", "ffn_norm", "ffn_out_norm")
"""Of a layer, over D; the second and the fourth with `post_norms` alone."""


class Moments(NamedTuple):
    """What matrices take, over a text."""

    products_KK: jax.Array
    """Sum over tokens of x x', float32."""
    largest_K: jax.Array
    """The largest magnitude of each input, float32."""


Seen = dict[str, Moments]
"""By Matrix.takes."""


class Study(NamedTuple):
    """What a layer does to a text, as sums over its tokens."""

    seen: Seen
    normed: dict[str, jax.Array]
    """Norm -> float32 [D]: the squares of what it gives before its scale."""
    turned: jax.Array
    """1 - cosine of what goes into the layer and what comes out (arXiv 2403.03853)."""


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
        self._embed, self._step, self._final = _programs(skeleton)
        self._first = first = layer(params, 0)
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
        found = [self._run(layer, index, rows)[1].seen for rows in self.rows]
        return functools.reduce(_added, found)

    def study(self, layer: Params, index: int) -> Study:
        """Send the text through a layer, and say all that can be seen of it."""
        found = [self._run(layer, index, rows) for rows in self.rows]
        self.rows = [rows._replace(x_BTD=x) for rows, (x, _) in zip(self.rows, found)]
        studies = [study for _, study in found]
        return Study(
            seen=functools.reduce(_added, [study.seen for study in studies]),
            normed=jax.tree.map(_sum, *[study.normed for study in studies]),
            turned=_sum(*[study.turned for study in studies]),
        )

    def finish(self) -> Study:
        """What the final norm gives, as `head` and `final_norm`, once the text came
        through all layers."""
        found = [self._final(self._outer, self._first, rows) for rows in self.rows]
        return Study(
            seen=functools.reduce(_added, [study.seen for study in found]),
            normed=jax.tree.map(_sum, *[study.normed for study in found]),
            turned=jnp.float32(0),
        )

    def go_on(self, layer: Params, index: int) -> None:
        """Send the text through a layer."""
        self.rows = [
            rows._replace(x_BTD=self._run(layer, index, rows)[0]) for rows in self.rows
        ]

    def _run(self, layer: Params, index: int, rows: Rows) -> tuple[jax.Array, Study]:
        alike = len(set(self._kinds)) == 1
        is_sliding = None if alike else jnp.asarray(self._kinds[index])
        found: tuple[jax.Array, Study] = self._step(
            self._outer, layer, rows, is_sliding
        )
        return found


def _on_device(x: np.ndarray | None) -> jax.Array | None:
    return None if x is None else jnp.asarray(x)


@functools.lru_cache(maxsize=4)
def _programs(skeleton: Skeleton) -> tuple[Callable[..., Any], ...]:
    """(outer, layer, tokens) -> x; (outer, layer, rows, is_sliding) -> (x, study);
    (outer, layer, rows) -> study of the final norm."""

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
    ) -> tuple[jax.Array, Study]:
        seen: Seen = {}
        normed: dict[str, jax.Array] = {}

        def observe(name: str, x: jax.Array) -> None:
            if name in OBSERVED and name not in seen:
                seen[name] = _moments(x, rows.counts_BT)

        model = bound(outer, layer)
        graph, state = model.stack
        block = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
        for name in NORMS:
            norm = getattr(block, name)
            if norm is not None:
                setattr(block, name, _watched(norm, name, normed, rows.counts_BT))
        sight = model.sight(rows.x_BTD.shape[:2], None, rows.segment_BT)
        with observed_by(observe):
            x_BTD, _ = block(rows.x_BTD, sight, None, is_sliding)
        turned = jnp.where(rows.counts_BT, 1 - _cosine(rows.x_BTD, x_BTD), 0.0)
        return x_BTD, Study(seen, normed, jnp.sum(turned))

    @jax.jit
    def final(outer: Params, layer: Params, rows: Rows) -> Study:
        normed: dict[str, jax.Array] = {}
        norm = bound(outer, layer).final_norm
        watched = _watched(norm, "final_norm", normed, rows.counts_BT)
        seen = {"head": _moments(watched(rows.x_BTD), rows.counts_BT)}
        return Study(seen, normed, jnp.float32(0))

    return embed, step, final


def _watched(
    norm: Any, name: str, normed: dict[str, jax.Array], counts_BT: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """A norm that tells the squares of what it gives before its scale."""

    def watch(x_BTD: jax.Array) -> jax.Array:
        square_BTD = jnp.square(x_BTD)
        mean_BT1 = jnp.mean(square_BTD, axis=-1, keepdims=True) + norm.epsilon
        share_BTD = jnp.where(counts_BT[..., None], square_BTD / mean_BT1, 0.0)
        normed[name] = jnp.sum(share_BTD, axis=(0, 1))
        given_BTD: jax.Array = norm(x_BTD)
        return given_BTD

    return watch


def _cosine(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """Of each token."""
    product = jnp.sum(x_BTD * y_BTD, axis=-1)
    norms = jnp.linalg.norm(x_BTD, axis=-1) * jnp.linalg.norm(y_BTD, axis=-1)
    return product / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def _moments(x: jax.Array, counts_BT: jax.Array) -> Moments:
    """Of activations [B, T, *inside]."""
    x_mK = x.reshape(counts_BT.size, -1)
    x_mK = jnp.where(counts_BT.reshape(-1, 1), x_mK, jnp.float32(0))
    return Moments(
        products_KK=jnp.matmul(x_mK.T, x_mK, precision="highest"),
        largest_K=jnp.max(jnp.abs(x_mK), axis=0),
    )


def _sum(*parts: jax.Array) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _added(one: Seen, other: Seen) -> Seen:
    return {
        name: Moments(
            products_KK=one[name].products_KK + other[name].products_KK,
            largest_K=jnp.maximum(one[name].largest_K, other[name].largest_K),
        )
        for name in one
    }
