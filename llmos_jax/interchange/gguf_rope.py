"""Llama 3's slowed rotations, which GGUF keeps as one divisor per frequency.

The formula is Meta's (llama-models, `apply_scaling`, 2024-07): a frequency whose wave
is longer than original / low_freq_factor positions is divided by `factor`, one shorter
than original / high_freq_factor is kept, and between them 1 / divisor goes linearly
from 1 / factor to 1. Only two of the three numbers original, low and high can be read
off the divisors, since scaling all three alike changes nothing: the original length is
taken from the metadata, or 8192 (Llama 3.1, 3.2, 3.3), and the rest follows.

Letters: H head_dim.
"""

from __future__ import annotations

import numpy as np

from llmos_jax.ir import RopeScaling

_RELATIVE = 1e-5
"""Divisors are float32, and writers sum in float32 too."""
_PUBLISHED_LENGTH = 8192
_DIGITS = 4
"""To which low and high factors are rounded; the result is held against the file."""


def rope_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Return by what each frequency is divided, float32 [H / 2]."""
    frequencies = _frequencies(theta, head_dim)
    turns = scaling.original_max_seq_len * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - kept) / scaling.factor + kept)).astype(np.float32)


def scaling_of_divisors(
    divisors: np.ndarray, theta: float, original: int | None
) -> RopeScaling | None:
    """Return the scaling that gives these divisors; None if Llama 3's form does not.

    Args:
        divisors: [H / 2].
        theta: base of the frequencies.
        original: context of the first training, if the file says it.
    """
    head_dim = 2 * divisors.size
    factor = float(divisors.max())
    length = original or _PUBLISHED_LENGTH
    plain = RopeScaling(factor=factor, original_max_seq_len=length)
    for scaling in (plain, _fitted(divisors, theta, factor, length)):
        if scaling is None or scaling.high_freq_factor <= scaling.low_freq_factor:
            continue
        again = rope_divisors(scaling, theta, head_dim)
        if np.allclose(again, divisors, rtol=_RELATIVE, atol=0.0):
            return scaling
    return None


def _fitted(
    divisors: np.ndarray, theta: float, factor: float, length: int
) -> RopeScaling | None:
    """Solve for low and high where divisors lie between 1 and `factor`."""
    between = (divisors > 1 + _RELATIVE) & (divisors < factor * (1 - _RELATIVE))
    if between.sum() < 2:
        return None
    kept = (1 / divisors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    frequencies = _frequencies(theta, 2 * divisors.size)[between]
    slope, start = np.polyfit(length * frequencies / (2 * np.pi), kept, 1)
    low = round(float(-start / slope), _DIGITS)
    return RopeScaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=round(low + float(1 / slope), _DIGITS),
        original_max_seq_len=length,
    )


def _frequencies(theta: float, head_dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
