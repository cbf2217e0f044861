"""Causal grouped-query attention, with or without the rotation of its inputs."""

from llmos_jax.kernels.attention.api import (
    IMPLEMENTATIONS,
    attention,
    rotary_attention,
)
from llmos_jax.kernels.attention.reference import CONTEXT, rotate

__all__ = ["CONTEXT", "IMPLEMENTATIONS", "attention", "rotary_attention", "rotate"]
