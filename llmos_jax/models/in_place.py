"""Let a loop over layers read few-bit matrices where they lie, not a slice of each.

A kernel takes arrays as they are, so XLA writes a layer's slice out before it, and the
bytes of weights are what decoding costs: one layer of Llama 3 8B for v5e, by XLA's own
estimate, spends 2.9 million cycles on slices, and 0.6 million with what is here.

L layers.
"""

from __future__ import annotations

import jax
from flax import nnx

from llmos_jax.kernels.target import current_target
from llmos_jax.models.annotate import mesh_axes_of
from llmos_jax.models.weight import QuantizedWeight

_TILE_ROWS = 32
"""Of a TPU's tile of bytes. Dimensions that fill whole ones may be merged for free."""


def left_whole(graph: nnx.GraphDef, state: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Part what a loop over stacked layers leaves whole from what it slices.

    Args:
        graph: of the layers.
        state: of the layers, with an L in front of each array.

    Returns:
        Values of quantized matrices, for `at_layer`; all else.
    """
    stacked = nnx.iter_modules(nnx.merge(graph, state))
    paths = {
        (*path, "values")
        for path, module in stacked
        if isinstance(module, QuantizedWeight) and _is_read_in_place(module)
    }
    whole, sliced = nnx.split_state(state, lambda path, _: path in paths, ...)
    return whole, sliced


def at_layer(block: nnx.Module, layer: jax.Array) -> None:
    """Tell the matrices of a block whose values are those of all layers which it is."""
    for _, module in nnx.iter_modules(block):
        if isinstance(module, QuantizedWeight):
            is_stacked = module.values.ndim > len(module.inside + module.outside)
            module.layer = layer if is_stacked else None


def _is_read_in_place(stacked: QuantizedWeight) -> bool:
    """Whether a kernel reads one layer of a stack of matrices where it lies.

    TPUs' does; a slice would be copied for it, and nothing computed meanwhile. But
    dimensions that it sees as one must lie in memory as one: those of several outputs
    (heads and what each has) do not, and are moved layer by layer. And a device must
    hold what it multiplies: what is gathered for use is so layer by layer, too.
    """
    if current_target().platform != "tpu" or len(stacked.outside) > 1:
        return False
    layers, *sizes = stacked.values.shape
    axes = (*stacked.inside, *stacked.outside)
    is_flat = len(stacked.inside) == 1 or sizes[-2] % _TILE_ROWS == 0
    is_here = not mesh_axes_of("layers", layers, stored=True) and all(
        mesh_axes_of(str(axis), size, stored=True) == mesh_axes_of(str(axis), size)
        for axis, size in zip(axes, sizes, strict=True)
    )
    return is_flat and is_here
