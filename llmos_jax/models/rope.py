"""Rotary position embeddings (RoFormer, arXiv 2104.09864), split-half convention.

B sequences, T tokens, N heads, H head size. Dimension h is paired with h + H/2, as the
Hugging Face weights of the Llama family expect.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from llmos_jax.ir import ModelSpec, RopeScaling


def rotary_angles(position_BT: jax.Array, spec: ModelSpec) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, float32 [B, T, H/2], of every position and frequency."""
    H = spec.head_dim
    frequency_H = spec.rope_theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if spec.rope_scaling is not None:
        frequency_H = _scale(frequency_H, spec.rope_scaling)
    angle_BTH = position_BT[:, :, None].astype(jnp.float32) * frequency_H[None, None, :]
    return jnp.cos(angle_BTH), jnp.sin(angle_BTH)


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each pair of dimensions by its angle; computed in float32."""
    cos_BTNH, sin_BTNH = (part[:, :, None, :] for part in angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [
            first * cos_BTNH - second * sin_BTNH,
            second * cos_BTNH + first * sin_BTNH,
        ],
        axis=-1,
    )
    return rotated.astype(x_BTNH.dtype)


def _scale(frequency_H: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Llama 3.1: slow frequencies divided by `factor`, fast ones kept, a ramp between."""
    wavelength = 2 * math.pi / frequency_H
    low = scaling.original_max_seq_len / scaling.low_freq_factor
    high = scaling.original_max_seq_len / scaling.high_freq_factor
    ramp = scaling.original_max_seq_len / wavelength - scaling.low_freq_factor
    ramp = ramp / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - ramp) * frequency_H / scaling.factor + ramp * frequency_H
    slow = jnp.where(wavelength > low, frequency_H / scaling.factor, between)
    return jnp.where(wavelength < high, frequency_H, slow)
