"""Turn a model in floating point into one whose matrices are in few bits.

K summed inputs, N made outputs, V vocabulary, D model. Layer by layer: what the layer
takes is measured on a text that came through the layers already quantized, its range is
smoothed, its matrices are rounded, and the text goes on through what they became.
Matrices that take the same are rounded as one: outputs do not know of each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.compression.calibrate import Moments, Seen, Walk
from llmos_jax.compression.gptq import gptq
from llmos_jax.compression.matrices import (
    LAYERS,
    MATRICES,
    columns,
    flat,
    layer,
    stacked,
    stored,
)
from llmos_jax.compression.rounding import nearest
from llmos_jax.compression.smooth import smoothed
from llmos_jax.config.schema import CompressSection
from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec, Quantization
from llmos_jax.kernels.int8_matmul.weight import (
    Weight,
    dequantized,
    quantized_table,
)
from llmos_jax.models import Params, Skeleton, skeleton

Errors = dict[str, list[float]]
"""Path of a matrix -> how far it is off in each layer."""

Progress = Callable[[int, int], None]
"""Takes layers done and layers in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """In what a model is to be stored, and how its numbers are found."""

    quantization: Quantization
    method: Literal["nearest", "gptq"] = "nearest"
    smooth: float = 0.0
    """alpha of SmoothQuant; 0 leaves ranges as they are."""
    clip: bool = False
    """Search for the scales that leave the least error of what matrices make."""

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs a text."""
        return self.method == "gptq" or self.smooth > 0 or self.clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A model in few bits, and how far its matrices are from what they were."""

    skeleton: Skeleton
    params: Params
    errors: Errors
    """The norm of the error of what a matrix makes of the calibration text, over the
    norm of what it should make. Without a text: the same of the matrix itself."""
    calibration_tokens: int


def how_of(asked: CompressSection) -> How:
    """What a config asks for."""
    return How(
        quantization=Quantization(
            weights=asked.weights,
            group=asked.group,
            activations=asked.activations,
            embedding=asked.embedding,
            head=asked.head,
        ),
        method=asked.method,
        smooth=asked.smooth,
        clip=asked.weights == "int4" if asked.clip is None else asked.clip,
    )


def quantized_spec(spec: ModelSpec, quantization: Quantization) -> ModelSpec:
    """The model in few bits.

    Raises:
        ConfigError: it is in few bits already, or cannot be stored so.
    """
    if spec.quantization is not None:
        raise ConfigError(
            f"model {spec.name} is quantized already (weights = "
            f"{spec.quantization.weights}). Start from the model that it was made of."
        )
    return replace(spec, quantization=quantization).check()


def quantize(
    source: Skeleton,
    params: Params,
    how: How,
    batches: Iterable[dict[str, np.ndarray]] = (),
    on_progress: Progress = lambda done, total: None,
) -> Quantized:
    """Round all matrices of a model.

    Args:
        source: the model in floating point.
        params: its parameters, in any floating-point dtype, on one device.
        how: to what, and by which method.
        batches: of a calibration text, as data.evaluation_batches gives them.
        on_progress: is told of every layer.

    Raises:
        ConfigError: the model cannot be stored so.
    """
    made = skeleton(quantized_spec(source.spec, how.quantization))
    walk = Walk(source, params, batches) if how.is_calibrated else None
    layers: list[Params] = []
    errors: Errors = {}
    for index in range(source.spec.num_layers):
        one = layer(params, index)
        seen = None if walk is None else walk.measure(one, index)
        if how.smooth and seen is not None:
            one, seen = smoothed(one, seen, source.spec, how.smooth)
        few, floats, off = _rounded(one, seen, how)
        if walk is not None:
            walk.go_on(floats, index)
        layers.append(few)
        for path, error in off.items():
            errors.setdefault(LAYERS + path, []).append(float(error))
        on_progress(index + 1, source.spec.num_layers)
    return Quantized(
        skeleton=made,
        params=_outer(params, how.quantization) | stacked(layers),
        errors=errors,
        calibration_tokens=0 if walk is None else walk.num_tokens,
    )


@functools.partial(jax.jit, static_argnames="how")
def _rounded(
    one: Params, seen: Seen | None, how: How
) -> tuple[Params, Params, dict[str, jax.Array]]:
    """A layer in few bits; the floats that stands for; how far each matrix is off."""
    floats = {path: x.astype(jnp.float32) for path, x in one.items()}
    few, off = dict(floats), dict[str, jax.Array]()
    for takes, group in groupby(MATRICES, lambda matrix: matrix.takes):
        matrices = list(group)
        moments = None if seen is None else seen[takes]
        parts = [flat(one[matrix.path], matrix) for matrix in matrices]
        weight = _weight(jnp.concatenate(parts, axis=1), moments, how)
        start = 0
        for matrix, w_KN in zip(matrices, parts, strict=True):
            shape = few.pop(matrix.path).shape
            part = columns(weight, start, w_KN.shape[1])
            made_KN = dequantized(part)
            few |= stored(part, shape, matrix)
            floats[matrix.path] = made_KN.reshape(shape)
            off[matrix.path] = _error(w_KN, made_KN, moments)
            start += w_KN.shape[1]
    return few, floats, off


def _weight(w_KN: jax.Array, moments: Moments | None, how: How) -> Weight:
    asked = how.quantization
    if moments is None:
        return nearest(w_KN, kind=asked.weights, group=asked.group, clip=how.clip)
    if how.method == "gptq":
        return gptq(
            w_KN,
            moments.products_KK,
            kind=asked.weights,
            group=asked.group,
            clip=how.clip,
        )
    return nearest(
        w_KN,
        jnp.diagonal(moments.products_KK),
        kind=asked.weights,
        group=asked.group,
        clip=how.clip,
    )


def _error(w_KN: jax.Array, made_KN: jax.Array, moments: Moments | None) -> jax.Array:
    """The norm of an error over the norm of what should be."""

    def square(w_KN: jax.Array) -> jax.Array:
        seen_KN = w_KN if moments is None else moments.products_KK @ w_KN
        return jnp.sum(w_KN * seen_KN)

    with jax.default_matmul_precision("highest"):
        return jnp.sqrt(jnp.maximum(square(made_KN - w_KN), 0) / square(w_KN))


def _outer(params: Params, quantization: Quantization) -> Params:
    """What is in no layer: norms as they are, the table and the head as asked for."""
    made: Params = {}
    for path, x in params.items():
        if path.startswith(LAYERS):
            continue
        if path == "embed.table" and quantization.embedding == "int8":
            weight = jax.jit(quantized_table)(x)
        elif path == "head.kernel" and quantization.head == "int8":
            weight = nearest(x.astype(jnp.float32), kind="int8", clip=False)
        else:
            made[path] = x
            continue
        made |= {f"{path}.values": weight.values, f"{path}.scale": weight.scale}
    return made
