"""Rows times a matrix in few bits on one CPU: fused C++ on a matrix packed once.

m rows, K summed inputs, N made outputs, G groups, L layers.

`pack` lays a matrix out for `cpu.cc`, which describes how; `project` multiplies, with
RMSNorm before and bias, gate and residual after. Products are of whole numbers: with
`activations = "int8"` a row has 8 bits, and sums are those of XLA, bit for bit; with
"none" a row has as many bits as an int32 sum of its products holds, 15 of a group of
1,000 inputs or 13 of 4,096, where bfloat16 has 8. A row's result does not depend on the
rows beside it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.errors import LowerError
from llmos_jax.kernels import native
from llmos_jax.kernels.int8_matmul.weight import Kind, Weight
from llmos_jax.kernels.target import Target, current_target

_SOURCE = Path(__file__).with_suffix(".cc")
_TARGET = "llmos_int8_project"
_ADD_NORMED = "llmos_int8_add_normed"

PANEL = 32
"""Outputs that are packed together (cpu.cc)."""
MOST_INPUTS = 4096
"""Inputs under one int32 sum: leaves activations 13 bits. Wider matrices are summed in
parts, as if they had groups."""

_LARGEST_ROW = 256 * 127 + 127
"""The largest number of a row: what two int8 hold (cpu.cc, tiles)."""

Gate = Literal["none", "silu", "gelu_tanh"]
_GATES: dict[Gate, int] = {"none": 0, "silu": 1, "gelu_tanh": 2}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("panels", "scale", "group_scale"),
    meta_fields=("inputs", "outputs", "kind", "group", "gate"),
)
@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A matrix of every layer, in the order that the kernel reads."""

    panels: jax.Array
    """uint8 [L, bytes]."""
    scale: jax.Array
    """float32 [L, N], N padded to whole panels; of each output."""
    group_scale: jax.Array
    """bfloat16 as uint16 [L, panels G PANEL]; of each group, or empty."""
    inputs: int
    outputs: int
    """What a row becomes: of a gated pair, the outputs of one."""
    kind: Kind
    group: int
    """Inputs that share a scale; 0: all."""
    gate: Gate

    def limit(self, activations: str) -> float:
        """The largest whole number that an activation becomes."""
        if activations == "int8":
            return 127.0
        summed = self.group or self.inputs
        largest = 8 if self.kind == "int4" else 127
        return float(min(_LARGEST_ROW, (2**31 - 1) // (largest * summed)))


def pack(
    weights: list[tuple[np.ndarray, np.ndarray]], *, kind: Kind, gate: Gate = "none"
) -> Packed:
    """Lay out one matrix of every layer.

    Args:
        weights: for each layer, `values` and `scale` as Weight has them, on the host.
            With a gate, the outputs of the gate come first and those that it opens,
            as many, after them.
        kind: int8 or int4.
        gate: what the first half of the outputs goes through.

    Raises:
        LowerError: a kind that the kernel does not know.
    """
    if kind == "float8":
        raise LowerError("CPUs have no float8 product. Use int8, or int4 in groups.")
    values, scale = weights[0]
    inputs = values.shape[0] * (2 if kind == "int4" else 1)
    made = values.shape[1]
    group = 0 if scale.ndim == 1 else inputs // scale.shape[0]
    if not group and kind == "int4":
        group = inputs  # the kernel knows int4 in groups only
    if not group and inputs > MOST_INPUTS:
        group = MOST_INPUTS
    laid = [_laid(one, of, kind=kind, gate=gate, group=group) for one, of in weights]
    panels, scales, group_scales = (np.stack(part) for part in zip(*laid, strict=True))
    return Packed(
        panels=jnp.asarray(panels),
        scale=jnp.asarray(scales),
        group_scale=jnp.asarray(group_scales),
        inputs=inputs,
        outputs=made // (1 if gate == "none" else 2),
        kind=kind,
        group=group,
        gate=gate,
    )


def _laid(
    values: np.ndarray, scale: np.ndarray, *, kind: Kind, gate: Gate, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One layer's bytes, output scales and group scales."""
    order = _order(values.shape[1], gate)
    panels = len(order) // PANEL
    is_real = order >= 0
    if kind == "int4":
        # One byte holds inputs 2j and 2j + 1; a line wants pairs 2j and 2j + 1.
        nibbles = np.stack([values & 15, values >> 4], axis=1)
        numbers = nibbles.reshape(-1, values.shape[1])
    else:
        numbers = values.view(np.uint8)
    numbers = np.where(is_real, numbers[:, order], np.uint8(8 if kind == "int4" else 0))
    pairs = -(-len(numbers) // 2)
    pairs += pairs % 2 if kind == "int4" else 0
    padding = ((0, 2 * pairs - len(numbers)), (0, 0))
    numbers = np.pad(numbers, padding, constant_values=8 if kind == "int4" else 0)
    by_panel = numbers.reshape(pairs, 2, panels, PANEL).transpose(2, 0, 3, 1)
    lines = by_panel.reshape(panels, pairs, 2 * PANEL)
    if kind == "int4":
        lines = lines[:, 0::2] | (lines[:, 1::2] << 4)
    ones = np.ones(len(order), np.float32)
    if scale.ndim == 1:
        outputs = np.where(is_real, scale.astype(np.float32)[order], ones)
        groups = -(-len(numbers) // group) if group else 0
        of_groups = np.ones((groups, len(order)), np.float32)
    else:
        outputs = ones
        of_groups = np.where(is_real, scale.astype(np.float32)[:, order], ones)
    bits = of_groups.view(np.uint32) >> 16  # bfloat16 numbers: nothing is lost
    halves = bits.astype(np.uint16).reshape(-1, panels, PANEL).transpose(1, 0, 2)
    return lines.reshape(-1), outputs, halves.reshape(-1)


def _order(made: int, gate: Gate) -> np.ndarray:
    """Which output stands at each place of the panels; -1: none."""
    if gate == "none":
        return np.pad(np.arange(made), (0, -made % PANEL), constant_values=-1)
    half = PANEL // 2
    first = np.pad(np.arange(made // 2), (0, -(made // 2) % half), constant_values=-1)
    both = np.stack([first, np.where(first < 0, -1, first + made // 2)])
    return both.reshape(2, -1, half).transpose(1, 0, 2).reshape(-1)


def project(
    x_mK: jax.Array,
    w: Packed,
    layer: jax.Array,
    *,
    activations: str = "none",
    norm_LK: jax.Array | None = None,
    epsilon: float = 0.0,
    bias_LN: jax.Array | None = None,
    residual_mN: jax.Array | None = None,
) -> jax.Array:
    """residual + gate(norm(x) W + bias), of one layer.

    Args:
        x_mK: float32 rows.
        w: of all layers.
        layer: int32 scalar.
        activations: `int8`, or `none` for as many bits as fit.
        norm_LK: what rows are multiplied with after x / rms(x); None: no norm.
        epsilon: of the norm.
        bias_LN: added to each row; not with a gate.
        residual_mN: added to what is made.

    Returns:
        float32 [m, w.outputs].

    Raises:
        LowerError: the kernel cannot be built here, and why.
    """
    reason = unavailable()
    if reason is not None:
        raise LowerError(f"the CPU int8 kernel cannot be used: {reason}.")
    m, K = x_mK.shape
    L = w.panels.shape[0]
    assert w.inputs == K, (x_mK.shape, w.inputs)
    assert bias_LN is None or w.gate == "none", "a gated pair has no bias"
    none_L0 = jnp.zeros((L, 0), jnp.float32)
    made = jax.ShapeDtypeStruct((m, w.outputs), jnp.float32)
    y: jax.Array = jax.ffi.ffi_call(_TARGET, made)(
        *(x_mK, none_L0 if norm_LK is None else norm_LK),
        *(w.panels, w.scale, w.group_scale),
        none_L0 if bias_LN is None else bias_LN,
        jnp.zeros((m, 0), jnp.float32) if residual_mN is None else residual_mN,
        layer.reshape(1),
        epsilon=np.float32(epsilon),
        limit=np.float32(w.limit(activations)),
        group=np.int64(w.group),
        four_bits=w.kind == "int4",
        gate=np.int32(_GATES[w.gate]),
    )
    return y


def add_normed(
    x_mK: jax.Array,
    norm_LK: jax.Array,
    residual_mK: jax.Array,
    layer: jax.Array,
    epsilon: float,
) -> jax.Array:
    """residual + x / rms(x) * norm of one layer: the same bits for a row whatever the
    rows beside it, which XLA's sums do not promise."""
    y: jax.Array = jax.ffi.ffi_call(_ADD_NORMED, residual_mK)(
        *(x_mK, norm_LK, residual_mK, layer.reshape(1)), epsilon=np.float32(epsilon)
    )
    return y


def int8_matmul(
    x_mK: jax.Array,
    w: Weight,
    *,
    activations: str = "none",
    transposed: bool = False,
) -> jax.Array:
    """See `api.int8_matmul`; packs the matrix at every call, so for tests only."""
    values, scale = np.asarray(w.values), np.asarray(w.scale, np.float32)
    layer = (values.T if transposed else values, scale)
    packed = pack([layer], kind=w.kind)
    return project(x_mK, packed, jnp.int32(0), activations=activations)


def suits() -> bool:
    """Whether the kernel, if it can be built, is for the target of lowering."""
    return current_target() == Target("cpu", 1) and jax.default_backend() == "cpu"


@functools.cache
def unavailable() -> str | None:
    """Compile and register the kernel if need be; return why it cannot be, or None.

    Raises:
        ConfigError: LLMOS_CPU_KERNELS is neither 0 nor 1.
    """
    return native.register(_SOURCE, (_TARGET, _ADD_NORMED))
