"""Rows in contiguous groups, each group times a matrix of its own."""

from llmos_jax.kernels.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]
