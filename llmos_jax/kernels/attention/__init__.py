"""Causal grouped-query attention."""

from llmos_jax.kernels.attention.api import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
