"""Make the least important weights of a model's matrices zero.

K summed inputs, N made outputs, g weights that are compared with each other, G groups
of them. `wanda` (arXiv 2306.11695) takes a weight for as important as its magnitude
times the norm of its input over a text, and compares the weights of an output; the
layers before were pruned already when a layer is measured. `magnitude` is the baseline
of Wanda's own repository (locuslab/wanda, lib/prune.py): no text, and one threshold for
a whole matrix. With a pattern both compare the neighbours among an output's inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.compression.calibrate import Seen, Walk
from llmos_jax.compression.matrices import LAYERS, MATRICES, flat, layer, stacked
from llmos_jax.config.schema import PruneSection
from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Params, Skeleton

Progress = Callable[[int, int], None]
"""Takes layers done and layers in all."""

PATTERNS = {"2:4": 4, "4:8": 8}
"""Pattern -> neighbours of which half stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """A model with zeros among its weights."""

    params: Params
    zeros: dict[str, float]
    """Path of a matrix -> share of its weights that are zero, over all layers."""
    calibration_tokens: int

    @property
    def share(self) -> float:
        """Share of the weights of all these matrices that are zero."""
        sizes = {path: self.params[path].size for path in self.zeros}
        lost = sum(sizes[path] * zeros for path, zeros in self.zeros.items())
        return lost / sum(sizes.values())

    def figures(self) -> dict[str, Any]:
        """As part of the report."""
        return {
            "zeros": self.share,
            "zeros_by_matrix": self.zeros,
            "calibration_tokens": self.calibration_tokens,
        }


def check_prunable(spec: ModelSpec) -> None:
    """Raise ConfigError for a model whose weights pruning does not know."""
    if spec.quantization is not None:
        raise ConfigError(
            f"model {spec.name} is quantized (weights = {spec.quantization.weights}), "
            "and pruning wants floating-point weights. Prune the model that it was "
            "made of, then quantize the result."
        )
    if spec.num_experts:
        raise ConfigError(
            f"model {spec.name} has experts, and this release prunes dense models "
            "only. Quantize it instead: compress.kind=quantize."
        )
    if spec.lora is not None:
        raise ConfigError(
            f"model {spec.name} has LoRA factors; merge them before its weights are "
            "pruned: convert MODEL --to hf --out FOLDER."
        )
    if spec.classes is not None:
        raise ConfigError(
            f"model {spec.name} is a classifier, and pruning measures what is lost by "
            "the next token. Prune the decoder before it is trained to classify."
        )


def check_masks(spec: ModelSpec, asked: PruneSection) -> None:
    """Raise ConfigError where no such zeros can be made in a model."""
    check_prunable(spec)
    if not 0 < asked.sparsity < 1:
        raise ConfigError(
            f"prune.sparsity = {asked.sparsity:g}; it is the share of weights that "
            "become zero and must lie between 0 and 1, for example 0.5."
        )
    if asked.pattern == "unstructured":
        return
    if asked.sparsity != 0.5:
        raise ConfigError(
            f"prune.pattern = {asked.pattern} keeps half of the weights, and "
            f"prune.sparsity = {asked.sparsity:g} asks for another share. Leave "
            "sparsity out, or set prune.pattern=unstructured."
        )
    several = PATTERNS[asked.pattern]
    widths = sorted({spec.embed_dim, spec.ffn_dim, spec.num_heads * spec.head_dim})
    if any(width % several for width in widths):
        raise ConfigError(
            f"prune.pattern = {asked.pattern} wants inputs in groups of {several}, and "
            f"the matrices of {spec.name} have {', '.join(map(str, widths))}. Set "
            "prune.pattern=unstructured."
        )


def mask(
    source: Skeleton,
    params: Params,
    asked: PruneSection,
    batches: Iterable[dict[str, np.ndarray]] = (),
    on_progress: Progress = lambda done, total: None,
) -> Masked:
    """Make weights of all matrices zero.

    Args:
        source: the model, in floating point.
        params: its parameters, on one device; they keep their dtypes.
        asked: by which method, how many, in which pattern.
        batches: of a calibration text, as data.evaluation_batches gives them;
            `magnitude` needs none.
        on_progress: is told of every layer.

    Raises:
        ConfigError: the model cannot be pruned so.
    """
    check_masks(source.spec, asked)
    method: Literal["wanda", "magnitude"] = (
        "magnitude" if asked.method == "magnitude" else "wanda"
    )
    walk = Walk(source, params, batches) if method == "wanda" else None
    layers: list[Params] = []
    for index in range(source.spec.num_layers):
        one = layer(params, index)
        seen = None if walk is None else walk.measure(one, index)
        one = _masked(one, seen, asked.sparsity, asked.pattern)
        if walk is not None:
            walk.go_on(one, index)
        layers.append(one)
        on_progress(index + 1, source.spec.num_layers)
    outer = {path: x for path, x in params.items() if not path.startswith(LAYERS)}
    made = outer | stacked(layers)
    paths = [LAYERS + matrix.path for matrix in MATRICES]
    return Masked(
        params=made,
        zeros={path: float(jnp.mean(made[path] == 0)) for path in paths},
        calibration_tokens=0 if walk is None else walk.num_tokens,
    )


@functools.partial(jax.jit, static_argnames=("sparsity", "pattern"))
def _masked(one: Params, seen: Seen | None, sparsity: float, pattern: str) -> Params:
    """A layer with zeros among its weights."""
    made = dict(one)
    for matrix in MATRICES:
        score_KN = jnp.abs(flat(one[matrix.path], matrix))
        if seen is not None:
            products_KK = seen[matrix.takes].products_KK
            score_KN *= jnp.sqrt(jnp.diagonal(products_KK))[:, None]
        stays_KN = _stays(score_KN, sparsity, pattern, whole=seen is None)
        w = one[matrix.path]
        made[matrix.path] = jnp.where(stays_KN.reshape(w.shape), w, jnp.zeros_like(w))
    return made


def _stays(
    score_KN: jax.Array, sparsity: float, pattern: str, *, whole: bool
) -> jax.Array:
    """bool [K, N]: which weights stay.

    Args:
        score_KN: how important each is.
        sparsity: share that goes; rounded down to whole weights.
        pattern: of those that stay.
        whole: without a pattern, compare all weights of a matrix, not of an output.
    """
    K, N = score_KN.shape
    if pattern in PATTERNS:
        several = PATTERNS[pattern]
        grouped, lost = (K // several, several, N), several // 2
    elif whole:
        grouped, lost = (1, K * N, 1), int(K * N * sparsity)
    else:
        grouped, lost = (1, K, N), int(K * sparsity)
    order_GgN = jnp.argsort(score_KN.reshape(grouped), axis=1, stable=True)
    stays_GgN = jnp.put_along_axis(
        jnp.ones(grouped, bool), order_GgN[:, :lost], False, axis=1, inplace=False
    )
    return stays_GgN.reshape(K, N)
