"""The matrices of a layer: where they lie, what goes into them, how they become flat.

L layers, K summed inputs, N made outputs, G groups of inputs. Passes see every matrix
as [K, N], whatever heads it has.
"""

from __future__ import annotations

import jax.numpy as jnp

from llmos_jax.kernels.int8_matmul.weight import Weight
from llmos_jax.models import Params
from llmos_jax.models.matrices import LAYERS as LAYERS
from llmos_jax.models.matrices import MATRICES as MATRICES
from llmos_jax.models.matrices import Matrix as Matrix
from llmos_jax.models.matrices import flat as flat


def stored(weight: Weight, shape: tuple[int, ...], matrix: Matrix) -> Params:
    """What a layer keeps of a quantized matrix: `values` and `scale`.

    Args:
        weight: flat.
        shape: of the matrix of one layer, [*inside, *outside].
        matrix: which.
    """
    inside, outside = shape[: matrix.contract], shape[matrix.contract :]
    if weight.kind == "int4":
        inside = (*inside[:-1], inside[-1] // 2)
    return {
        f"{matrix.path}.values": weight.values.reshape(*inside, *outside),
        f"{matrix.path}.scale": weight.scale.reshape(
            *weight.scale.shape[:-1], *outside
        ),
    }


def layer(params: Params, index: int) -> Params:
    """The parameters of one layer, by path without `layers.`."""
    return {
        path.removeprefix(LAYERS): x[index]
        for path, x in params.items()
        if path.startswith(LAYERS)
    }


def stacked(layers: list[Params]) -> Params:
    """The parameters of all layers, by their whole paths."""
    return {
        LAYERS + path: jnp.stack([one[path] for one in layers]) for path in layers[0]
    }


def columns(weight: Weight, start: int, count: int) -> Weight:
    """Some of the outputs of a flat matrix."""
    chosen = slice(start, start + count)
    return Weight(weight.values[:, chosen], weight.scale[..., chosen])
