"""Angles of rotary position embeddings (RoFormer, arXiv 2104.09864).

B sequences, T tokens, H head size. Dimension h is paired with h + H/2, as the Hugging
Face weights of the Llama family expect; kernels/attention does the rotating.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from llmos_jax.ir import ModelSpec, RopeScaling


def rotary_angles(
    position_BT: jax.Array, spec: ModelSpec
) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, float32 [B, T, H/2], of every position and frequency."""
    frequency_H = _frequencies(spec.rope_theta, spec.head_dim)
    if spec.rope_scaling is not None:
        frequency_H = _scale(frequency_H, spec.rope_scaling)
    return _angles(position_BT, frequency_H)


def local_angles(
    position_BT: jax.Array, spec: ModelSpec
) -> tuple[jax.Array, jax.Array] | None:
    """The same for sliding layers, where they rotate otherwise; else None."""
    if spec.local_rope_theta is None:
        return None
    return _angles(position_BT, _frequencies(spec.local_rope_theta, spec.head_dim))


def _frequencies(theta: float, H: int) -> jax.Array:
    return theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)


def _angles(
    position_BT: jax.Array, frequency_H: jax.Array
) -> tuple[jax.Array, jax.Array]:
    angle_BTH = position_BT[:, :, None].astype(jnp.float32) * frequency_H[None, None, :]
    return jnp.cos(angle_BTH), jnp.sin(angle_BTH)


def _scale(frequency_H: jax.Array, scaling: RopeScaling) -> jax.Array:
    """linear: divide all frequencies by `factor`. llama3: divide slow ones, keep fast
    ones, ramp between."""
    if scaling.kind == "linear":
        return frequency_H / scaling.factor
    wavelength = 2 * math.pi / frequency_H
    low = scaling.original_max_seq_len / scaling.low_freq_factor
    high = scaling.original_max_seq_len / scaling.high_freq_factor
    ramp = scaling.original_max_seq_len / wavelength - scaling.low_freq_factor
    ramp = ramp / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - ramp) * frequency_H / scaling.factor + ramp * frequency_H
    slow = jnp.where(wavelength > low, frequency_H / scaling.factor, between)
    return jnp.where(wavelength < high, frequency_H, slow)
