"""Causal grouped-query attention, with or without the rotation of its inputs."""

from llmos_jax.kernels.attention.api import (
    IMPLEMENTATIONS,
    attention,
    rotary_attention,
)
from llmos_jax.kernels.attention.context import context_attention, device_order
from llmos_jax.kernels.attention.reference import CONTEXT, PLAIN, Score, rotate

__all__ = [
    "CONTEXT",
    "IMPLEMENTATIONS",
    "PLAIN",
    "Score",
    "attention",
    "context_attention",
    "device_order",
    "rotary_attention",
    "rotate",
]
