"""Choose an implementation of rows times a matrix of few bits, and check its arguments.

m rows, K summed inputs, N made outputs, L layers. The target, not this process's
backend, decides (`kernels.target`). The first that suits is picked:

| implementation | where it is picked |
|---|---|
| pallas_tpu | for TPUs from v5e on: K and N at least 512 and fit for its tiles |
| pallas_gpu | for Hopper: tables [N, K], bfloat16 rows that are not quantized |
| xla | everywhere else |

`cpu` is never picked here: it wants matrices that are packed once, not at every call
(`cpu.pack`, `cpu.project`), so whoever keeps them calls it.

A partitioner cannot split a kernel: in a program for many devices call this under
`models.per_shard`.
"""

from __future__ import annotations

from types import ModuleType

import jax
import jax.numpy as jnp

from llmos_jax.errors import LowerError
from llmos_jax.kernels.int8_matmul import cpu, pallas_gpu, pallas_tpu, reference, xla
from llmos_jax.kernels.int8_matmul.reference import Activations
from llmos_jax.kernels.int8_matmul.weight import Weight
from llmos_jax.kernels.target import current_target

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "cpu": cpu,
    "pallas_gpu": pallas_gpu,
    "pallas_tpu": pallas_tpu,
    "reference": reference,
    "xla": xla,
}

_ROWS = (jnp.float32, jnp.bfloat16)


def int8_matmul(
    x_mK: jax.Array,
    w: Weight,
    *,
    activations: Activations = "none",
    transposed: bool = False,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply rows by a matrix of few bits.

    With quantized activations a row x becomes q = x * (most / largest), rounded to the
    nearest even, where most is 127 (int8) or 448 (float8) and largest that of |x|. Sums
    of whole numbers are exact, int32; those of float8 are taken in float32. Then
    y = sum * (largest / most) * scale in float32; with groups, each group's sum is
    multiplied by its scale before they are added.

    Args:
        x_mK: float32 or bfloat16 rows, any number of them.
        w: the matrix.
        activations: what rows become; `int8` with a matrix of int8 or int4, `float8`
            with one of float8, `none` with any.
        transposed: `w.values` is a table [N, K], its scale [N]; never int4 nor grouped.
        layer: int32 scalar. With it `w.values` are those of all layers, with an L in
            front, of which the TPU's kernel reads this one's where they lie: a slice
            would be copied first, for a kernel takes arrays as they are. The scale is
            of this layer alone: next to the values, copying it costs nothing.
        implementation: a name in IMPLEMENTATIONS; None picks the fastest here.

    Returns:
        [m, N] in the dtype of `x_mK`.

    Raises:
        LowerError: activations that do not go with the matrix, or an implementation
            that does not take these arrays.
    """
    m, K = x_mK.shape
    inputs, N = w.values.shape[:-3:-1] if transposed else (w.inputs, w.outputs)
    assert inputs == K, (x_mK.shape, w.values.shape, transposed)
    assert w.values.ndim == (2 if layer is None else 3), (w.values.shape, layer)
    assert w.scale.shape[-1] == N, (w.scale.shape, w.values.shape, transposed)
    assert x_mK.dtype in _ROWS, x_mK.dtype
    assert not transposed or (w.kind != "int4" and w.scale.ndim == 1), w.scale.shape
    if activations != "none" and (activations == "float8") != (w.kind == "float8"):
        fits = "float8" if w.kind == "float8" else "int8"
        raise LowerError(
            f"Weights of {w.kind} cannot be multiplied by activations of "
            f'{activations}. Use activations = "{fits}" or "none".'
        )
    if m == 0:
        return jnp.zeros((0, N), x_mK.dtype)
    name = implementation or _fastest(x_mK, w, activations, transposed)
    y_mN: jax.Array
    if name == "pallas_tpu":
        y_mN = pallas_tpu.int8_matmul(
            x_mK, w, activations=activations, transposed=transposed, layer=layer
        )
        return y_mN
    if layer is not None:
        values = jax.lax.dynamic_index_in_dim(w.values, layer, keepdims=False)
        w = w._replace(values=values)
    y_mN = IMPLEMENTATIONS[name].int8_matmul(
        x_mK, w, activations=activations, transposed=transposed
    )
    return y_mN


def _fastest(
    x_mK: jax.Array, w: Weight, activations: Activations, transposed: bool
) -> str:
    platform = current_target().platform
    if platform == "tpu" and pallas_tpu.suits(x_mK, w, activations, transposed):
        return "pallas_tpu"
    if platform == "gpu" and pallas_gpu.suits(x_mK, w, activations, transposed):
        return "pallas_gpu"
    return "xla"
