"""The matrices that every layer has, and what they are as they will be stored.

K summed inputs, N made outputs, L layers. Passes over a model and training for few bits
see every matrix as [K, N], whatever heads it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llmos_jax.ir import Quantization
from llmos_jax.kernels.int8_matmul.weight import nearest_numbers, nearest_table

LAYERS = "layers."
"""What the paths of stacked parameters begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One of the matrices that every layer has."""

    path: str
    """Without `layers.` before it."""
    takes: str
    """What goes in, by the name that models/project.py calls the product of; matrices
    that take the same share one."""
    contract: int = 1
    """How many of its dimensions are inputs."""


MATRICES = (
    Matrix(path="attention.q", takes="query"),
    Matrix(path="attention.k", takes="query"),
    Matrix(path="attention.v", takes="query"),
    Matrix(path="attention.o", takes="out", contract=2),
    Matrix(path="ffn.gate", takes="ffn_gate"),
    Matrix(path="ffn.up", takes="ffn_gate"),
    Matrix(path="ffn.down", takes="ffn_out"),
)
"""In the order in which a token meets them."""

MATRIX_PATHS = frozenset(LAYERS + matrix.path for matrix in MATRICES)


def flat(w: jax.Array, matrix: Matrix) -> jax.Array:
    """A matrix of one layer as float32 [K, N]."""
    K = math.prod(w.shape[: matrix.contract])
    return w.astype(jnp.float32).reshape(K, -1)


def as_stored(
    params: dict[str, jax.Array], quantization: Quantization
) -> dict[str, jax.Array]:
    """The parameters that a model has after `compress` with compress.method=nearest and
    compress.clip=false, bit for bit, as float32 of the same shapes and paths.

    Args:
        params: of a model in floating point, its layers stacked.
        quantization: to what they will be rounded.
    """
    made = dict(params)
    kind, group = quantization.weights, quantization.group
    for matrix in MATRICES:
        path = LAYERS + matrix.path

        def one(w: jax.Array, matrix: Matrix = matrix) -> jax.Array:
            return nearest_numbers(flat(w, matrix), kind, group).reshape(w.shape)

        made[path] = jax.vmap(one)(params[path])
    if quantization.embedding == "int8":
        made["embed.table"] = nearest_table(params["embed.table"])
    if quantization.head == "int8" and "head.kernel" in params:
        made["head.kernel"] = nearest_numbers(params["head.kernel"], "int8")
    return made
